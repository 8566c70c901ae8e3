"""The examples that conditional samples begin from: of a split, or of the user's own files."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from data import DataSet, Transform
from data_sources.folder import SUFFIXES
from data_sources.images import CHANNELS, READ_AS
from data_sources.spec import Spec
from errors import check, invalid
from evaluation.batches import spread

FIELD = "guidance.inputs"


def read(
  name: str,
  num_inputs: int,
  spec: Spec,
  transform: Transform,
  dataset_of: Callable[[], DataSet],
  *,
  grey: bool = False,
) -> Float[np.ndarray, "n *d"]:
  """At most `num_inputs` examples in model units, evenly spread over those that there are.

  Args:
    name: a split of the data set, or the path of an image file, of a folder of them (sorted), of an
      .npy file, or of an .npz file with the array "image". Image files have 256 levels, which are
      scaled to those of the data; arrays [n, *d] hold the data's own values 0 .. levels - 1, of
      continuous data any finite numbers. Write ./test for a folder that is called as a split.
    dataset_of: called for a split only.
    grey: grey images become images of three equal channels where the data have colours.
  """
  if name in spec.splits:
    images = dataset_of().splits[name]["image"]
    values = np.asarray(images[spread(len(images), num_inputs)])
  else:
    path = Path(name).expanduser()
    legal = f"one of the splits {', '.join(spec.splits)}, or the path of images or arrays"
    check(path.exists(), FIELD, name, f"{legal}; no such file")
    reader = _from_arrays if path.suffix in (".npy", ".npz") else _from_images
    values = reader(path, num_inputs, spec, grey)
  return np.asarray(transform.forward(jnp.asarray(values)), np.float32)


def _from_images(path: Path, num_inputs: int, spec: Spec, grey: bool) -> np.ndarray:
  """Image files as values 0 .. levels - 1 [n, h, w, c]."""
  good = len(spec.shape) == 3 and spec.levels > 0 and spec.shape[-1] in CHANNELS.values()
  legal = f"a split or an .npy file: examples of shape {spec.shape} and {spec.levels} levels are no"
  check(good, FIELD, str(path), f"{legal} image files")
  files = [path]
  if path.is_dir():
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    check(bool(files), FIELD, str(path), f"a folder with images ({', '.join(SUFFIXES)})")
  chosen = [files[i] for i in spread(len(files), num_inputs)]
  images = [_decoded(file, spec.shape[-1])[None] for file in chosen]
  values = [_of_shape(image, file, spec.shape, grey) for file, image in zip(chosen, images)]
  return np.round(np.concatenate(values) * ((spec.levels - 1) / 255)).astype(spec.dtype)


def _decoded(file: Path, channels: int) -> np.ndarray:
  """The image as uint8 [h, w, channels], in which nothing of it is lost; or [h, w, 1] where it is
  grey.
  """
  wanted = next(mode for mode, count in CHANNELS.items() if count == channels)
  try:
    with Image.open(file) as image:
      mode = READ_AS.get(image.mode)
      own = image.convert(mode) if mode else None
  except Exception as error:  # Pillow raises many kinds for broken files
    raise invalid(FIELD, str(file), f"an image file that can be read ({error})") from error
  legal = f"an image of 8 bits, grey or in colours; this one has Pillow's mode {image.mode}"
  check(own is not None, FIELD, str(file), legal, "save it as a PNG of 8 bits")
  if (mode, wanted) == ("L", "RGB"):
    wanted = mode
  image = own.convert(wanted)
  legal = "a grey image, as the data are" if wanted == "L" else "an image without transparency"
  check(np.array_equal(image.convert(mode), own), FIELD, str(file), f"{legal}; this one is none")
  return np.asarray(image).reshape(own.height, own.width, -1)


def _of_shape(values: np.ndarray, file: Path, shape: tuple[int, ...], grey: bool) -> np.ndarray:
  """`values` [n, *shape], grey ones as three equal channels where that is allowed."""
  found = values.shape[1:]
  size = f"{shape[1]}x{shape[0]} pixels" if len(shape) == 3 else ""
  if len(shape) == 3 and shape[-1] == 3 and found == (*shape[:-1], 1):
    mend = "take colour images; grey ones are for the operator colorization"
    check(grey, FIELD, str(file), f"images of shape {shape}; these are grey, {found}", mend)
    return values.repeat(3, -1)
  mend = f"resize to {size}" if len(found) == 3 and found[:2] != shape[:2] else ""
  check(found == shape, FIELD, str(file), f"examples of shape {shape}; these have {found}", mend)
  return values


def _from_arrays(path: Path, num_inputs: int, spec: Spec, grey: bool) -> np.ndarray:
  """The array of a file, checked to hold values of the data."""
  try:
    loaded = np.load(path, mmap_mode="r")
    names = getattr(loaded, "files", ())
    array = loaded["image"] if "image" in names else loaded
  except Exception as error:  # numpy raises many kinds for broken files
    raise invalid(FIELD, str(path), f"a file that numpy.load reads ({error})") from error
  legal = f"an .npz file with the array 'image'; it has {', '.join(names)}"
  check(isinstance(array, np.ndarray), FIELD, str(path), legal)
  check(array.ndim > 0 and len(array) > 0, FIELD, str(path), "an array of examples [n, *d]")
  values = np.asarray(array[spread(len(array), num_inputs)])
  if spec.levels and values.ndim == len(spec.shape) == 3:  # as data sources take grey images
    values = values[..., None]
  values = _of_shape(values, path, spec.shape, grey)
  kinds, legal = "fiu", "finite numbers"
  if spec.levels:
    kinds, legal = "biu", f"the data's own values, integers 0 .. {spec.levels - 1}"
  check(values.dtype.kind in kinds, FIELD, str(path), f"{legal}; these are {values.dtype}")
  least, most = float(values.min()), float(values.max())
  good = 0 <= least and most < spec.levels if spec.levels else np.isfinite(least + most)
  check(bool(good), FIELD, str(path), f"{legal}; these are {least:g} .. {most:g}")
  return values
