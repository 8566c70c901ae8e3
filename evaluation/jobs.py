"""The modes after training: sample, likelihood, evaluate; each writes pictures and one JSON record
into `results/`.
"""

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
from tqdm import tqdm

import settings
import training
from checkpoint import Checkpoints
from errors import ConfigError, RunError, check
from evaluation import figures
from evaluation.denoising import gaussian_predictor_loss, loss_per_level
from evaluation.mixture import mixture_log_prob
from evaluation.records import SECTIONS, result_path
from experiment import SOLVES, Experiment, build
from likelihood import bits_per_dim
from sde_lib import example_keys, fold_in, log_snr, perturb, time_of_log_snr

PACKAGES = ("jax", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")


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


def start(config: ConfigDict, workdir: Path, *, train: bool) -> Job:
  """Builds and checks everything, then trains, or restores the newest EMA parameters of the
  workdir.
  """
  experiment = build(config)
  with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
    step = checkpoints.latest()
    if not train:
      mend = f"train first: python main.py --mode=train --workdir={workdir}"
      check(step is not None, "--workdir", str(workdir), "a folder with a checkpoint", mend)
      print(f"restored the EMA weights of step {step}", flush=True)
      params = checkpoints.restore_ema(step, experiment.abstract_ema())
      return Job(experiment, params, step, workdir)
  dataset, total, samples = experiment.dataset, config.training.num_steps, workdir / "samples"
  legal, mend = f"{step} or more: so far {workdir} was trained", "choose another --workdir"
  check((step or 0) <= total, "training.num_steps", total, legal, mend)
  settings.save(config, workdir)
  parts = experiment.sde, experiment.model, dataset, experiment.mesh
  preview = lambda step, params: _preview(experiment, params, samples / f"step_{step:06d}.png")
  return Job(experiment, training.train(config, *parts, workdir, preview), total, workdir)


def _preview(experiment: Experiment, params: PyTree, path: Path) -> None:
  """A grid of one batch of samples, always from the same keys."""
  keys = example_keys(
    jax.random.key(experiment.config.sampling.seed), experiment.config.sampling.batch_size
  )
  x, _ = experiment.sampler(params, keys)
  figures.save_grid(path, np.asarray(x), experiment.transform)


def _write(job: Job, mode: str, seconds: float, result: dict[str, Any]) -> dict[str, Any]:
  """Writes the record of a mode; one of another configuration or checkpoint is kept under its
  digest.
  """
  config, path = job.experiment.config, result_path(job.workdir, mode)
  record = {
    **result,
    "seconds": round(seconds, 3),
    "checkpoint_step": job.step,
    "config_digest": settings.digest(config, SECTIONS[mode]),
    "config": json.loads(config.to_json()),
    "versions": {"python": platform.python_version()}
    | {p: importlib.metadata.version(p) for p in PACKAGES},
    "devices": [str(d) for d in job.experiment.mesh.devices.flat],
    "matmul_precision": "highest",
    "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.is_file():
    old = json.loads(path.read_text())
    if old["config_digest"] != record["config_digest"] or old["checkpoint_step"] != job.step:
      path.rename(
        path.with_name(f"{mode}-step{old['checkpoint_step']}-{old['config_digest']}.json")
      )
  settings.write_text(path, json.dumps(record, indent=2) + "\n")
  return record


def _parts(total: int, size: int, unit: str) -> Iterator[tuple[np.ndarray, int]]:
  """(indices [size], how many of them count) over 0 .. total - 1; the last part repeats its last
  index.
  """
  with tqdm(total=total, desc=unit, unit="image", disable=None) as bar:
    for first in range(0, total, size):
      valid = min(size, total - first)
      yield np.minimum(first + np.arange(size), total - 1), valid
      bar.update(valid)


def _keys(key: jax.Array, index: np.ndarray) -> jax.Array:
  """The keys of the examples with these global indices, as `example_keys` makes them."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(index))


def draw_samples(
  experiment: Experiment, params: PyTree, key, num_samples: int
) -> tuple[np.ndarray, np.ndarray]:
  """(x [num_samples, *d] in model units, network evaluations of each); sample i depends on (key, i)
  alone.
  """
  size, xs, nfes = experiment.config.sampling.batch_size, [], []
  for index, valid in _parts(num_samples, size, "sampling"):
    x, nfe = jax.device_get(experiment.sampler(params, _keys(key, index)))
    xs.append(x[:valid])
    nfes.append(nfe[:valid])
  x = np.concatenate(xs)
  if not np.isfinite(x).all():
    raise RunError(
      "the sampler left the finite numbers or hit max_steps; use more steps or a smaller tolerance"
    )
  return x, np.concatenate(nfes)


def run_sample(job: Job) -> dict[str, Any]:
  """Draws `sampling.num_samples` examples: a grid, the values as npz, and the picture of both
  processes.
  """
  experiment, options = job.experiment, job.experiment.config.sampling
  begin = time.perf_counter()
  x, nfe = draw_samples(experiment, job.params, job.key("sampling"), options.num_samples)
  seconds = time.perf_counter() - begin
  transform, results = experiment.transform, job.workdir / "results"
  figures.save_grid(results / "samples.png", x, transform)
  values = np.asarray(transform.inverse(jnp.asarray(x)), np.uint8)
  np.savez_compressed(results / "samples.npz", image=values)
  if options.sampler not in SOLVES:
    try:
      _process_figure(job, results / "process.png")
    except ConfigError as error:
      print(f"no process.png, the data cannot be read:\n{error}", flush=True)
  result = {
    "sampler": options.sampler,
    "num_samples": options.num_samples,
    "nfe": int(nfe.max()),
    "images_per_second": round(options.num_samples / seconds, 2),
    "seed": options.seed,
    "grid": "samples.png",
  }
  return _write(job, "sample", seconds, result)


def _process_figure(job: Job, path: Path, num_images: int = 6, num_frames: int = 11) -> None:
  """Forward noising of test images and reverse generation of samples, at the same noise levels."""
  experiment = job.experiment
  sde, split = experiment.sde, experiment.config.evaluation.split
  images = experiment.dataset.splits[split]["image"][:num_images]
  frames = np.asarray(
    experiment.trajectory(job.params, example_keys(job.key("sampling"), num_images))
  )
  times = np.asarray(experiment.times)
  position = np.linspace(0, len(times) - 1, num_frames).round().astype(int)
  log_snrs = np.asarray(log_snr(sde, jnp.asarray(times[position])))[::-1]
  x0 = experiment.transform.forward(jnp.asarray(images))
  noise = jax.random.normal(job.key("sampling"), x0.shape)
  forward = np.stack([perturb(sde, x0, noise, float(t)) for t in times[position][::-1]])
  figures.save_process(path, forward, frames[position], log_snrs, experiment.transform)


def _likelihood_table(job: Job) -> dict[str, np.ndarray]:
  """One row per image of the split, in its order: index, bits_per_dim, nfe, and the dequantized
  x.
  """
  experiment, options = job.experiment, job.experiment.config.likelihood
  transform, split = experiment.transform, experiment.dataset.splits[options.split]
  images = split["image"]
  key, tables = job.key("likelihood"), []
  for index, valid in _parts(len(images), options.batch_size, "likelihood"):
    keys = _keys(key, index)
    x = transform.dequantize(fold_in(keys, 0), jnp.asarray(images[index]))
    labels = jnp.asarray(split["label"][index])
    result = experiment.likelihood(job.params, fold_in(keys, 1), x, labels)
    bits = bits_per_dim(result.log_prob, experiment.num_dims, transform)
    table = {"index": index, "bits_per_dim": bits, "nfe": result.nfe, "x": x}
    tables.append({name: np.asarray(column)[:valid] for name, column in table.items()})
  table = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
  failed = table["index"][~np.isfinite(table["bits_per_dim"])]
  if len(failed):
    raise RunError(
      f"{len(failed)} of {len(images)} solves failed (images {failed[:10].tolist()} ...).\n"
      f"  mend:  raise likelihood.max_steps ({options.max_steps}) or rtol ({options.rtol})"
    )
  return table


def run_likelihood(job: Job) -> dict[str, Any]:
  """Exact bits/dim of every image of a split, each once, uniformly dequantized, and the
  baseline's.
  """
  options = job.experiment.config.likelihood
  begin = time.perf_counter()
  table = _likelihood_table(job)
  seconds = time.perf_counter() - begin
  baseline = _baseline(job, table.pop("x"))
  path = job.workdir / "results" / "likelihood.npz"
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(path, **table, baseline_bits_per_dim=baseline)
  bits = table["bits_per_dim"].astype(np.float64)
  result = {
    "bits_per_dim": bits.mean(),
    "standard_error": _standard_error(bits),
    "num_examples": len(bits),
    "split": options.split,
    "dequantization": "uniform, one draw",
    "kind": "exact (probability-flow ODE)",
    "nfe_mean": float(table["nfe"].mean()),
    "nfe_max": int(table["nfe"].max()),
    "baseline_bits_per_dim": baseline.mean(),
    "baseline_standard_error": _standard_error(baseline),
    "baseline": "Gaussian mixture, 10 full-covariance components, dequantized training split",
    "gain_standard_error": _standard_error(bits - baseline),
    **{
      name: options[name] for name in ("divergence", "num_probes", "solver", "rtol", "atol", "seed")
    },
    "t_min": job.experiment.sde.t_min,
  }
  return _write(job, "likelihood", seconds, result)


def _baseline(job: Job, test: np.ndarray) -> np.ndarray:
  """Bits/dim of the Gaussian mixture on the same dequantized test values."""
  transform, train = job.experiment.transform, job.experiment.dataset.splits["train"]["image"]
  dequantized = transform.dequantize(fold_in(job.key("likelihood"), len(train)), jnp.asarray(train))
  log_prob = mixture_log_prob(np.asarray(dequantized), test)
  return np.asarray(bits_per_dim(log_prob, job.experiment.num_dims, transform), np.float64)


def _standard_error(values: np.ndarray) -> float:
  """Standard error of the mean of independent values."""
  return float(values.std(ddof=1) / np.sqrt(len(values)))


def run_evaluate(job: Job) -> dict[str, Any]:
  """Denoising loss of a held-out split per noise level, beside predictors without a network."""
  experiment, options = job.experiment, job.experiment.config.evaluation
  sde, dataset, key = experiment.sde, experiment.dataset, job.key("evaluation")
  begin = time.perf_counter()
  log_snrs = jnp.linspace(log_snr(sde, sde.t_min), log_snr(sde, sde.t_max), options.num_levels)
  times = time_of_log_snr(sde, log_snrs)

  @jax.jit
  def levels(params, k, labels):
    x0, noise_fn = dataset.transform.dequantize(fold_in(key, 0), k), experiment.noise_fn(params)
    given = lambda x, t, _: noise_fn(x, t, experiment.labels(labels))
    return loss_per_level(fold_in(key, 1), sde, given, x0, times, options.num_draws)

  split = jax.device_put(dataset.splits[options.split])
  losses = np.asarray(levels(job.params, split["image"], split["label"]), np.float64)
  train = dataset.transform.dequantize(
    fold_in(key, 2), jnp.asarray(dataset.splits["train"]["image"])
  )
  gaussian = gaussian_predictor_loss(sde, np.asarray(train), times)
  curves = {
    f"network ({options.split})": losses.mean(1),
    "best Gaussian predictor": gaussian,
    "predict nothing": np.ones(len(times)),
  }
  path = job.workdir / "results" / "loss_per_noise_level.png"
  figures.save_loss_per_level(path, np.asarray(log_snrs), curves)
  columns = np.asarray(log_snrs), np.asarray(times), losses.mean(1), gaussian
  names = "log_snr", "time", "loss", "gaussian_predictor_loss"
  result = {
    "split": options.split,
    "num_examples": losses.shape[1],
    "loss": losses.mean(),
    "standard_error": _standard_error(losses.mean(0)),
    "gaussian_predictor_loss": gaussian.mean(),
    "trivial_predictor_loss": 1.0,
    "levels": [dict(zip(names, map(float, row))) for row in zip(*columns)],
    "nfe": options.num_draws * options.num_levels,
    "seed": options.seed,
  }
  return _write(job, "evaluate", time.perf_counter() - begin, result)


# mode: its job
JOBS: dict[str, Callable[[Job], dict[str, Any]]] = {
  "sample": run_sample,
  "likelihood": run_likelihood,
  "evaluate": run_evaluate,
}
