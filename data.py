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
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Array, Float, Integer
from ml_collections import ConfigDict

from errors import check, invalid, lookup
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


class Spec(NamedTuple):
  """What a data set declares, known without loading it. Height and width 0: the images are resized
  to `data.image_size`.
  """

  shape: tuple[int, int, int]
  levels: int = 256
  num_classes: int = 0
  splits: tuple[str, ...] = ("train", "test")


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
  SPEC = Spec((8, 8, 1), levels=17, num_classes=10)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "image": tfds.features.Tensor(shape=self.SPEC.shape, dtype=np.uint8),
      "label": tfds.features.ClassLabel(num_classes=self.SPEC.num_classes),
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


RESIZED = (0, 0, 3)
HELD_OUT = ("train", "validation")

# name: what is known of it; only those in `BUILDERS` can be loaded
DECLARED = {
  "tfds:mnist": Spec((28, 28, 1), num_classes=10),
  "tfds:cifar10": Spec((32, 32, 3), num_classes=10),
  "tfds:celeb_a": Spec(RESIZED, splits=("train", "validation", "test")),
  "tfds:celeb_a_hq/256": Spec((256, 256, 3), splits=("train",)),
  "tfds:celeb_a_hq/1024": Spec((1024, 1024, 3), splits=("train",)),
  "tfds:lsun/bedroom": Spec(RESIZED, splits=HELD_OUT),
  "tfds:lsun/church_outdoor": Spec(RESIZED, splits=HELD_OUT),
  "tfds:lsun/tower": Spec(RESIZED, splits=HELD_OUT),
  "tfds:downsampled_imagenet/64x64": Spec((64, 64, 3), splits=HELD_OUT),
  "tfds:imagenet2012": Spec(RESIZED, num_classes=1000, splits=HELD_OUT),
  "ffhq": Spec(RESIZED, splits=("train",)),
  "afhqv2": Spec(RESIZED),
} | {name: builder.SPEC for name, builder in BUILDERS.items()}


def declared(settings: ConfigDict) -> Spec:
  """What the data set of `config.data` declares, its images of the size that they are resized
  to.
  """
  spec, size = lookup(DECLARED, settings.name, "data.name"), settings.image_size
  if spec.shape[0]:
    legal = f"0: the images of {settings.name!r} are not resized"
    check(size in (0, spec.shape[0]), "data.image_size", size, legal)
    return spec
  legal = f"a size in pixels: the images of {settings.name!r} are resized"
  check(size > 0, "data.image_size", size, legal)
  return spec._replace(shape=(size, size, spec.shape[2]))


def transform_of(name: str, centered: bool = True) -> Transform:
  """The transform of the data set `name`, to [-1, 1], or to [0, 1] unless `centered`."""
  return Transform(lookup(DECLARED, name, "data.name").levels, low=-1.0 if centered else 0.0)


def load(settings: ConfigDict) -> DataSet:
  """Reads the data set of `config.data`, preparing it in `data.dir` (array_record, no TensorFlow)
  the first time.
  """
  name, spec = settings.name, declared(settings)
  if name not in BUILDERS:
    loadable = f"{', '.join(map(repr, sorted(BUILDERS)))}: the others are declared only"
    mend = "add a builder that reads your copy to data.BUILDERS; --mode=inspect needs no data"
    raise invalid("data.name", name, loadable, mend)
  data_dir = os.path.abspath(os.path.expanduser(settings.dir))
  try:
    os.makedirs(data_dir, exist_ok=True)
    builder = BUILDERS[name](data_dir=data_dir, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
      tfds.disable_progress_bar()
      builder.download_and_prepare()
  except OSError as error:
    legal = f"a folder that can be written ({error})"
    raise invalid("data.dir", data_dir, legal, "set --config.data.dir to another") from error
  sources = tfds.data_source(builder.name, data_dir=data_dir, download=False)
  splits = {split: _in_memory(source) for split, source in sources.items()}
  return DataSet(name, splits, transform_of(name, settings.centered), spec.num_classes)


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
