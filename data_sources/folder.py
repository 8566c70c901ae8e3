"""Folders of images: folder:<path>. Sub-folders are classes, or splits if one is called train."""

import collections
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from data_sources import cache
from data_sources.images import CHANNELS, READ_AS, Framing, in_parallel
from data_sources.spec import Spec, Split
from errors import ConfigError, check

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
COMMON = 0.9  # share of the images that must have one size, for the others to be left out
# what loses nothing: a file in the mode of the key may become one of these
WIDENS = {"L": ("L", "RGB", "RGBA"), "RGB": ("RGB", "RGBA"), "RGBA": ("RGBA",)}


class File(NamedTuple):
  """An image file: its path below the folder, with what tells whether it changed."""

  path: str
  num_bytes: int
  mtime: int


class Place(NamedTuple):
  """Split and class of a file; the class is "" where it lies in none."""

  split: str
  label: str


def declared(settings: ConfigDict, path: str, labelled: bool = True) -> Spec:
  """Shape, classes and splits, from the cache or a scan of the folder."""
  return cache.declared(settings, _source(settings, path, labelled))


def read(settings: ConfigDict, path: str, labelled: bool = True) -> tuple[Spec, dict[str, Split]]:
  """The images, memory-mapped. Without `labelled` sub-folders are no classes."""
  return cache.read(settings, _source(settings, path, labelled))


def _source(settings: ConfigDict, path: str, labelled: bool) -> cache.Source:
  root = Path(os.path.abspath(os.path.expanduser(path)))
  check(root.is_dir(), "data.name", settings.name, f"an existing folder; {root} is none")
  files = _listing(root)
  legal = f"a folder with images ({', '.join(SUFFIXES)}); {root} has none"
  check(bool(files), "data.name", settings.name, legal)
  framing = Framing.of(settings)
  contents = functools.partial(_contents, root, files, framing, labelled, settings.name)
  return cache.Source(f"folder-{root.name}", (files, framing, labelled), contents)


def _listing(root: Path) -> tuple[File, ...]:
  """Every file below `root` with the suffix of an image, sorted by path."""
  found = []
  for folder, _, names in os.walk(root, followlinks=True):
    for name in names:
      if name.lower().endswith(SUFFIXES):
        path = Path(folder, name)
        about = path.stat() if path.exists() else os.lstat(path)
        found.append(File(path.relative_to(root).as_posix(), about.st_size, int(about.st_mtime)))
  return tuple(sorted(found))


def _places(files: tuple[File, ...], labelled: bool) -> dict[str, Place | str]:
  """{path: its place, or why it has none}."""
  parts = {file.path: file.path.split("/") for file in files}
  tops = {p[0] for p in parts.values() if len(p) > 1}
  divided = "train" in tops and (len(tops) == 1 or tops & (SPLITS.keys() - {"train"}))
  below = {path: p[1:] if divided else p for path, p in parts.items()}
  in_folders = any(len(p) > 1 for p in below.values())

  def place(path: str) -> Place | str:
    if divided and parts[path][0] not in SPLITS:
      return "beside the folders of the splits"
    if labelled and in_folders and len(below[path]) == 1:
      return "beside the folders of the classes"
    label = below[path][0] if labelled and in_folders else ""
    return Place(SPLITS[parts[path][0]] if divided else "train", label)

  return {path: place(path) for path in parts}


def _header(path: Path) -> tuple[str, tuple[int, int]] | str:
  """Mode as it is read and size of an image file, or why it is unusable."""
  try:
    with warnings.catch_warnings(), Image.open(path) as image:
      warnings.simplefilter("ignore")
      mode, size = READ_AS.get(image.mode), image.size
      image.verify()
      return (mode, size) if mode else f"mode {image.mode} is not supported"
  except Exception as error:  # Pillow raises many kinds for broken files
    return _reason(error, path)


def _reason(error: Exception, path: Path) -> str:
  return f"{type(error).__name__}: {error}".replace(f"'{path}'", "").replace("\n", " ")


@functools.lru_cache(1)  # `declared` and `read` both ask
def _contents(root, files, framing: Framing, labelled: bool, name: str) -> cache.Contents:
  """What a scan of the folder finds."""
  places = _places(files, labelled)
  paths = [path for path in places if isinstance(places[path], Place)]
  headers = dict(zip(paths, in_parallel(lambda path: _header(root / path), paths)))
  usable = {path: header for path, header in headers.items() if not isinstance(header, str)}
  reasons = {path: why for path, why in (places | headers).items() if isinstance(why, str)}
  if not usable:
    lines = "".join(f"\n  {path}: {why}" for path, why in list(reasons.items())[: cache.SHOWN])
    raise ConfigError(f"data.name = {name!r}: no usable image in {root}{lines}")

  mode = collections.Counter(mode for mode, _ in usable.values()).most_common(1)[0][0]
  size = (0, 0) if framing.size or framing.crop else _common_size(usable, name)
  for path, (own, (width, height)) in usable.items():
    if mode not in WIDENS[own]:
      reasons[path] = f"mode {own}, most are {mode}"
    elif size not in ((0, 0), (width, height)):
      reasons[path] = f"{width}x{height} pixels, most are {size[0]}x{size[1]}"

  good = {path: places[path] for path in paths if path not in reasons}
  labels = sorted({place.label for place in good.values()})
  classes = tuple(labels) if len(labels) > 1 else ()
  splits = tuple(
    s for s in dict.fromkeys(SPLITS.values()) if any(p.split == s for p in good.values())
  )
  shape = framing.shape((size[1], size[0], CHANNELS[mode]), name)
  return cache.Contents(
    Spec(shape, 256, len(classes), splits),
    {split: sum(place.split == split for place in good.values()) for split in splits},
    functools.partial(_chunks, root, good, classes, framing, mode),
    classes,
    tuple(f"{path}: {why}" for path, why in sorted(reasons.items())),
  )


def _common_size(headers: dict, name: str) -> tuple[int, int]:
  """The size of nearly all images."""
  sizes = collections.Counter(size for _, size in headers.values()).most_common(5)
  listed = ", ".join(f"{w}x{h} ({n})" for (w, h), n in sizes)
  legal = f"a size in pixels: the images of {name!r} differ in size, most often {listed}"
  check(sizes[0][1] >= COMMON * len(headers), "data.image_size", 0, legal)
  return sizes[0][0]


def _chunks(root: Path, good: dict[str, Place], classes, framing, mode) -> Iterator:
  """The decoded images split by split; what cannot be decoded is a line of text."""

  def decode(path: str):
    try:
      with Image.open(root / path) as image:
        return framing.apply(image.convert(mode))
    except Exception as error:  # as in `_header`
      return f"{path}: {_reason(error, root / path)}"

  index = {name: i for i, name in enumerate(classes)}
  for split in dict.fromkeys(place.split for place in good.values()):
    paths = [path for path, place in good.items() if place.split == split]
    for first, (path, image) in enumerate(zip(paths, in_parallel(decode, paths))):
      if isinstance(image, str):
        yield image
      else:
        label = np.array([index[good[path].label]]) if classes else None
        yield cache.Chunk(split, first, image[None], label)
