"""The modes after training: sample, likelihood, evaluate; each writes pictures and one JSON record
into `results/`.
"""

import functools
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import devices
import settings
from errors import ConfigError, RunError
from evaluation import figures
from evaluation.batches import draw_samples, keys_of, labels_of, parts, spread
from evaluation.denoising import HeldOut, gaussian_predictor_loss
from evaluation.mixture import mixture_log_prob
from evaluation.records import SECTIONS, result_path
from evaluation.trained import Job
from experiment import SOLVES, Experiment
from likelihood import bits_per_dim
from sde_lib import example_keys, fold_in, log_snr, perturb

PACKAGES = ("jax", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")


# the predictors without a network: examples that they are fitted to, most dimensions of an example
FITTED, LARGEST_MIXTURE, LARGEST_GAUSSIAN = 10_000, 512, 4096


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
  if not devices.is_first():
    return record
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.is_file():
    old = json.loads(path.read_text())
    if old["config_digest"] != record["config_digest"] or old["checkpoint_step"] != job.step:
      path.rename(
        path.with_name(f"{mode}-step{old['checkpoint_step']}-{old['config_digest']}.json")
      )
  settings.write_text(path, json.dumps(record, indent=2) + "\n")
  return record


def run_sample(job: Job) -> dict[str, Any]:
  """Draws `sampling.num_samples` examples: a picture, the values as npz, and the picture of both
  processes.
  """
  experiment, options = job.experiment, job.experiment.config.sampling
  begin = time.perf_counter()
  x, nfe = draw_samples(experiment, job.params, job.key("sampling"), options.num_samples)
  seconds = time.perf_counter() - begin
  if devices.is_first():
    transform, results = experiment.transform, job.workdir / "results"
    figures.save_samples(results / "samples.png", x, transform)
    values = np.asarray(transform.inverse(jnp.asarray(x)))
    np.savez_compressed(results / "samples.npz", image=values.astype(experiment.spec.dtype))
    if options.sampler not in SOLVES and len(experiment.spec.shape) == 3:
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
  experiment, params = job.experiment, devices.to_host(job.params)
  sde, split = experiment.sde, experiment.config.evaluation.split
  images = experiment.dataset.splits[split]["image"]
  images = images[spread(len(images), num_images)]
  frames = np.asarray(experiment.trajectory(params, example_keys(job.key("sampling"), num_images)))
  times = np.asarray(experiment.times)
  position = np.linspace(0, len(times) - 1, num_frames).round().astype(int)
  log_snrs = np.asarray(log_snr(sde, jnp.asarray(times[position])))[::-1]
  x0 = experiment.transform.forward(jnp.asarray(images))
  noise = jax.random.normal(job.key("sampling"), x0.shape)
  forward = np.stack([perturb(sde, x0, noise, float(t)) for t in times[position][::-1]])
  figures.save_process(path, forward, frames[position], log_snrs, experiment.transform)


def _likelihood_table(job: Job) -> dict[str, np.ndarray]:
  """One row per example of the split, in its order: index, log_prob, nfe, and the dequantized x."""
  experiment, options = job.experiment, job.experiment.config.likelihood
  split, key, tables = experiment.dataset.splits[options.split], job.key("likelihood"), []
  total = len(split["image"])
  for index, valid in parts(total, options.batch_size, "likelihood"):
    keys = keys_of(key, index)
    x = experiment.transform.dequantize(fold_in(keys, 0), jnp.asarray(split["image"][index]))
    result = experiment.likelihood(job.params, fold_in(keys, 1), x, labels_of(split, index))
    table = {"index": index, "log_prob": result.log_prob, "nfe": result.nfe, "x": x}
    tables.append({name: devices.to_host(column)[:valid] for name, column in table.items()})
  table = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
  failed = table["index"][~np.isfinite(table["log_prob"])]
  if len(failed):
    raise RunError(
      f"{len(failed)} of {total} solves failed (examples {failed[:10].tolist()} ...).\n"
      f"  mend:  raise likelihood.max_steps ({options.max_steps}) or rtol ({options.rtol})"
    )
  return table


def _measure(experiment: Experiment) -> tuple[str, Callable]:
  """What a log-density is reported as: its name, and the function to it."""
  if not experiment.transform.levels:
    return "log_density_nats", lambda log_prob: np.asarray(log_prob, np.float64)
  bits = functools.partial(
    bits_per_dim, num_dims=experiment.num_dims, transform=experiment.transform
  )
  return "bits_per_dim", lambda log_prob: np.asarray(bits(jnp.asarray(log_prob)), np.float64)


def run_likelihood(job: Job) -> dict[str, Any]:
  """Exact bits/dim of every example of a split, each once, uniformly dequantized, and the
  baseline's; of continuous values the log-density in nats.
  """
  experiment, options = job.experiment, job.experiment.config.likelihood
  begin = time.perf_counter()
  table = _likelihood_table(job)
  seconds = time.perf_counter() - begin
  name, measure = _measure(experiment)
  values, baseline = measure(table.pop("log_prob")), _baseline(job, table.pop("x"), measure)
  if devices.is_first():
    path = job.workdir / "results" / "likelihood.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **table, **{name: values, f"baseline_{name}": baseline})
  result = {
    name: values.mean(),
    "standard_error": _standard_error(values),
    "num_examples": len(values),
    "split": options.split,
    "dequantization": "uniform, one draw" if experiment.transform.levels else "none",
    "kind": "exact (probability-flow ODE)",
    "nfe_mean": float(table["nfe"].mean()),
    "nfe_max": int(table["nfe"].max()),
    **{k: options[k] for k in ("divergence", "num_probes", "solver", "rtol", "atol", "seed")},
    "t_min": experiment.sde.t_min,
  }
  if len(baseline):
    result |= {
      f"baseline_{name}": baseline.mean(),
      "baseline_standard_error": _standard_error(baseline),
      "baseline": "Gaussian mixture, 10 full-covariance components, dequantized training split",
      "gain_standard_error": _standard_error(values - baseline),
    }
  return _write(job, "likelihood", seconds, result)


def _dequantized(job: Job, section: str, index: int) -> np.ndarray:
  """Training examples in model units, as many as a predictor without a network is fitted to."""
  train = job.experiment.dataset.splits["train"]["image"]
  train = train[spread(len(train), FITTED)]
  key = fold_in(job.key(section), index)
  return np.asarray(job.experiment.transform.dequantize(key, jnp.asarray(train)))


def _baseline(job: Job, test: np.ndarray, measure: Callable) -> np.ndarray:
  """The measure of the Gaussian mixture on the same values; empty for data of too many
  dimensions.
  """
  if job.experiment.num_dims > LARGEST_MIXTURE:
    return np.zeros(0)
  count = len(job.experiment.dataset.splits["train"]["image"])
  return measure(mixture_log_prob(_dequantized(job, "likelihood", count), test))


def _standard_error(values: np.ndarray) -> float:
  """Standard error of the mean of independent values."""
  return float(values.std(ddof=1) / np.sqrt(len(values)))


def run_evaluate(job: Job) -> dict[str, Any]:
  """Denoising loss of a held-out split per noise level, beside predictors without a network."""
  experiment, options = job.experiment, job.experiment.config.evaluation
  begin = time.perf_counter()
  held_out = HeldOut(experiment)
  losses, log_snrs, times = held_out.losses(job.params), held_out.log_snrs, held_out.times
  gaussian = np.full(len(times), np.nan)
  if experiment.num_dims <= LARGEST_GAUSSIAN:
    gaussian = gaussian_predictor_loss(experiment.sde, _dequantized(job, "evaluation", 2), times)
  curves = {
    f"network ({options.split})": losses.mean(0),
    "best Gaussian predictor": gaussian,
    "predict nothing": np.ones(len(times)),
  }
  if devices.is_first():
    path = job.workdir / "results" / "loss_per_noise_level.png"
    figures.save_loss_per_level(path, np.asarray(log_snrs), curves)
  columns = np.asarray(log_snrs), np.asarray(times), losses.mean(0), gaussian
  names = "log_snr", "time", "loss", "gaussian_predictor_loss"
  result = {
    "split": options.split,
    "num_examples": len(losses),
    "loss": losses.mean(),
    "standard_error": _standard_error(losses.mean(1)),
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
