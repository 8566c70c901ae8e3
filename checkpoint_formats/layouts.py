"""How one array of a foreign checkpoint becomes one of ours: name and change of layout."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def same(array: np.ndarray) -> np.ndarray:
  """No change: biases, norms, tables."""
  return array


def conv(array: np.ndarray) -> np.ndarray:
  """PyTorch's convolution kernel [out, in, *window] -> [*window, in, out]."""
  return np.moveaxis(array, (0, 1), (-1, -2))


def dense(array: np.ndarray) -> np.ndarray:
  """PyTorch's linear map [out, in] or 1x1 convolution [out, in, 1, ...] -> [in, out]."""
  return array.reshape(array.shape[:2]).T


class Source(NamedTuple):
  """Where a parameter of ours comes from: the name in the file and the change of layout."""

  name: str
  layout: Callable[[np.ndarray], np.ndarray] = same


# a mapping is a function (model) -> {"path/of/our/parameter": Source}; paths as of
# flax.traverse_util.flatten_dict(params, sep="/")
