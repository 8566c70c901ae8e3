"""Sample quality of checkpoints, samplers and numbers of steps, in one table and picture."""

import itertools
import json
from pathlib import Path
from typing import Any

import devices
import settings
from checkpoint import complete_steps
from errors import check
from evaluation import figures, records
from evaluation.sample_quality import Plan, measured
from evaluation.trained import Job, at_step
from experiment import Experiment, build


def _experiments(job: Job) -> list[tuple[int, Experiment]]:
  """(checkpoint, experiment) of every combination, all checked before anything is drawn."""
  config, folder = job.experiment.config, job.workdir / "checkpoints"
  wanted, sampling = config.evaluation.sweep, config.sampling
  steps, there = wanted.checkpoints or (job.step,), complete_steps(folder)
  for step in steps:
    legal = f"those of {folder}: {', '.join(map(str, sorted(there)))}"
    check(step in there, "evaluation.sweep.checkpoints", step, legal)
  samplers = wanted.samplers or (sampling.sampler,)
  experiments = []
  for chosen in itertools.product(steps, samplers, wanted.num_steps or (sampling.num_steps,)):
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
      _, changed.sampling.sampler, changed.sampling.num_steps = chosen
    experiments.append((chosen[0], build(changed, job.experiment.spec)))
  return experiments


def _row(job: Job, prepared: Plan) -> dict[str, Any]:
  """One combination: its samples are drawn, or found, and measured."""
  sampling, (quality, drawn) = job.experiment.config.sampling, measured(job, prepared)
  return {
    "checkpoint": job.step,
    "sampler": sampling.sampler,
    "num_steps": sampling.num_steps,
    "nfe": int(drawn.nfe.max()),
    "seconds": round(drawn.seconds, 3),
    "quality": quality,
  }


def _print(row: dict[str, Any], *, with_titles: bool) -> None:
  """A line of the table."""
  values = {records.figure_of(name)[0]: figure["value"] for name, figure in row["quality"].items()}
  widths = [max(10, len(name) + 2) for name in values]
  start = lambda *columns: "{:>10}  {:<22}{:>6}".format(*columns)
  titles = "".join(f"{name:>{w}}" for name, w in zip(values, widths))
  if with_titles:
    print(start("checkpoint", "sampler", "NFE") + titles)
  numbers = "".join(f"{value:>{w}.4g}" for value, w in zip(values.values(), widths))
  print(start(row["checkpoint"], row["sampler"], row["nfe"]) + numbers, flush=True)


def run(job: Job, prepared: Plan) -> list[dict[str, Any]]:
  """The rows of `evaluation.sweep`, printed one by one and kept in results/sweep.json with a
  picture.
  """
  rows, path = [], Path(job.workdir) / "results" / "sweep.json"
  for step, experiment in _experiments(job):
    rows.append(_row(at_step(experiment, job.workdir, step), prepared))
    _print(rows[-1], with_titles=len(rows) == 1)
  if devices.is_first():
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = settings.digest(job.experiment.config, *records.SECTIONS["evaluate"])
    settings.write_text(path, json.dumps({"rows": rows, "config_digest": digest}, indent=2) + "\n")
    figures.save_sweep(path.with_suffix(".png"), rows)
  return rows
