"""Data sets and their transform: tensorflow-datasets prepares array_record files, grain shuffles
and batches.

Nothing here imports TensorFlow. Dequantization is no part of loading: it belongs to the likelihood
and the loss.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Array, Float, Integer

from errors import invalid, lookup
from sde_lib import Keys, example_keys

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
  """Integers 0 .. levels - 1 to [low, high]: each value owns a bin of the same width."""

  levels: int
  low: float = -1.0
  high: float = 1.0

  @property
  def bin_width(self) -> float:
    """Width of one value's bin in model units; its logarithm is the bits/dim offset."""
    return (self.high - self.low) / self.levels

  def forward(self, k: Integer[Array, "b *d"]) -> Float[Array, "b *d"]:
    """The centres of the bins."""
    return self.low + (k.astype(jnp.float32) + 0.5) * self.bin_width

  def dequantize(self, key: Keys, k: Integer[Array, "b *d"]) -> Float[Array, "b *d"]:
    """A uniform draw from each value's bin (Theis et al. 2016, section 3.1); `key` is one key or
    one per example.
    """
    u = jax.vmap(lambda key: jax.random.uniform(key, k.shape[1:]))(example_keys(key, k.shape[0]))
    # float32 would round k + u up into the next bin
    return self.low + (k.astype(jnp.float32) + jnp.minimum(u, 1 - 2.0**-14)) * self.bin_width

  def inverse(self, x: Float[Array, "b *d"]) -> Integer[Array, "b *d"]:
    """The value whose bin holds x; values outside [low, high] go to the nearest bin."""
    return jnp.clip(jnp.floor((x - self.low) / self.bin_width), 0, self.levels - 1).astype(
      jnp.int32
    )


@dataclasses.dataclass(frozen=True)
class DataSet:
  """Splits held in memory (name -> {"image": uint8 [n, h, w, c], "label": [n]}) and what they
  declare.
  """

  name: str
  splits: dict[str, Batch]
  transform: Transform
  num_classes: int

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one example."""
    return next(iter(self.splits.values()))["image"].shape[1:]


class Digits(tfds.core.GeneratorBasedBuilder):
  """The handwritten digits that scikit-learn ships: 1,797 images of 8x8 pixels, 17 grey levels, 10
  classes.

  Optical Recognition of Handwritten Digits, Alpaydin & Kaynak 1998, UCI repository (CC BY 4.0). The
  first 1,500 images are the training split, the last 297 the test split.
  """

  VERSION = tfds.core.Version("1.0.0")
  LEVELS = 17

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
      "label": tfds.features.ClassLabel(num_classes=10),
    }
    return tfds.core.DatasetInfo(
      builder=self, description=self.__doc__, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 1500), "test": self._generate_examples(1500, 1797)}

  def _generate_examples(self, start, stop):
    from sklearn.datasets import load_digits  # only while preparing: the import takes a second

    digits = load_digits()
    for i in range(start, stop):
      yield (
        i,
        {"image": digits.images[i].astype(np.uint8)[..., None], "label": int(digits.target[i])},
      )


# name: the builder whose array_record files are read
BUILDERS = {"digits": Digits}


def transform_of(name: str) -> Transform:
  """The transform that the data set `name` declares."""
  return Transform(lookup(BUILDERS, name, "data.name").LEVELS)


def load(name: str, data_dir: str) -> DataSet:
  """Reads the data set `name` from `data_dir`, preparing it there (array_record, no TensorFlow) the
  first time.
  """
  builder_class = lookup(BUILDERS, name, "data.name")
  data_dir = os.path.abspath(os.path.expanduser(data_dir))
  try:
    os.makedirs(data_dir, exist_ok=True)
    builder = builder_class(data_dir=data_dir, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
      tfds.disable_progress_bar()
      builder.download_and_prepare()
  except OSError as error:
    legal = f"a folder that can be written ({error})"
    raise invalid("data.dir", data_dir, legal, "set --config.data.dir to another") from error
  sources = tfds.data_source(builder.name, data_dir=data_dir, download=False)
  splits = {split: _in_memory(source) for split, source in sources.items()}
  return DataSet(name, splits, transform_of(name), builder.info.features["label"].num_classes)


def batches(split: Batch, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
  """Endless shuffled batches of this host's part, each epoch a new permutation of the whole split.

  The k-th batch is a function of (seed, k) alone, so `start`, the number of batches already taken,
  resumes exactly, on any number of hosts. Indices are shuffled and batched first, then gathered at
  once.

  Args:
    batch_size: the global batch; every host gets batch_size / num_hosts examples.
  """
  host, num_hosts = jax.process_index(), jax.process_count()
  order = grain.MapDataset.range(len(split["image"])).seed(seed).shuffle().repeat()[host::num_hosts]
  gathered = order.batch(batch_size // num_hosts, drop_remainder=True).map(
    lambda i: {k: v[i] for k, v in split.items()}
  )
  iterator = iter(
    gathered.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
  )
  iterator.set_state({"next_index": start})
  return iterator


def _in_memory(source) -> Batch:
  """All examples of a tfds data source, stacked."""
  examples = source.__getitems__(list(range(len(source))))
  return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
