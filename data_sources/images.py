"""Decoding, cropping and resizing of images, by the conventions of published work."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from errors import check, lookup

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
# modes of Pillow that are read as another
READ_AS = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "RGBA"} | {
  mode: mode for mode in CHANNELS
}


def central_crop(image: Image.Image, size: int) -> Image.Image:
  """The central square of `size` pixels."""
  left, top = ((side - size) // 2 for side in image.size)
  return image.crop((left, top, left + size, top + size))


def _to_shorter_side(image: Image.Image, size: int, kernel: Image.Resampling) -> Image.Image:
  scale = size / min(image.size)
  return image.resize(tuple(round(side * scale) for side in image.size), kernel)


def _resize_then_crop(image, size, kernel):
  return central_crop(_to_shorter_side(image, size, kernel), size)


def _lanczos(image, size):
  """Karras et al. 2022, appendix F.3 (dataset tool, `center-crop`)."""
  square = central_crop(image, min(image.size))
  return square.resize((size, size), Image.Resampling.LANCZOS)


def _adm(image, size):
  """Dhariwal & Nichol 2021 (image_datasets.py): halved by boxes, then bicubic."""
  while min(image.size) >= 2 * size:
    image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
  return _resize_then_crop(image, size, Image.Resampling.BICUBIC)


# name: (image, size) -> a square image; Pillow's kernels widen when they shrink (no aliasing)
RESIZES = {
  "bilinear": functools.partial(_resize_then_crop, kernel=Image.Resampling.BILINEAR),
  "bicubic": functools.partial(_resize_then_crop, kernel=Image.Resampling.BICUBIC),
  "lanczos": _lanczos,
  "adm": _adm,
}


class Framing(NamedTuple):
  """image -> uint8 [h, w, c], its centre cropped, then resized, as `config.data` says; 0: not."""

  crop: int
  size: int
  resize: str

  @classmethod
  def of(cls, settings: ConfigDict) -> "Framing":
    """The framing of `config.data`."""
    lookup(RESIZES, settings.resize, "data.resize")
    check(settings.levels in (0, 256), "data.levels", settings.levels, "0 or 256: images are bytes")
    for name in ("crop", "image_size"):
      check(
        settings[name] >= 0, f"data.{name}", settings[name], "a number of pixels, or 0 for none"
      )
    return cls(settings.crop, settings.image_size, settings.resize)

  def shape(self, shape: tuple[int, int, int], name: str) -> tuple[int, int, int]:
    """The shape after framing images of `shape`; height and width 0 are unknown."""
    height, width, channels = shape
    legal = f"at most {min(height, width)}, the shorter side of the images of {name!r}"
    check(not height or self.crop <= min(height, width), "data.crop", self.crop, legal)
    size = self.size or self.crop
    legal = f"a size in pixels: the images of {name!r} differ in size"
    check(bool(size or height), "data.image_size", size, legal)
    return (size, size, channels) if size else shape

  def apply(self, image: Image.Image) -> np.ndarray:
    """The framed image; a ValueError if it is smaller than the crop."""
    if self.crop:
      if self.crop > min(image.size):
        raise ValueError(f"{image.width}x{image.height} pixels, fewer than data.crop")
      image = central_crop(image, self.crop)
    if self.size:
      image = RESIZES[self.resize](image, self.size)
    return np.asarray(image).reshape(image.height, image.width, -1)


def from_array(array: np.ndarray) -> Image.Image:
  """The Pillow image of uint8 [h, w, c]."""
  return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def in_parallel(function: Callable, source: Iterable) -> Iterator:
  """`function` of every element, in order, by one thread for each core."""
  options = grain.ReadOptions(num_threads=os.cpu_count(), prefetch_buffer_size=64)
  return iter(grain.MapDataset.source(source).map(function).to_iter_dataset(options))
