"""The last step of the variational bound as a categorical law that is fitted to the training split:
each value's probability given the network's prediction of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import settings
from bounds import sum_dims
from data import Transform
from evaluation import files
from evaluation.batches import keys_of, labels_of, spread
from evaluation.trained import Job
from experiment import Experiment
from parameterization import data_from_noise
from sde_lib import SDE, normal, perturb

BINS = 8  # cells of the predicted value to a level
BESIDE = 2  # levels that a prediction may lie outside of the range
PRIOR = 0.02  # counts of every level in every cell before the data
EXAMPLES, DRAWS = 10_000, 8


def _cell(predicted: Array, transform: Transform) -> Array:
  """The row of the table that a predicted value, in model units, belongs to."""
  level = (predicted - transform.low) / transform.bin_width - 0.5
  row = jnp.round((level + BESIDE) * BINS).astype(int)
  return jnp.clip(row, 0, (transform.levels - 1 + 2 * BESIDE) * BINS)


def log_prob(
  table: Float[Array, "cells levels"],
  predicted: Float[Array, "b *d"],
  k: Array,
  transform: Transform,
) -> Float[Array, " b"]:
  """log p(k | predicted data), independent over the dimensions."""
  return sum_dims(table[_cell(predicted, transform), k.astype(int)])


def _fit(experiment: Experiment, chain: SDE, params: PyTree) -> np.ndarray:
  """log of the frequencies of each level in each cell."""
  train, transform = experiment.dataset.splits["train"], experiment.transform
  rows, size = spread(len(train["image"]), EXAMPLES), experiment.config.likelihood.batch_size
  counts = np.full(((transform.levels - 1 + 2 * BESIDE) * BINS + 1, transform.levels), PRIOR)

  @jax.jit
  def cells(params, keys, k, labels):
    t = jnp.full(len(k), chain.times[0])
    x = perturb(chain, transform.forward(k), normal(keys, k.shape), t)
    noise = experiment.noise_fn(params)(x, t, experiment.labels(labels))
    return _cell(data_from_noise(chain, x, noise, t), transform)

  params = jax.device_put(params)
  for draw in range(DRAWS):
    key = jax.random.key(experiment.config.seed + draw)
    for part in np.array_split(rows, max(1, len(rows) // size)):
      k = np.asarray(train["image"][part])
      found = cells(params, keys_of(key, part), k, labels_of(train, part))
      np.add.at(counts, (np.asarray(found).ravel(), k.astype(int).ravel()), 1)
  return np.log(counts / counts.sum(1, keepdims=True)).astype(np.float32)


def fitted(job: Job, chain: SDE, params: PyTree) -> np.ndarray:
  """The table of log p [cells, levels] for the network `params` of the host at the lowest level of
  the chain; the first host fits it once and the others wait for its file.
  """
  digest = settings.digest(job.experiment.config, "likelihood.num_levels")
  path = job.workdir / "results" / f"decoder-step{job.step}-{digest}.npy"
  fill = lambda file: np.save(file, _fit(job.experiment, chain, params))
  return np.load(files.made_once(path, fill))
