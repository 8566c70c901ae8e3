"""The records of finished jobs and their table; free of jax, so that a finished run answers at
once.
"""

import json
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import settings

# mode: the sections of the configuration that its result depends on, beside the training
SECTIONS = {
  "sample": ("sampling", "guidance"),
  "likelihood": ("likelihood",),
  "evaluate": ("evaluation", "sampling", "guidance"),
}

# of a likelihood record: its number, and how it is called
MEASURES = {"bits_per_dim": "bits/dim", "log_density_nats": "log-density in nats"}


def result_path(workdir: Path, mode: str) -> Path:
  """Where the record of a mode lies."""
  return workdir / "results" / f"{mode}.json"


def finished(config: ConfigDict, workdir: Path) -> dict[str, dict[str, Any]]:
  """{mode: record} of the results that belong to this configuration at the end of its training."""
  records = {}
  for mode, sections in SECTIONS.items():
    path = result_path(workdir, mode)
    record = json.loads(path.read_text()) if path.is_file() else {}
    wanted = settings.digest(config, *sections), config.training.num_steps
    if (record.get("config_digest"), record.get("checkpoint_step")) == wanted:
      records[mode] = record
  return records


def figure_of(name: str) -> tuple[str, str]:
  """("kid", "5k_test_inception") of "kid5k_test_inception"."""
  return re.fullmatch(r"(.*?)_?(\d+k?_\D.*)", name).groups()


def _quality(record: dict[str, Any]) -> list[tuple]:
  """Rows of the figures of samples beside those of real examples in their place."""
  figures, floor = record.get("quality", {}), record.get("floor", {})
  if not figures:
    return []
  real = {figure_of(name)[0]: figure["value"] for name, figure in floor.items()}
  _, label = figure_of(next(iter(figures)))
  rows = [(f"quality of samples, {label}", "", "real data", None)]
  for name, figure in figures.items():
    kind, error = figure_of(name)[0], figure["standard_error"]
    value = f"{figure['value']:.3g}" + ("" if error is None else f" ± {error:.2g}")
    rows.append((f"  {kind}", value, f"{real[kind]:.3g}" if kind in real else "", None))
  return rows


def summary(records: dict[str, dict[str, Any]], workdir: Path) -> str:
  """The closing table of a run."""
  rows = []
  if r := records.get("likelihood"):
    key, unit = next((k, u) for k, u in MEASURES.items() if k in r)
    what = f"{r['split']} {unit}, {r['num_examples']} examples"
    rows.append((what, f"{r[key]:.3f} ± {r['standard_error']:.3f}", f"NFE {r['nfe_mean']:.0f}", r))
    rows.append(("  dequantization", r["dequantization"].partition(":")[0], "", None))
    if "atypical_share" in r:
      what = f"  latents with p < {r['atypical_below']}"
      rows.append((what, f"{r['atypical_share']:.1%}", "", None))
    if "baseline" in r:
      mixture = f"{r[f'baseline_{key}']:.3f} ± {r['baseline_standard_error']:.3f}"
      rows.append(("  Gaussian mixture, 10 components", mixture, "", None))
  if r := records.get("evaluate"):
    rows.append(
      (f"{r['split']} denoising loss / dim", f"{r['loss']:.4f} ± {r['standard_error']:.4f}", "", r)
    )
    if r["gaussian_predictor_loss"] == r["gaussian_predictor_loss"]:
      rows.append(("  best Gaussian predictor", f"{r['gaussian_predictor_loss']:.4f}", "", None))
    rows += _quality(r)
  if r := records.get("sample"):
    rows.append((f"samples ({r['sampler']})", str(r["num_samples"]), f"NFE {r['nfe']}", r))
  lines = [
    f"{a:<36}{b:>18}{c:>10}" + (f"{r['seconds']:>8.1f} s" if r else "") for a, b, c, r in rows
  ]
  step = max(r["checkpoint_step"] for r in records.values())
  rule = "-" * 74
  return "\n".join(
    [
      rule,
      f"{workdir}, checkpoint {step}",
      rule,
      *lines,
      rule,
      f"pictures and records: {workdir}/results/index.html",
    ]
  )
