"""Any number of examples in batches of one size, each with a key that its index alone decides."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import data
import devices
from errors import RunError
from experiment import Experiment, Weights


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
  experiment: Experiment, weights: Weights, key: jax.Array, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """(x [n, *d] in model units, network evaluations of each, classes asked for) of the samples with
  these indices, n of which the devices can share; sample i depends on (key, i) alone.
  """
  keys = keys_of(key, index)
  labels = experiment.asked(keys, index)
  x, nfe = devices.to_host(experiment.sampler(weights, keys, labels))
  check_finite(x)
  return x, nfe, None if labels is None else np.asarray(labels)


def check_finite(x: np.ndarray) -> None:
  """Raises unless the sampler stayed within the finite numbers."""
  if not np.isfinite(x).all():
    raise RunError(
      "the sampler left the finite numbers or hit max_steps; use more steps or a smaller tolerance"
    )


def draw_samples(
  experiment: Experiment, weights: Weights, key: jax.Array, num_samples: int
) -> np.ndarray:
  """x of the samples 0 .. num_samples - 1, in batches of `sampling.batch_size`."""
  size, batches = experiment.config.sampling.batch_size, []
  for index, valid in parts(num_samples, size, "sampling"):
    batches.append(drawn(experiment, weights, key, index)[0][:valid])
  return np.concatenate(batches)
