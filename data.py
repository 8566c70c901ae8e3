"""Data sets, their transform to model units and their batches.

`data_sources/` reads; grain shuffles and batches. Nothing here imports TensorFlow. Dequantization
is no part of loading: it belongs to the likelihood and the loss.
"""

import dataclasses
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Num
from ml_collections import ConfigDict

from data_sources import arrays, digits, folder, published, tfds_source, toy
from data_sources.rows import Gather
from data_sources.spec import Spec
from errors import check, lookup
from sde_lib import Keys, example_keys

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
  """Integers 0 .. levels - 1 to [low, high]: each value owns a bin of the same width. With levels 0
  the values are continuous and stay as they are.
  """

  levels: int
  low: float = -1.0
  high: float = 1.0

  @property
  def bin_width(self) -> float:
    """Width of one value's bin in model units; its logarithm is the bits/dim offset."""
    if not self.levels:
      raise ValueError("continuous values have no bins: ask only where transform.levels > 0")
    return (self.high - self.low) / self.levels

  def forward(self, k: Num[Array, "b *d"]) -> Float[Array, "b *d"]:
    """The centres of the bins."""
    if not self.levels:
      return k.astype(jnp.float32)
    return self.low + (k.astype(jnp.float32) + 0.5) * self.bin_width

  def dequantize(self, key: Keys, k: Num[Array, "b *d"]) -> Float[Array, "b *d"]:
    """A uniform draw from each value's bin (Theis et al. 2016, section 3.1); `key` is one key or
    one per example.
    """
    if not self.levels:
      return k.astype(jnp.float32)
    u = jax.vmap(lambda key: jax.random.uniform(key, k.shape[1:]))(example_keys(key, k.shape[0]))
    # float32 would round k + u up into the next bin
    return self.low + (k.astype(jnp.float32) + jnp.minimum(u, 1 - 2.0**-14)) * self.bin_width

  def inverse(self, x: Float[Array, "b *d"]) -> Num[Array, "b *d"]:
    """The value whose bin holds x; values outside [low, high] go to the nearest bin."""
    if not self.levels:
      return x.astype(jnp.float32)
    return jnp.clip(jnp.floor((x - self.low) / self.bin_width), 0, self.levels - 1).astype(
      jnp.int32
    )


@dataclasses.dataclass(frozen=True)
class DataSet:
  """Splits (name -> {"image": [n, *d], "label": [n] where there are classes}), in memory or
  memory-mapped, with what they declare.
  """

  name: str
  splits: dict[str, Batch]
  transform: Transform
  num_classes: int

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one example."""
    return next(iter(self.splits.values()))["image"].shape[1:]

  @property
  def spec(self) -> Spec:
    """What the splits hold."""
    return Spec(self.shape, self.transform.levels, self.num_classes, tuple(self.splits))


# head of data.name: a module with `declared` and `read`, which are called with what follows
SOURCES = {
  "afhqv2": published,
  "digits": digits,
  "ffhq": published,
  "folder:": folder,
  "npy:": arrays,
  "npz:": arrays,
  "tfds:": tfds_source,
  "toy:": toy,
}


def _source(settings: ConfigDict):
  """(module, what follows the colon) of `data.name`."""
  head, colon, rest = settings.name.partition(":")
  return lookup(SOURCES, head + colon, "data.name"), rest


def declared(settings: ConfigDict) -> Spec:
  """What the data set of `config.data` declares, known without decoding it."""
  source, rest = _source(settings)
  return source.declared(settings, rest)


def transform_of(spec: Spec, centered: bool = True) -> Transform:
  """The transform of integers to [-1, 1], or to [0, 1] unless `centered`; none for continuous
  values.
  """
  return Transform(spec.levels, low=-1.0 if centered or not spec.levels else 0.0)


def load(settings: ConfigDict) -> DataSet:
  """The data set of `config.data`. Images and arrays are prepared once, below `data.dir`, and
  memory-mapped.
  """
  source, rest = _source(settings)
  expected = declared(settings)
  spec, splits = source.read(settings, rest)
  legal = f"a data set of {expected}; this copy holds {spec}"
  check(spec == expected, "data.name", settings.name, legal)
  return DataSet(settings.name, splits, transform_of(spec, settings.centered), spec.num_classes)


def batches(
  split: Batch, batch_size: int, seed: int, start: int = 0, *, num_workers: int = 0
) -> Iterator[Batch]:
  """Endless shuffled batches of this host's part, each epoch a new permutation of the whole split.

  The k-th batch is a function of (seed, k) alone, so `start`, the number of batches already taken,
  resumes exactly, on any number of hosts and workers. Indices are shuffled and batched first, then
  gathered at once.

  Args:
    batch_size: the global batch; every host gets batch_size / num_hosts examples.
    num_workers: processes that gather; 0 for one thread of this one, enough for small images.
  """
  host, num_hosts = jax.process_index(), jax.process_count()
  legal = f"a multiple of the {num_hosts} hosts"
  check(batch_size % num_hosts == 0, "training.batch_size", batch_size, legal)
  order = grain.MapDataset.range(len(split["image"])).seed(seed).shuffle().repeat()
  # hosts take turns by blocks: as the devices have them, one host's rows after the other's
  blocks = order.batch(batch_size // num_hosts, drop_remainder=True, batch_fn=np.asarray)
  indices = blocks[host::num_hosts]
  dataset = (
    indices[start:]
    .map(Gather(split).rows)
    .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
  )
  if num_workers:
    if not flags.FLAGS.is_parsed():  # grain reads its own; a library user has none
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=8)
    )
  return iter(dataset)
