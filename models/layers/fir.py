"""Resampling of images with a small separable filter, without aliasing (Zhang 2019; StyleGAN2,
Karras et al. 2020).
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Taps = tuple[int | float, ...]  # filter of one axis, of any scale: it is normalised to sum 1


def upfirdn(
  x: Float[Array, "b *hw c"], taps: np.ndarray, *, up: int = 1, down: int = 1, pad=(0, 0)
) -> Float[Array, "b *hw2 c"]:
  """Along every axis between batch and channels: `up` - 1 zeros after each pixel, `pad` zeros
  before and after (a negative number crops), convolution with `taps`, every `down`-th pixel kept.

  Sums of shifted slices: shift-and-add is fast on every device, also in its gradients.
  """
  for axis in range(1, x.ndim - 1):
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (pad[0], pad[1] + up - 1, up - 1)
    x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    size = x.shape[axis] - len(taps) + 1
    shifted = (lax.slice_in_dim(x, i, i + size, down, axis) for i in range(len(taps)))
    x = sum(float(tap) * part for tap, part in zip(taps[::-1], shifted))
  return x


def _normalised(kernel: Taps) -> np.ndarray:
  return np.asarray(kernel, np.float64) / np.sum(kernel)


def upsample(
  x: Float[Array, "b *hw c"], kernel: Taps = (1, 1), margin: int = 0
) -> Float[Array, "b *hw2 c"]:
  """Twice the height and width (and `margin` pixels on every side, for an unpadded convolution to
  consume); the kernel (1, 1) is nearest neighbour.
  """
  excess = len(kernel) - 2
  pad = ((excess + 1) // 2 + 1 + margin, excess // 2 + margin)
  return upfirdn(x, 2 * _normalised(kernel), up=2, pad=pad)


def downsample(x: Float[Array, "b *hw c"], kernel: Taps = (1, 1)) -> Float[Array, "b *hw2 c"]:
  """Half the height and width; the kernel (1, 1) is the mean of 2 x 2 pixels."""
  excess = len(kernel) - 2
  return upfirdn(x, _normalised(kernel), down=2, pad=((excess + 1) // 2, excess // 2))


def smooth(x: Float[Array, "b *hw c"], kernel: Taps) -> Float[Array, "b *hw1 c"]:
  """Filtered, one pixel larger: what an unpadded 3 x 3 convolution of stride 2 halves."""
  return upfirdn(x, _normalised(kernel), pad=((len(kernel) + 1) // 2, len(kernel) // 2))
