"""tensorflow-datasets without TensorFlow: tfds:<name>, prepared as array_record, or read from the
archives as they were published.
"""

import contextlib
import functools
import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from data_sources import cache
from data_sources.images import CHANNELS, Framing, from_array, in_parallel
from data_sources.spec import Spec, Split, with_held_out
from errors import ConfigError, check, invalid

UNKNOWN = (0, 0, 3)
HELD_OUT = ("train", "validation")

# name: what is known of it before it is here
DECLARED = {
  "mnist": Spec((28, 28, 1), num_classes=10),
  "cifar10": Spec((32, 32, 3), num_classes=10),
  "celeb_a": Spec((218, 178, 3), splits=("train", "validation", "test")),
  "celeb_a_hq/256": Spec((256, 256, 3), splits=("train",)),
  "celeb_a_hq/1024": Spec((1024, 1024, 3), splits=("train",)),
  "lsun/bedroom": Spec(UNKNOWN, splits=HELD_OUT),
  "lsun/church_outdoor": Spec(UNKNOWN, splits=HELD_OUT),
  "lsun/tower": Spec(UNKNOWN, splits=HELD_OUT),
  "downsampled_imagenet/32x32": Spec((32, 32, 3), splits=HELD_OUT),
  "downsampled_imagenet/64x64": Spec((64, 64, 3), splits=HELD_OUT),
  "imagenet_resized/32x32": Spec((32, 32, 3), num_classes=1000, splits=HELD_OUT),
  "imagenet_resized/64x64": Spec((64, 64, 3), num_classes=1000, splits=HELD_OUT),
  "imagenet2012": Spec(UNKNOWN, num_classes=1000, splits=HELD_OUT),
}

Rows = Iterator[tuple[np.ndarray, np.ndarray | None]]  # images [k, h, w, c], labels [k]


class Archive(NamedTuple):
  """A data set as it was published: where, how many examples, and {split: (reader, its files)}."""

  url: str
  sizes: dict[str, int]
  splits: dict[str, tuple[Callable[[list[Path]], Rows], tuple[str, ...]]]

  def files(self) -> list[str]:
    """All files, each once."""
    return sorted({name for _, names in self.splits.values() for name in names})


def _cifar10(kind: str, paths: list[Path]) -> Rows:
  """One byte of class, then 32 x 32 pixels of each channel."""
  with tarfile.open(paths[0]) as tar:
    names = sorted(name for name in tar.getnames() if Path(name).match(f"{kind}_batch*.bin"))
    for name in names:
      rows = np.frombuffer(tar.extractfile(name).read(), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
      yield rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]


def _mnist(paths: list[Path]) -> Rows:
  """IDX: a header of 4 and of 2 big-endian integers, then bytes."""
  pixels, labels = (gzip.decompress(path.read_bytes()) for path in paths)
  yield (
    np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28, 1),
    np.frombuffer(labels, np.uint8, offset=8),
  )


def _imagenet_npz(size: int, paths: list[Path]) -> Rows:
  """Chrabaszcz et al. 2017: archives of .npz batches with `data` [n, 3 h w] and `labels` from 1."""
  for path in paths:
    with zipfile.ZipFile(path) as archive:
      for name in sorted(n for n in archive.namelist() if n.endswith(".npz")):
        with archive.open(name) as file, np.load(file) as batch:
          pixels = batch["data"].reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
          yield pixels, batch["labels"] - 1


def _imagenet_tar(paths: list[Path]) -> Rows:
  """van den Oord et al. 2016: a tar archive of PNG files."""
  with tarfile.open(paths[0], "r|*") as tar:
    for member in tar:
      if member.isfile():
        with Image.open(tar.extractfile(member)) as image:
          yield np.asarray(image.convert("RGB"))[None], None


def _imagenet_resized(size: int) -> Archive:
  parts = ("part1_", "part2_") if size == 64 else ("",)
  read = functools.partial(_imagenet_npz, size)
  train = tuple(f"Imagenet{size}_train_{part}npz.zip" for part in parts)
  return Archive(
    "https://image-net.org/data/downsample/",
    {"train": 1_281_167, "validation": 50_000},
    {"train": (read, train), "validation": (read, (f"Imagenet{size}_val_npz.zip",))},
  )


def _downsampled_imagenet(size: int) -> Archive:
  names = {"train": f"train_{size}x{size}.tar", "validation": f"valid_{size}x{size}.tar"}
  return Archive(
    "https://image-net.org/small/",
    {"train": 1_281_149, "validation": 49_999},
    {split: (_imagenet_tar, (name,)) for split, name in names.items()},
  )


CIFAR10_FILES = ("cifar-10-binary.tar.gz",)
ARCHIVES = {
  "cifar10": Archive(
    "https://www.cs.toronto.edu/~kriz/",
    {"train": 50_000, "test": 10_000},
    {
      "train": (functools.partial(_cifar10, "data"), CIFAR10_FILES),
      "test": (functools.partial(_cifar10, "test"), CIFAR10_FILES),
    },
  ),
  "mnist": Archive(
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    {"train": 60_000, "test": 10_000},
    {
      "train": (_mnist, ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")),
      "test": (_mnist, ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")),
    },
  ),
  "imagenet_resized/32x32": _imagenet_resized(32),
  "imagenet_resized/64x64": _imagenet_resized(64),
  "downsampled_imagenet/32x32": _downsampled_imagenet(32),
  "downsampled_imagenet/64x64": _downsampled_imagenet(64),
}


def declared(settings: ConfigDict, name: str) -> Spec:
  """What is known of a data set: from `DECLARED`, its prepared files, or its builder."""
  spec = DECLARED.get(name) or _spec(_builder(settings, name) or _code(settings, name), settings)
  return spec._replace(
    shape=Framing.of(settings).shape(spec.shape, settings.name),
    splits=with_held_out(spec.splits, settings.held_out),
  )


def read(settings: ConfigDict, name: str) -> tuple[Spec, dict[str, Split]]:
  """The images, memory-mapped."""
  archive, manual = ARCHIVES.get(name), cache.data_dir(settings) / "manual"
  if archive and all((manual / file).is_file() for file in archive.files()):
    return cache.read(settings, _from_archive(settings, name, archive, manual))
  builder = _builder(settings, name)
  if builder is None:
    raise _how_to_prepare(settings, name)
  if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
    raise _how_to_prepare(settings, name, builder.info.file_format.value)
  return cache.read(settings, _from_builder(settings, name, builder))


def _how_to_prepare(settings: ConfigDict, name: str, file_format: str = "") -> ConfigError:
  """The error of a data set that is not in data.dir, or in another `file_format`."""
  folder, ways = str(cache.data_dir(settings)), []
  found = f"is prepared as {file_format}, not as array_record," if file_format else "is not"
  # TFDS refuses to prepare beside another format
  target = f"{folder}/array_record" if file_format else folder
  if name in ARCHIVES:
    files = "".join(f"\n        {ARCHIVES[name].url}{file}" for file in ARCHIVES[name].files())
    ways.append(f"put the published files into {folder}/manual:{files}")
  ways += [
    "prepare it once, which needs TensorFlow (training does not), in any environment:\n"
    "        pip install tensorflow-cpu tensorflow-datasets array_record importlib_resources\n"
    f'        python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
    f"data_dir={target!r}, file_format='array_record').download_and_prepare()\""
    + (f"\n        then --config.data.dir={target}" if file_format else ""),
    "if you have it already: --config.data.dir=<folder with your prepared copy>, or "
    "--config.data.name=folder:<path> with its images",
  ]
  listed = "".join(f"\n    {i}. {way}" for i, way in enumerate(ways, 1))
  return ConfigError(
    f"data.name = {settings.name!r} {found} in data.dir = {folder!r}.\n  mend:{listed}"
  )


def _from_archive(settings, name: str, archive: Archive, manual: Path) -> cache.Source:
  framing, about = Framing.of(settings), [(manual / file).stat() for file in archive.files()]
  key = (framing, [(a.st_size, int(a.st_mtime)) for a in about])

  def chunks() -> Iterator[cache.Chunk]:
    for split, (read, files) in archive.splits.items():
      first = 0
      for images, labels in read([manual / file for file in files]):
        yield cache.Chunk(split, first, _framed(images, framing), labels)
        first += len(images)

  spec = DECLARED[name]._replace(shape=framing.shape(DECLARED[name].shape, settings.name))
  contents = lambda: cache.Contents(spec, archive.sizes, chunks)
  return cache.Source(f"tfds-{name.replace('/', '-')}", key, contents)


def _framed(images: np.ndarray, framing: Framing) -> np.ndarray:
  if not (framing.crop or framing.size):
    return images
  return np.stack([framing.apply(from_array(image)) for image in images])


def _builder(settings: ConfigDict, name: str) -> tfds.core.DatasetBuilder | None:
  """The reader of the prepared files below `data.dir`; it needs no code of the data set."""
  try:
    return tfds.core.read_only_builder.builder_from_files(
      name, data_dir=str(cache.data_dir(settings))
    )
  except tfds.core.DatasetNotFoundError:
    return None


def _code(settings: ConfigDict, name: str) -> tfds.core.DatasetBuilder:
  """The builder that describes a data set that is not prepared."""
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # a banner where TensorFlow is not installed
      return tfds.builder(name)
  except tfds.core.DatasetNotFoundError as error:
    legal = "tfds:<name> with a name that tensorflow-datasets knows or data.dir holds prepared"
    raise invalid("data.name", settings.name, legal, "check the name") from error
  except ModuleNotFoundError as error:  # there are builders that need TensorFlow to exist
    raise _how_to_prepare(settings, name) from error


def _spec(builder: tfds.core.DatasetBuilder, settings: ConfigDict) -> Spec:
  """Shape, classes and splits that a builder knows; a height or width that varies is 0."""
  features = dict(builder.info.features)
  image, label = features.get("image"), features.get("label")
  legal = f"a data set with a feature 'image' of bytes; it has {features}"
  good = image is not None and len(image.shape) == 3 and image.np_dtype == np.uint8
  check(good and image.shape[2] in CHANNELS.values(), "data.name", settings.name, legal)
  shape = image.shape if None not in image.shape else (0, 0, image.shape[2])
  num_classes = getattr(label, "num_classes", None) or 0
  return Spec(shape, 256, num_classes, tuple(builder.info.splits) or ("train", "test"))


def _from_builder(settings, name: str, builder: tfds.core.DatasetBuilder) -> cache.Source:
  framing, spec = Framing.of(settings), _spec(builder, settings)
  sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
  stored = (Path(builder.data_dir) / "dataset_info.json").stat()
  key = (framing, builder.info.full_name, sizes, stored.st_size, int(stored.st_mtime))

  def example(row: dict) -> tuple:
    return framing.apply(from_array(row["image"])), row.get("label")

  def chunks() -> Iterator[cache.Chunk]:
    for split in sizes:
      rows = in_parallel(example, builder.as_data_source(split))
      for first, (image, label) in enumerate(rows):
        yield cache.Chunk(split, first, image[None], None if label is None else np.array([label]))

  framed = spec._replace(shape=framing.shape(spec.shape, settings.name))
  contents = lambda: cache.Contents(framed, sizes, chunks)
  return cache.Source(f"tfds-{name.replace('/', '-')}", key, contents)
