"""Arrays of any shape: npy:<path> and npz:<path>, checked once and copied into the cache."""

import functools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from data_sources import cache
from data_sources.spec import Spec, Split, stored_as_is
from errors import check, invalid

DATA, LABELS = ("image", "x"), ("label", "y")
ROWS = 4096  # checked and copied at once


def declared(settings: ConfigDict, path: str) -> Spec:
  """Shape, levels, classes and splits of the arrays."""
  return stored_as_is(cache.declared(settings, _source(settings, path)), settings)


def read(settings: ConfigDict, path: str) -> tuple[Spec, dict[str, Split]]:
  """The arrays, memory-mapped."""
  return cache.read(settings, _source(settings, path))


def _source(settings: ConfigDict, path: str) -> cache.Source:
  file = Path(path).expanduser()
  check(file.is_file(), "data.name", settings.name, f"an existing file; {file} is none")
  about = file.stat()
  key = (str(file.resolve()), about.st_size, int(about.st_mtime), settings.levels)
  contents = functools.partial(_contents, file, *key[1:], settings.name)
  return cache.Source(f"{file.suffix[1:]}-{file.stem}", key, contents)


@functools.lru_cache(1)
def _contents(file: Path, _size: int, _mtime: int, levels: int, name: str) -> cache.Contents:
  """What the file holds; size and time of change are there for the memory of this function."""
  arrays = _open(file, name)
  keys = _splits(tuple(arrays), name)
  shapes = {split: arrays[image].shape for split, (image, _) in keys.items()}
  dtype = np.result_type(*(arrays[image].dtype for image, _ in keys.values()))
  integer = dtype.kind in "bui"
  legal = "arrays of integers, booleans or floats, the examples along the first axis"
  good = (integer or dtype.kind == "f") and all(shape and shape[0] for shape in shapes.values())
  check(good, "data.name", name, legal)
  legal = f"splits whose examples have one shape, not {shapes}"
  check(len({shape[1:] for shape in shapes.values()}) == 1, "data.name", name, legal)
  if integer:
    levels = levels or _levels(max(int(arrays[image].max()) for image, _ in keys.values()))
  labels = [arrays[label] for _, label in keys.values() if label]
  num_classes = max((int(label.max()) + 1 for label in labels), default=0)
  shape = _example_shape(next(iter(shapes.values())), integer)
  spec = Spec(shape, levels if integer else 0, num_classes, tuple(keys))
  sizes = {split: shape[0] for split, shape in shapes.items()}
  return cache.Contents(spec, sizes, functools.partial(_chunks, file, keys, spec, name))


def _open(file: Path, name: str) -> dict[str, np.ndarray]:
  """{name: array}; an .npy is memory-mapped and has the one name "image"."""
  try:
    loaded = np.load(file, mmap_mode="r")
    return {"image": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
  except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise invalid("data.name", name, f"a file that numpy.load reads ({error})") from error


def _splits(names: tuple[str, ...], name: str) -> dict[str, tuple[str, str | None]]:
  """{split: (name of the data, name of the labels)} of an archive: "image" or "x", also as
  "train_image" or "x_train"; a single array besides the labels may have any name.
  """
  found = {"data": {}, "labels": {}}
  others = []
  for key in names:
    split = "|".join(("train", "test", "validation"))
    match = re.fullmatch(rf"(?:({split})_)?({'|'.join(DATA + LABELS)})(?:_({split}))?", key)
    if match is None:
      others.append(key)
    else:
      kind = "data" if match[2] in DATA else "labels"
      found[kind].setdefault(match[1] or match[3] or "train", key)
  if not found["data"] and len(others) == 1:
    found["data"] = {"train": others[0]}
  legal = f"an archive with 'image' or 'x', or 'train_image', 'test_image'; it has {list(names)}"
  check(bool(found["data"]), "data.name", name, legal)
  return {split: (key, found["labels"].get(split)) for split, key in found["data"].items()}


def _levels(largest: int) -> int:
  """Levels of integers up to `largest`: 256 where they look like bytes."""
  return 256 if 128 <= largest < 256 else max(2, largest + 1)


def _example_shape(shape: tuple[int, ...], integer: bool) -> tuple[int, ...]:
  """Numbers become vectors of one, integers [n, h, w] grey images."""
  return (*shape[1:], 1) if len(shape) == 1 or (integer and len(shape) == 3) else shape[1:]


def _chunks(file: Path, keys: dict, spec: Spec, name: str) -> Iterator[cache.Chunk]:
  arrays = _open(file, name)
  for split, (image, label) in keys.items():
    data, labels = arrays[image], arrays[label] if label else None
    if spec.num_classes:
      _check_labels(labels, len(data), name, split)
    for first in range(0, len(data), ROWS):
      rows = np.asarray(data[first : first + ROWS])
      _check_values(rows, first, spec.levels, f"{name}, {split}")
      part = labels[first : first + ROWS] if spec.num_classes else None
      yield cache.Chunk(split, first, rows.reshape(len(rows), *spec.shape), part)


def _check_values(rows: np.ndarray, first: int, levels: int, name: str) -> None:
  """Raises for the first value that is not finite, or outside 0 .. levels - 1."""
  if levels:
    legal, good = f"integers in 0 .. {levels - 1}", (rows >= 0) & (rows < levels)
  else:
    with np.errstate(over="ignore"):
      legal, good = "finite numbers in float32", np.isfinite(rows.astype(np.float32))
  if not good.all():
    index = tuple(np.argwhere(~good)[0].tolist())
    where = (first + index[0], *index[1:])
    mend = "correct the data" + (", or set data.levels" if levels else "")
    raise invalid("data.name", name, f"{legal}; the value at index {where} is {rows[index]}", mend)


def _check_labels(labels: np.ndarray | None, num_examples: int, name: str, split: str) -> None:
  legal = f"one label for each of the {num_examples} examples of {split!r}, integers from 0 on"
  good = labels is not None and labels.shape == (num_examples,) and labels.dtype.kind in "ui"
  check(bool(good and labels.min() >= 0), "data.name", name, legal)
