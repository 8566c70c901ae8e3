"""The results page of a run: `results/index.html`, one file without scripts or links, with the
figures, the pictures and every record.
"""

import base64
import json
import math
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
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto; background: #fff }
summary { cursor: pointer; padding: 0.4rem 0 } summary small { display: inline }
pre { overflow-x: auto; font-size: 0.8rem }
</style>
"""

# the pictures in the order of the page; others follow under their own names
CAPTIONS = {
  "samples.png": "Samples",
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
    return "\N{NO-BREAK SPACE}± ".join(_rounded(error, value, error)).replace("± ", "±\u00a0")
  return f"{value:.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _value(figure: Record) -> str:
  return _number(figure.get("value"), figure.get("standard_error"))


def _estimate(figure: Record) -> str:
  """A metric of samples, under it the interval and the p-value, where there are any."""
  low, high, p_value = (figure.get(name) for name in ("low", "high", "p_value"))
  under = []
  if None not in (low, high) and 0 < high - low < math.inf:
    under.append("95 %: " + " to ".join(_rounded((high - low) / 4, low, high)))
  if p_value is not None:
    under.append(f"p = {p_value:.3g}")
  return f"{_value(figure)}\n{', '.join(under)}"


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
  known = r | {name: "?" for name in ("kind", "dequantization", "split") if name not in r}
  what, note = (text.format_map(known) for text in (line.what, line.note))
  value, beside = r.get(line.value), r.get(line.beside)
  if "gain_standard_error" in r and None not in (value, beside):
    note += f"; difference {_number(value - beside, r['gain_standard_error'])}"
  against = _number(beside, r.get("baseline_standard_error"))
  costs = (_number(r.get(name)) for name in (line.nfe, "seconds", "checkpoint_step"))
  return what, _number(value, r.get("standard_error")), f"{against}\n{note}" * bool(against), *costs
