"""Any number of examples in batches of one size, each with a key that its index alone decides."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

import data
import devices
from errors import RunError
from experiment import Experiment


def spread(total: int, count: int) -> np.ndarray:
  """At most `count` of the indices 0 .. total - 1, evenly: data may be sorted by class."""
  count = min(total, count)
  return np.arange(count) * total // count


def parts(total: int, size: int, unit: str) -> Iterator[tuple[np.ndarray, int]]:
  """(indices [size], how many of them count) over 0 .. total - 1; the last part repeats its last
  index.
  """
  with tqdm(total=total, desc=unit, unit="image", disable=devices.no_bar()) as bar:
    for first in range(0, total, size):
      valid = min(size, total - first)
      yield np.minimum(first + np.arange(size), total - 1), valid
      bar.update(valid)


def keys_of(key: jax.Array, index: np.ndarray) -> jax.Array:
  """The keys of the examples with these global indices, as `example_keys` makes them."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(index))


def labels_of(split: data.Batch, index: np.ndarray) -> np.ndarray:
  """The labels of these examples, 0 where the data have none."""
  return split["label"][index] if "label" in split else np.zeros(len(index), np.int32)


def drawn(
  experiment: Experiment, params: PyTree, key: jax.Array, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(x [n, *d] in model units, network evaluations of each) of the samples with these indices, n of
  which the devices can share; sample i depends on (key, i) alone.
  """
  x, nfe = devices.to_host(experiment.sampler(params, keys_of(key, index)))
  if not np.isfinite(x).all():
    raise RunError(
      "the sampler left the finite numbers or hit max_steps; use more steps or a smaller tolerance"
    )
  return x, nfe


def draw_samples(
  experiment: Experiment, params: PyTree, key: jax.Array, num_samples: int
) -> tuple[np.ndarray, np.ndarray]:
  """The same of the samples 0 .. num_samples - 1, in batches of `sampling.batch_size`."""
  size, batches = experiment.config.sampling.batch_size, []
  for index, valid in parts(num_samples, size, "sampling"):
    batches.append([a[:valid] for a in drawn(experiment, params, key, index)])
  x, nfe = (np.concatenate(arrays) for arrays in zip(*batches))
  return x, nfe
