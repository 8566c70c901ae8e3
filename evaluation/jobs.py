"""The modes after training: sample, likelihood, evaluate; each writes pictures and one JSON record
into `results/`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import devices
from errors import ConfigError
from evaluation import (
  bits_per_dim,
  conditional,
  figures,
  sample_quality,
  samples,
  sweep,
  train_classifier,
)
from evaluation.batches import spread
from evaluation.denoising import HeldOut, gaussian_predictor_loss
from evaluation.evidence import standard_error
from evaluation.trained import Job, training_examples
from experiment import SOLVES
from sde_lib import example_keys, log_snr, perturb

LARGEST_GAUSSIAN = 4096  # dimensions of an example whose best Gaussian predictor is computed


def run_sample(job: Job) -> dict[str, Any]:
  """Carries out `guidance.task`, or draws `sampling.num_samples` examples: a picture, the values as
  npz, and the picture of both processes.
  """
  experiment, options = job.experiment, job.experiment.config.sampling
  if experiment.config.guidance.task != "none":
    return conditional.run(job)
  values, nfe, seconds, labels = samples.draw(job, options.num_samples)
  if devices.is_first():
    transform, results = experiment.transform, job.workdir / "results"
    x = np.asarray(transform.forward(jnp.asarray(values)))
    figures.save_samples(results / "samples.png", x, transform)
    columns = {} if labels is None else {"label": labels}
    np.savez_compressed(results / "samples.npz", image=values, **columns)
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
  return job.write("sample", seconds, result)


def _process_figure(job: Job, path: Path, num_images: int = 6, num_frames: int = 11) -> None:
  """Forward noising of test images and reverse generation of samples, at the same noise levels."""
  experiment, weights = job.experiment, devices.to_host(train_classifier.weights(job))
  sde, split = experiment.sde, experiment.config.evaluation.split
  images = experiment.dataset.splits[split]["image"]
  images = images[spread(len(images), num_images)]
  keys = example_keys(job.key("sampling"), num_images)
  labels = experiment.asked(keys, np.arange(num_images))
  frames = np.asarray(experiment.trajectory(weights, keys, labels))
  times = np.asarray(experiment.times)
  position = np.linspace(0, len(times) - 1, num_frames).round().astype(int)
  log_snrs = np.asarray(log_snr(sde, jnp.asarray(times[position])))[::-1]
  x0 = experiment.transform.forward(jnp.asarray(images))
  noise = jax.random.normal(job.key("sampling"), x0.shape)
  forward = np.stack([perturb(sde, x0, noise, float(t)) for t in times[position][::-1]])
  figures.save_process(path, forward, frames[position], log_snrs, experiment.transform)


def _held_out_loss(job: Job) -> dict[str, Any]:
  """The denoising loss of a held-out split per noise level, beside predictors without a network."""
  experiment, options = job.experiment, job.experiment.config.evaluation
  held_out = HeldOut(experiment)
  losses, log_snrs, times = held_out.losses(job.params), held_out.log_snrs, held_out.times
  gaussian = np.full(len(times), np.nan)
  if experiment.num_dims <= LARGEST_GAUSSIAN:
    gaussian = gaussian_predictor_loss(experiment.sde, training_examples(job), times)
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
  return {
    "split": options.split,
    "num_examples": len(losses),
    "loss": losses.mean(),
    "standard_error": standard_error(losses.mean(1)),
    "gaussian_predictor_loss": gaussian.mean(),
    "trivial_predictor_loss": 1.0,
    "levels": [dict(zip(names, map(float, row))) for row in zip(*columns)],
    "nfe": options.num_draws * options.num_levels,
    "seed": options.seed,
  }


def run_evaluate(job: Job) -> dict[str, Any]:
  """The denoising loss of a held-out split, and the quality of samples."""
  begin = time.perf_counter()
  prepared = sample_quality.plan(job.experiment, job.workdir)
  result = _held_out_loss(job)
  if prepared:
    result |= sample_quality.run(job, prepared)
    if any(job.experiment.config.evaluation.sweep.values()):
      sweep.run(job, prepared)
  return job.write("evaluate", time.perf_counter() - begin, result)


# mode: its job
JOBS: dict[str, Callable[[Job], dict[str, Any]]] = {
  "sample": run_sample,
  "likelihood": bits_per_dim.run,
  "evaluate": run_evaluate,
}
