"""The results page of a run: `results/index.html`, one file without scripts or links, with the
figures, the pictures and every record.
"""

import base64
import json
import math
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

import settings
from configs import bases
from evaluation.records import MEASURES, SECTIONS, figure_of

Record = dict[str, Any]
Row = tuple[str, ...]  # texts of cells; what follows a line break is printed small

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5c6670; --line: #d5dae0; --back: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --dim: #9aa4ae; --line: #3a424b; --back: #15181c }
}
body { font: 16px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 62rem; margin: auto; padding: 1rem; font-variant-numeric: tabular-nums }
h1 { font-size: 1.6rem; margin: 0.5rem 0 } h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem }
small, figcaption, p { color: var(--dim); font-size: 0.85rem } small { display: block }
div { overflow-x: auto } table { border-collapse: collapse; min-width: 60% }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 1rem 0.35rem 0;
  border-bottom: 1px solid var(--line) }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto; background: #fff }
details { border-bottom: 1px solid var(--line); padding: 0.4rem 0 } summary { cursor: pointer }
pre { overflow-x: auto; font-size: 0.8rem }
"""
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">"""

# the pictures in the order of the page; others follow under their own names
CAPTIONS = {
  "samples.png": "Samples",
  "process.png": "Held-out examples being noised (above) and samples being generated (below), at "
  "the same noise levels",
  "likelihood.png": "Likelihood of the examples of a split, the most and the least likely of them",
  "interpolation.png": "Between pairs of held-out examples, along their latents",
  "loss_per_noise_level.png": "Held-out denoising loss at every noise level, beside predictors "
  "without a network",
  "sweep.png": "Quality of samples over checkpoints, samplers and network evaluations (NFE)",
}
FIGURES = ("", "this run", "beside it", "NFE", "seconds", "checkpoint")


def _rounded(error: float, *values: float) -> list[str]:
  """The values to the second significant digit of the error."""
  digits = 1 - math.floor(math.log10(error))
  if digits > 6:
    powers = (math.floor(math.log10(abs(v))) if v else 0 for v in values)
    return [f"{v:.{max(0, power + digits)}e}" for v, power in zip(values, powers)]
  # adding zero takes the sign of -0.0 away
  return [f"{round(v, digits) + 0.0:,.{max(digits, 0)}f}" for v in values]


def _number(value: float | None, error: float | None = None) -> str:
  """The value ± its standard error; four significant digits without one, nothing of a NaN."""
  if value is None or value != value:
    return ""
  if error and math.isfinite(error) and math.isfinite(value):
    return " ± ".join(_rounded(error, value, error))
  return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _estimate(figure: Record | None) -> str:
  """A metric of samples, under it the interval and the p-value, where there are any."""
  if not figure:
    return ""
  low, high, p_value = (figure.get(name) for name in ("low", "high", "p_value"))
  under = []
  if None not in (low, high) and 0 < high - low < math.inf:
    under.append("95 %: " + " to ".join(_rounded((high - low) / 4, low, high)))
  if p_value is not None:
    under.append(f"p = {p_value:.2g}")
  return f"{_number(figure['value'], figure.get('standard_error'))}\n{', '.join(under)}"


def _cell(text: str, tag: str = "td") -> str:
  large, _, small = (escape(part) for part in str(text).partition("\n"))
  return f"<{tag}>{large}" + (f"<small>{small}</small>" if small else "") + f"</{tag}>"


def _table(rows: Iterable[Row], head: Row = ()) -> str:
  lines = ["".join(_cell(text, "th") for text in head)] if head else []
  lines += ["".join(map(_cell, row)) for row in rows]
  return "<div><table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>\n"


def _section(title: str, body: str, note: str = "") -> str:
  return f"<h2>{escape(title)}</h2>\n" + (f"<p>{escape(note)}</p>\n" if note else "") + body


def _listed(options: Record) -> str:
  return ", ".join(f"{name} {value}" for name, value in options.items())


def _likelihood(r: Record) -> Row:
  key, unit = next(((k, u) for k, u in MEASURES.items() if k in r), ("bits_per_dim", "bits/dim"))
  about = (
    r.get("kind"),
    f"dequantization {r.get('dequantization')}",
    f"{r['num_examples']} examples",
  )
  value, baseline = r.get(key), r.get(f"baseline_{key}")
  beside = _number(baseline, r.get("baseline_standard_error")) + "\n"
  if baseline is not None:
    gain = _number(value - baseline, r.get("gain_standard_error"))
    beside += f"{r.get('baseline')}; difference {gain}"
  what = f"{r['split']} {unit}\n" + ", ".join(filter(None, about))
  return what, _number(value, r.get("standard_error")), beside, _number(r.get("nfe_mean"))


def _denoising(r: Record) -> Row:
  what = f"{r['split']} denoising loss per dimension\n{r['num_examples']} examples"
  beside = _number(r.get("gaussian_predictor_loss"))
  beside += "\nbest Gaussian predictor; 1 predicts nothing" if beside else ""
  return what, _number(r.get("loss"), r.get("standard_error")), beside, _number(r.get("nfe"))


def _samples(r: Record) -> Row:
  speed = f"{_number(r.get('images_per_second'))} a second"
  return f"samples\n{r['sampler']}", f"{r['num_samples']}\n{speed}", "", _number(r.get("nfe"))


# mode: its line in the table of the main figures
LINES: dict[str, Callable[[Record], Row]] = {
  "likelihood": _likelihood,
  "evaluate": _denoising,
  "sample": _samples,
}


def _line(mode: str, r: Record) -> Row:
  return *LINES[mode](r), _number(r.get("seconds")), str(r.get("checkpoint_step", ""))


def _quality(r: Record) -> str:
  """The metrics of samples, beside those of real examples in their place."""
  quality, real = r.get("quality") or {}, r.get("floor") or {}
  if not quality:
    return ""
  floor = {figure_of(name)[0]: figure for name, figure in real.items()}
  rows = []
  for name, figure in quality.items():
    kind, what = figure_of(name)[0], (figure or {}).get("what", "")
    rows.append((f"{kind}\n{what}", _estimate(figure), _estimate(floor.get(kind))))
  for name, figure in (r.get("self_test") or {}).items():
    rows.append((f"{name}\nself-test: one half of the real examples", "", _estimate(figure)))
  label, real_label = (figure_of(next(iter(some)))[1] if some else "" for some in (quality, real))
  about = {n: r[n] for n in ("num_samples", "sampler", "sampler_nfe", "reference") if n in r}
  about |= {n: r[n] for n in ("features", "seconds_sampling") if n in r}
  note = _listed({name.replace("_", " "): value for name, value in about.items()})
  head = ("", f"samples\n{label}", f"train against test\n{real_label}")
  return _section("Quality of samples", _table(rows, head), note)


def _differences(config: Record, other: Record) -> dict[str, str]:
  """{"section.field": "value (that of the other)"} of a configuration."""
  ours, theirs = settings.flatten(config), settings.flatten(other)
  return {
    k: f"{v} ({theirs[k]})" if k in theirs else f"{v}"
    for k, v in ours.items()
    if k not in theirs or theirs[k] != v
  }


def _former(records: dict[str, Record]) -> str:
  """The records that later ones of their mode took the place of, and what was otherwise."""
  rows = []
  for name, r in records.items():
    mode = name.partition("-step")[0]
    current = records.get(f"{mode}.json", {}).get("config", r.get("config", {}))
    used = {*r.get("config", {})} - {s for some in SECTIONS.values() for s in some}
    used |= {*SECTIONS.get(mode, ())}
    changed = _differences({s: v for s, v in r.get("config", {}).items() if s in used}, current)
    if mode in LINES and "-step" in name:
      figures = {figure_of(n)[0]: _estimate(f) for n, f in (r.get("quality") or {}).items()}
      quality = {kind: text.partition("\n")[0] for kind, text in figures.items()}
      rows.append((*_line(mode, r), f"{_listed(changed)}\n{_listed(quality)}"))
  if not rows:
    return ""
  head = (*FIGURES, "what was otherwise\n(now)")
  return _section("Former results", _table(rows, head))


def _sweep(record: Record) -> str:
  """A row for each combination of a sweep."""
  rows = [
    {k: _number(v) if isinstance(v, int | float) else v for k, v in row.items() if k != "quality"}
    | {figure_of(name)[0]: _estimate(f) for name, f in row.get("quality", {}).items()}
    for row in record.get("rows", ())
  ]
  head = tuple(dict.fromkeys(name for row in rows for name in row))
  body = _table((tuple(row.get(name, "") for name in head) for row in rows), head)
  return _section("Sweep", body) if rows else ""


def _pictures(results: Path) -> str:
  """Every picture of the folder with its caption."""
  there = sorted(path.name for path in results.glob("*.png"))
  names = [*(n for n in CAPTIONS if n in there), *(n for n in there if n not in CAPTIONS)]
  lines = []
  for name in names:
    values = base64.b64encode((results / name).read_bytes()).decode()
    caption = escape(f"{CAPTIONS[name]} ({name})" if name in CAPTIONS else name)
    image = f'<img alt="{caption}" src="data:image/png;base64,{values}">'
    lines.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n")
  return _section("Pictures", "".join(lines)) if names else ""


def _details(name: str, record: Any) -> str:
  """A whole record, folded."""
  fields = record if isinstance(record, dict) else {}
  shown = {n: fields[n] for n in ("checkpoint_step", "seed", "written") if n in fields}
  shown = {n.replace("_", " "): v for n, v in shown.items()} | fields.get("versions", {})
  title = f"<summary>{escape(name)} <small>{escape(_listed(shown))}</small></summary>"
  text = escape(json.dumps(record, indent=2, ensure_ascii=False))
  return f"<details>{title}<pre>{text}</pre></details>\n"


def _facts(config: Record, spec: Record, records: dict[str, Record]) -> list[Row]:
  """What was trained: data, process, network, checkpoint, and what differs from the defaults."""
  sections = {name: config.get(name, {}) for name in ("data", "sde", "model", "training")}
  names = {
    name: f"{s.get('name', '')}\n{_listed(s.get('args', {}))}" for name, s in sections.items()
  }
  shape = " x ".join(map(str, spec.get("shape", ())))
  about = {"": shape, "levels": spec.get("levels"), "classes": spec.get("num_classes")}
  data = _listed({n: v for n, v in about.items() if v}).strip()
  steps = {r["checkpoint_step"] for r in records.values() if "checkpoint_step" in r}
  trained = sections["training"].get("num_steps", "")
  changed = _differences(config, json.loads(bases.config().to_json()))
  return [
    ("data", f"{sections['data'].get('name', '')}\n{data}"),
    ("process", names["sde"]),
    ("network", f"{names['model']}; {_listed(config.get('parameterization', {}))}"),
    ("checkpoint", f"{max(steps, default='none')}\nof {trained} steps, seed {config.get('seed')}"),
    ("not as by default\n(default)", f"{len(changed)} fields\n{_listed(changed)}"),
  ]


def _read(path: Path) -> Any:
  """The contents of a JSON file; the text of one that is none, None without one."""
  text = path.read_text() if path.is_file() else "null"
  try:
    return json.loads(text)
  except ValueError:
    return text


def write(workdir: Path) -> Path:
  """Writes `results/index.html` of a workdir from whatever records and pictures are there; returns
  its path.
  """
  results, name = workdir / "results", workdir.resolve().name
  results.mkdir(parents=True, exist_ok=True)
  files = {path.name: _read(path) for path in sorted(results.glob("*.json"))}
  records = {n: r for n, r in files.items() if isinstance(r, dict)}
  config, spec = (_read(workdir / f"{n}.json") or {} for n in ("config", "data"))
  main = [_line(mode, records[f"{mode}.json"]) for mode in LINES if f"{mode}.json" in records]
  note = "± is one standard error; 95 % is the interval that covers the true figure so often."
  body = [
    f"<h1>{escape(name)}</h1>\n",
    _table(_facts(config, spec, records)),
    _section("Main figures", _table(main, FIGURES), note) if main else "",
    _quality(records.get("evaluate.json", {})),
    _pictures(results),
    _sweep(records.get("sweep.json", {})),
    _former(records),
    _section("Records", "".join(map(_details, files, files.values()))) if files else "",
  ]
  head = f"{HEAD}\n<title>{escape(name)}</title><style>{STYLE}</style></head>\n"
  page = f"{head}<body>\n{''.join(body)}</body></html>\n"
  # ASCII alone reads the same whatever encoding this machine writes files in
  settings.write_text(results / "index.html", page.encode("ascii", "xmlcharrefreplace").decode())
  return results / "index.html"
