"""The results page of a run: `results/index.html`, one file without scripts or links, with the
figures, the pictures and every record.
"""

import base64
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import settings
from configs import bases
from evaluation.records import MEASURES, SECTIONS, figure_of

Record = dict[str, Any]
Row = tuple[str, ...]  # texts of cells; what follows a line break is printed small

HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5c6670; --line: #d5dae0; --back: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --dim: #9aa4ae; --line: #3a424b; --back: #15181c }
}
body { font: 16px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 62rem; margin: auto; padding: 1rem; font-variant-numeric: tabular-nums }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem }
small, figcaption, p { color: var(--dim); font-size: 0.85rem } small { display: block }
div { overflow-x: auto } table { border-collapse: collapse; min-width: 60% }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 1rem 0.35rem 0;
  border-bottom: 1px solid var(--line) }
td:first-child { overflow-wrap: anywhere; min-width: 6rem }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto; background: #fff }
summary { cursor: pointer; padding: 0.4rem 0 } summary small { display: inline }
pre { overflow-x: auto; font-size: 0.8rem }
</style>
"""

# the pictures in the order of the page; others follow under their own names
CAPTIONS = {
  "samples.png": "Samples",
  "conditional.png": "Inputs, and what was drawn for each",
  "classifier.png": "Accuracy of the classifier of noised examples",
  "process.png": "Held-out examples being noised (above), samples being generated (below)",
  "likelihood.png": "Likelihood of the examples of a split",
  "interpolation.png": "Between pairs of held-out examples, along their latents",
  "loss_per_noise_level.png": "Held-out denoising loss, beside predictors without a network",
  "sweep.png": "Quality of samples over checkpoints, samplers and network evaluations (NFE)",
}
FIGURES = ("", "this run", "beside it", "NFE", "seconds", "checkpoint")


class Line(NamedTuple):
  """How a record stands in the table of figures: fields, and texts with fields in braces."""

  value: str
  what: str
  nfe: str = "nfe"
  beside: str = ""
  note: str = ""  # what the value beside is


LIKELIHOOD = "{kind}, dequantization {dequantization}, {num_examples} examples"
PREDICTORS = "best Gaussian predictor; 1 predicts nothing"
# a record has the line of the first value that it holds
LINES = (
  *(
    Line(key, f"{{split}} {unit}\n{LIKELIHOOD}", "nfe_mean", f"baseline_{key}", "{baseline}")
    for key, unit in MEASURES.items()
  ),
  Line(
    "loss",
    "{split} denoising loss per dimension\n{num_examples} examples",
    beside="gaussian_predictor_loss",
    note=PREDICTORS,
  ),
  Line("num_samples", "samples drawn\n{sampler}, {images_per_second} a second"),
)


def _rounded(error: float, *values: float) -> list[str]:
  """The values to the second significant digit of the error."""
  digits = 1 - math.floor(math.log10(error))
  if digits > 6:
    powers = (math.floor(math.log10(abs(v))) if v else 0 for v in values)
    return [f"{v:.{max(0, power + digits)}e}" for v, power in zip(values, powers)]
  # adding zero takes the sign of -0.0 away
  return [f"{round(v, digits) + 0.0:.{max(digits, 0)}f}" for v in values]


def _number(value: float | None, error: float | None = None) -> str:
  """The value ± its standard error; four significant digits without one, nothing of a NaN."""
  if value is None or value != value:
    return ""
  if error and math.isfinite(error) and math.isfinite(value):
    return "\u00a0±\u00a0".join(_rounded(error, value, error))
  return f"{value:.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _values(quality: Record) -> dict[str, str]:
  """{figure: value ± its standard error} of the metrics of samples."""
  names = "value", "standard_error"
  return {figure_of(n)[0]: _number(*map(f.get, names)) for n, f in quality.items()}


def _estimate(figure: Record) -> str:
  """A metric of samples, under it the interval and the p-value, where there are any."""
  low, high, p_value = map(figure.get, ("low", "high", "p_value"))
  under = []
  if None not in (low, high) and 0 < high - low < math.inf:
    under.append("95 %: " + " to ".join(_rounded((high - low) / 4, low, high)))
  if p_value is not None:
    under.append(f"p = {p_value:.3g}")
  return f"{_number(*map(figure.get, ('value', 'standard_error')))}\n{', '.join(under)}"


def _table(rows: Iterable[Row], head: Row = ()) -> str:
  def cell(text, tag):
    large, _, small = (escape(part) for part in str(text).partition("\n"))
    return f"<{tag}>{large}" + (f"<small>{small}</small>" if small else "") + f"</{tag}>"

  lines = [(head, "th")] * bool(head) + [(row, "td") for row in rows]
  cells = ("".join(cell(text, tag) for text in row) for row, tag in lines)
  return "<div><table>" + "".join(f"<tr>{line}</tr>\n" for line in cells) + "</table></div>\n"


def _section(title: str, body: str, note: str = "") -> str:
  return f"<h2>{escape(title)}</h2>\n<p>{escape(note)}</p>\n{body}" if body else ""


def _listed(options: Record) -> str:
  return ", ".join(f"{name} {value}" for name, value in options.items())


def _line(r: Record) -> Row:
  """The main figure of a record and what it is to be compared with."""
  line = next((line for line in LINES if line.value in r), Line("", "no figure"))
  known = defaultdict(lambda: "?", r)
  what, note = (text.format_map(known) for text in (line.what, line.note))
  value, beside = r.get(line.value), r.get(line.beside)
  if "gain_standard_error" in r and None not in (value, beside):
    note += f"; difference {_number(value - beside, r['gain_standard_error'])}"
  against = _number(beside, r.get("baseline_standard_error"))
  costs = (_number(r.get(name)) for name in (line.nfe, "seconds", "checkpoint_step"))
  return what, _number(value, r.get("standard_error")), f"{against}\n{note}" * bool(against), *costs


def _quality(r: Record) -> str:
  """The metrics of samples, beside those of real examples in their place."""
  quality, real = r.get("quality", {}), r.get("floor", {})
  floor = {figure_of(name)[0]: figure for name, figure in real.items()}
  rows = []
  for name, figure in quality.items():
    kind = figure_of(name)[0]
    what = f"{kind}\n{figure.get('what', '')}"
    rows.append((what, _estimate(figure), _estimate(floor.get(kind, {}))))
  for name, figure in r.get("self_test", {}).items():
    rows.append(
      (f"{name}\nself-test: one half of the examples against the other", "", _estimate(figure))
    )
  if not rows:
    return ""
  labels = [figure_of(next(iter(some)))[1] if some else "" for some in (quality, real)]
  reference = r.get("reference", "").partition(",")[0]
  against = f"{'held-out' if reference == 'train' else 'train'} against {reference}"
  head = ("", f"samples\n{labels[0]}", f"{against}\n{labels[1]}")
  names = "num_samples", "sampler", "sampler_nfe", "reference", "features", "seconds_sampling"
  note = _listed({n.replace("_", " "): r[n] for n in names if n in r})
  return _section("Quality of samples", _table(rows, head), note)


def _sweep(record: Record) -> str:
  """A row for each combination of a sweep."""
  rows = [dict(row) for row in record.get("rows", ())]
  rows = [row | _values(row.pop("quality", {})) for row in rows]
  head = tuple(dict.fromkeys(name for row in rows for name in row))
  body = _table((tuple(row.get(name, "") for name in head) for row in rows), head)
  return _section("Sweep", body if rows else "")


def _differences(config: Record, other: Record) -> dict[str, str]:
  """{"section.field": "value (that of the other)"} of a configuration."""
  ours, theirs = settings.flatten(config), settings.flatten(other)
  changed = {k: v for k, v in ours.items() if k not in theirs or theirs[k] != v}
  return {k: f"{v} ({theirs[k]})" if k in theirs else str(v) for k, v in changed.items()}


def _former(records: dict[str, Record]) -> str:
  """The records whose place later ones of their mode took, and what was otherwise."""
  rows = []
  for name, r in records.items():
    mode, step, _ = name.partition("-step")
    if not step or mode not in SECTIONS:
      continue
    config, now = (some.get("config", {}) for some in (r, records.get(f"{mode}.json", {})))
    unused = {s for some in SECTIONS.values() for s in some} - {*SECTIONS[mode]}
    used = {section: fields for section, fields in config.items() if section not in unused}
    changed = _listed(_differences(used, now) if now else {})
    rows.append((*_line(r), f"{changed}\n{_listed(_values(r.get('quality', {})))}"))
  head = (*FIGURES, "otherwise (now)")
  return _section("Former results", _table(rows, head) if rows else "")


def _pictures(results: Path) -> str:
  """Every picture of the folder with its caption."""
  there = sorted(path.name for path in results.glob("*.png"))
  lines = []
  for name in (*(n for n in CAPTIONS if n in there), *(n for n in there if n not in CAPTIONS)):
    values = base64.b64encode((results / name).read_bytes()).decode()
    caption = escape(f"{CAPTIONS[name]} ({name})" if name in CAPTIONS else name)
    image = f'<img alt="{caption}" src="data:image/png;base64,{values}">'
    lines.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n")
  return _section("Pictures", "".join(lines))


def _details(name: str, record: Any) -> str:
  """A whole record, folded, under its seed, versions and configuration."""
  r = record if isinstance(record, dict) else {}
  changed = _differences(r.get("config", {}), json.loads(bases.config().to_json()))
  rows = {
    "written": r.get("written"),
    "seed": r.get("seed"),
    "versions": _listed(r.get("versions", {})),
    "devices": ", ".join(r.get("devices", ())),
    "configuration\nother than by default (default)": _listed(changed),
  }
  table = _table(row for row in rows.items() if row[1] not in (None, ""))
  text = escape(json.dumps(record, indent=2, ensure_ascii=False))
  return f"<details><summary>{escape(name)}</summary>{table}<pre>{text}</pre></details>\n"


def _facts(config: Record, spec: Record, records: dict[str, Record]) -> list[Row]:
  """What was trained: data, process, network, checkpoint."""
  named = lambda section: f"{section.get('name', '')}\n{_listed(section.get('args', {}))}"
  data, sde, model, training = (config.get(s, {}) for s in ("data", "sde", "model", "training"))
  about = {n: spec[n] for n in ("shape", "levels", "num_classes") if spec.get(n)}
  steps = (r["checkpoint_step"] for r in records.values() if "checkpoint_step" in r)
  return [
    ("data", named({"name": data.get("name", ""), "args": about})),
    ("process", named(sde)),
    ("network", f"{named(model)}; {_listed(config.get('parameterization', {}))}"),
    (
      "checkpoint",
      f"{max(steps, default='')}\nof {training.get('num_steps')} steps, seed {config.get('seed')}",
    ),
  ]


def _read(path: Path) -> Any:
  """The contents of a JSON file; the text of one that is none."""
  try:
    return json.loads(path.read_text())
  except ValueError:
    return path.read_text(errors="replace")


def write(workdir: Path) -> Path:
  """Writes `results/index.html` of a workdir from whatever records and pictures are there; returns
  its path.
  """
  results, name = workdir / "results", escape(workdir.resolve().name)
  results.mkdir(parents=True, exist_ok=True)
  files = {path.name: _read(path) for path in sorted(results.glob("*.json"))}
  records = {n: r for n, r in files.items() if isinstance(r, dict)}
  saved = (workdir / n for n in ("config.json", "data.json"))
  config, spec = (_read(path) if path.is_file() else {} for path in saved)
  main = [_line(records[f"{mode}.json"]) for mode in SECTIONS if f"{mode}.json" in records]
  note = "± one standard error; where there is a 95 % interval it stands below"
  body = [
    _table(_facts(config, spec, records)),
    _section("Main figures", _table(main, FIGURES) if main else "", note),
    _quality(records.get("evaluate.json", {})),
    _pictures(results),
    _sweep(records.get("sweep.json", {})),
    _former(records),
    _section("Records", "".join(map(_details, files, files.values()))),
  ]
  page = (
    f"{HEAD}<title>{name}</title></head>\n<body><h1>{name}</h1>\n{''.join(body)}</body></html>\n"
  )
  # ASCII reads the same whatever encoding this machine writes files in
  settings.write_text(results / "index.html", page.encode("ascii", "xmlcharrefreplace").decode())
  return results / "index.html"
