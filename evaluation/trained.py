"""The trained network of a workdir: restored, or trained first."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

import data
import devices
import ema
import run_control
import run_log
import settings
import training
from checkpoint import Checkpoints, average, complete_steps
from errors import check
from evaluation import figures, network
from evaluation.batches import draw_samples, keys_of, spread
from evaluation.denoising import HeldOut
from evaluation.fid import sample_frechet_distance
from evaluation.records import SECTIONS, result_path
from experiment import Experiment, Weights, build

PACKAGES = ("jax", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")
FITTED = 10_000


@dataclasses.dataclass(frozen=True)
class Job:
  """A trained model at one step and the folder that its results go to."""

  experiment: Experiment
  params: PyTree
  step: int
  workdir: Path

  def key(self, section: str) -> jax.Array:
    """The key of a mode, from its own seed."""
    return jax.random.key(self.experiment.config[section].seed)

  def write(self, mode: str, seconds: float, result: dict[str, Any]) -> dict[str, Any]:
    """Writes the record of a mode; one of another configuration or checkpoint is kept under its
    digest.
    """
    config, path = self.experiment.config, result_path(self.workdir, mode)
    record = {
      **result,
      "seconds": round(seconds, 3),
      "checkpoint_step": self.step,
      "config_digest": settings.digest(config, *SECTIONS[mode]),
      "config": json.loads(config.to_json()),
      "versions": {"python": platform.python_version()}
      | {p: importlib.metadata.version(p) for p in PACKAGES},
      "devices": [str(d) for d in self.experiment.mesh.devices.flat],
      "matmul_precision": "highest",
      "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if not devices.is_first():
      return record
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
      old = json.loads(path.read_text())
      if old["config_digest"] != record["config_digest"] or old["checkpoint_step"] != self.step:
        path.rename(
          path.with_name(f"{mode}-step{old['checkpoint_step']}-{old['config_digest']}.json")
        )
    settings.write_text(path, json.dumps(record, indent=2) + "\n")
    return record


def training_examples(job: Job) -> np.ndarray:
  """Training examples in model units, uniformly dequantized, as many as a predictor without a
  network is fitted to; always the same for one training.
  """
  train = job.experiment.dataset.splits["train"]["image"]
  rows = spread(len(train), FITTED)
  keys = keys_of(jax.random.fold_in(jax.random.key(job.experiment.config.seed), 2), rows)
  return np.asarray(job.experiment.transform.dequantize(keys, jnp.asarray(train[rows])))


def start(
  config: ConfigDict,
  workdir: Path,
  *,
  train: bool,
  check_more: Callable[[Experiment, Path], Any] = lambda *_: None,
) -> Job:
  """Builds and checks everything, then trains, or restores the newest averaged parameters of the
  workdir. `check_more(experiment, workdir)` may refuse what comes after the training.
  """
  saved, folder = _read_spec(workdir), workdir / "checkpoints"
  experiment = build(config, None if train else saved)
  step = max(complete_steps(folder), default=None)
  if not train:
    mend = f"train first: python main.py --mode=train --workdir={workdir}"
    check(step is not None, "--workdir", str(workdir), "a folder with a checkpoint", mend)
    job = at_step(experiment, workdir, step)
    if not config.ema.post_hoc:
      print(f"restored the EMA weights of step {step}", flush=True)
    return job
  check_goes_on(config, experiment.spec, workdir)
  experiment.dataset  # noqa: B018  data that cannot be read leave no folder behind
  check_more(experiment, workdir)
  with writing(config, experiment.spec, workdir):
    return _train(experiment, workdir)


def check_goes_on(
  config: ConfigDict, spec: data.Spec, workdir: Path, section: str = "training"
) -> None:
  """A training goes on with the data that it began with, and forwards; `section` is the one of its
  num_steps.
  """
  step, saved = max(complete_steps(workdir / "checkpoints"), default=0), _read_spec(workdir)
  total, mend = config[section].num_steps, "choose another --workdir"
  legal = f"{step} or more: so far {workdir} was trained"
  check(step <= total, f"{section}.num_steps", total, legal, mend)
  legal = f"the data of {saved}, which {workdir} was trained on"
  check(saved in (None, spec), "data.name", f"{config.data.name}: {spec}", legal, mend)


@contextlib.contextmanager
def writing(config: ConfigDict, spec: data.Spec, workdir: Path) -> Iterator[None]:
  """Holds the lock of a training's folder, which tells what is trained there and on what."""
  if not devices.is_first():
    yield
    return
  with run_control.only_run(workdir):
    settings.save(config, workdir)
    settings.write_text(workdir / "data.json", json.dumps(spec._asdict()) + "\n")
    yield


def _read_spec(workdir: Path) -> data.Spec | None:
  """What the data were that the workdir was trained on, None where nothing was."""
  path = workdir / "data.json"
  return data.Spec.of_json(json.loads(path.read_text())) if path.is_file() else None


def _train(experiment: Experiment, workdir: Path) -> Job:
  """Trains to the end, looking at samples and held-out loss from time to time."""
  config = experiment.config
  used, settings_ = config.ema.use, config.training
  held_out = HeldOut(experiment)
  callbacks = {
    "sample_every": lambda step, averages: _preview(experiment, averages[used], workdir, step),
    "evaluate_every": lambda step, averages: held_out.scalars(averages[used]),
  }
  # a training step is three forward passes
  known = run_log.peak_flops(settings_.peak_tflops)
  flops = 3 * network.flops(experiment.model, experiment.spec.shape) if known else 0.0
  parts = experiment.sde, experiment.model, experiment.dataset, experiment.mesh
  state = training.train(config, *parts, workdir, callbacks, flops)
  params = state.ema_params[used]
  if config.ema.post_hoc:
    params = _post_hoc(experiment, settings_.num_steps, workdir)
  return Job(experiment, params, settings_.num_steps, workdir)


def at_step(experiment: Experiment, workdir: Path, step: int) -> Job:
  """The average of the parameters at a checkpoint that `config.ema` chooses."""
  settings_ = experiment.config.ema
  if settings_.post_hoc:
    return Job(experiment, _post_hoc(experiment, step, workdir), step, workdir)
  with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
    item = average(settings_.use)
    params = checkpoints.restore_item(step, item, experiment.abstract_ema())
  return Job(experiment, params, step, workdir)


def _post_hoc(experiment: Experiment, step: int, workdir: Path) -> PyTree:
  """The average of relative width `ema.post_hoc` at `step` from the snapshots of the run."""
  settings_, total = experiment.config.ema, None
  first = len(settings_.half_life_images)
  with Checkpoints(workdir / "ema_snapshots", read_only=True) as snapshots:
    steps = [s for s in snapshots.steps() if s <= step]
    mend = "train with ema.sigma_rel=(0.05, 0.1) and ema.snapshot_every"
    legal = f"0 for {workdir}, which holds no snapshots of the averages"
    check(bool(steps), "ema.post_hoc", settings_.post_hoc, legal, mend)
    stored = [(s, i) for s in steps for i in range(len(settings_.sigma_rel))]
    widths = [settings_.sigma_rel[i] for _, i in stored]
    times = [s for s, _ in stored]
    weights = ema.post_hoc_weights(times, widths, step, settings_.post_hoc)
    for (s, i), weight in zip(stored, weights):
      tree = snapshots.restore_item(s, average(first + i), experiment.abstract_ema())
      part = jax.tree.map(lambda x, w=weight: w * x, tree)
      total = part if total is None else jax.tree.map(jnp.add, total, part)
  print(f"put together the EMA weights of relative width {settings_.post_hoc} of step {step}")
  return total


def _preview(experiment: Experiment, params: PyTree, workdir: Path, step: int) -> dict[str, float]:
  """A picture of one batch of samples, always from the same keys; the Fréchet distance of more of
  them to the held-out data where it is asked for.
  """
  config = experiment.config
  key, count = jax.random.key(config.sampling.seed), config.training.frechet_samples
  wanted = max(count, config.sampling.batch_size)
  x = draw_samples(experiment, Weights(params), key, wanted)
  if devices.is_first():
    path = workdir / "samples" / f"step_{step:06d}.png"
    figures.save_samples(path, x[: config.sampling.batch_size], experiment.transform)
  if not count:
    return {}
  held_out = experiment.dataset.splits[config.evaluation.split]["image"]
  held_out = held_out[spread(len(held_out), count)]
  flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)
  y = experiment.transform.forward(jnp.asarray(held_out))
  return {"frechet_distance_pixels": sample_frechet_distance(flat(x[:count]), flat(y))}
