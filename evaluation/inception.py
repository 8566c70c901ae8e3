"""The Inception network of all published FID figures, and the two ways to resize images for it.

It is the graph of 2015-12-05 ("Rethinking the Inception Architecture", Szegedy et al. 2016, with
1008 classes). It differs from the paper in one place: the pool of the last block is a maximum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Num

from models.layers.conv import Conv

SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008


class Layer(NamedTuple):
  """A convolution, into which its batch norm is folded, and a ReLU."""

  name: str
  features: int
  window: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"


class Branch(NamedTuple):
  """A pool, layers one after the other, and layers side by side at the end."""

  layers: tuple[Layer, ...] = ()
  fork: tuple[Layer, ...] = ()
  pool: str = "none"


# averages are of the pixels inside of the image
POOLS = {
  "none": lambda x: x,
  "average": lambda x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
  "maximum": lambda x: nn.max_pool(x, (3, 3), padding="SAME"),
  "halving": lambda x: nn.max_pool(x, (3, 3), (2, 2)),
}


def _wide(name: str, *features: int) -> Branch:
  """35x35 pixels: 1x1, then 5x5 or two 3x3."""
  window = (5, 5) if len(features) == 2 else (3, 3)
  layers = [Layer(f"{name}_{i + 1}", n, window) for i, n in enumerate(features)]
  return Branch((layers[0]._replace(window=(1, 1)), *layers[1:]))


def _factorised(name: str, windows: tuple[tuple[int, int], ...], width: int, last: int) -> Branch:
  """17x17 pixels: 1x1, then windows of one row or one column."""
  layers = [Layer(f"{name}_{i + 1}", width, w) for i, w in enumerate([(1, 1), *windows])]
  return Branch((*layers[:-1], layers[-1]._replace(features=last)))


def _forked(name: str, layers: tuple[Layer, ...], stage: int) -> Branch:
  """8x8 pixels: layers, then a row beside a column."""
  row = Layer(f"{name}_{stage}a", 384, (1, 3))
  return Branch(layers, (row, Layer(f"{name}_{stage}b", 384, (3, 1))))


def _pooled(pool: str, features: int) -> Branch:
  return Branch((Layer("branch_pool", features),), pool=pool)


def _a(features: int) -> tuple[Branch, ...]:
  return (
    Branch((Layer("branch1x1", 64),)),
    _wide("branch5x5", 48, 64),
    _wide("branch3x3dbl", 64, 96, 96),
    _pooled("average", features),
  )


def _c(width: int) -> tuple[Branch, ...]:
  row, column = (1, 7), (7, 1)
  return (
    Branch((Layer("branch1x1", 192),)),
    _factorised("branch7x7", (row, column), width, 192),
    _factorised("branch7x7dbl", (column, row, column, row), width, 192),
    _pooled("average", 192),
  )


def _e(pool: str) -> tuple[Branch, ...]:
  double = (Layer("branch3x3dbl_1", 448), Layer("branch3x3dbl_2", 384, (3, 3)))
  return (
    Branch((Layer("branch1x1", 320),)),
    _forked("branch3x3", (Layer("branch3x3_1", 384),), 2),
    _forked("branch3x3dbl", double, 3),
    _pooled(pool, 192),
  )


def _halve(layer: Layer) -> Layer:
  return layer._replace(window=(3, 3), stride=2, padding="VALID")


STEM = (
  Branch(
    (
      _halve(Layer("Conv2d_1a_3x3", 32)),
      Layer("Conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
      Layer("Conv2d_2b_3x3", 64, (3, 3)),
    )
  ),
  Branch(
    (Layer("Conv2d_3b_1x1", 80), Layer("Conv2d_4a_3x3", 192, (3, 3), padding="VALID")),
    pool="halving",
  ),
  Branch(pool="halving"),
)

BLOCKS = {
  "Mixed_5b": _a(32),
  "Mixed_5c": _a(64),
  "Mixed_5d": _a(64),
  "Mixed_6a": (
    Branch((_halve(Layer("branch3x3", 384)),)),
    Branch(
      (
        Layer("branch3x3dbl_1", 64),
        Layer("branch3x3dbl_2", 96, (3, 3)),
        _halve(Layer("branch3x3dbl_3", 96)),
      )
    ),
    Branch(pool="halving"),
  ),
  "Mixed_6b": _c(128),
  "Mixed_6c": _c(160),
  "Mixed_6d": _c(160),
  "Mixed_6e": _c(192),
  "Mixed_7a": (
    Branch((Layer("branch3x3_1", 192), _halve(Layer("branch3x3_2", 320)))),
    Branch(
      (
        Layer("branch7x7x3_1", 192),
        Layer("branch7x7x3_2", 192, (1, 7)),
        Layer("branch7x7x3_3", 192, (7, 1)),
        _halve(Layer("branch7x7x3_4", 192)),
      )
    ),
    Branch(pool="halving"),
  ),
  "Mixed_7b": _e("average"),
  "Mixed_7c": _e("maximum"),
}


class Inception(nn.Module):
  """The network in float32; its parameters have the names of the published PyTorch file, and come
  from `inception_weights`.
  """

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w 3"]
  ) -> tuple[Float[Array, "b 2048"], Float[Array, "b 1008"]]:
    """(features after the last average, logits without their biases, as the published Inception
    score takes them) of `scaled` images [b, 299, 299, 3].
    """
    for branch in STEM:
      (x,) = _run(branch, x, "")
    for name, branches in BLOCKS.items():
      parts = [part for branch in branches for part in _run(branch, x, f"{name}.")]
      x = jnp.concatenate(parts, axis=-1)
    features = x.mean((1, 2))
    return features, nn.Dense(NUM_CLASSES, use_bias=False, name="fc")(features)


def _run(branch: Branch, x: Array, block: str) -> list[Array]:
  """What the branch adds to the channels of its block."""

  def apply(layer, x):
    strides = (layer.stride, layer.stride)
    conv = Conv(layer.features, layer.window, strides, layer.padding, name=block + layer.name)
    return nn.relu(conv(x))

  x = POOLS[branch.pool](x)
  for layer in branch.layers:
    x = apply(layer, x)
  return [apply(layer, x) for layer in branch.fork] or [x]


def scaled(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """(x - 128) / 128 of values 0 .. 255, as in the graph. (The PyTorch port has x / 127.5 - 1.)"""
  return (x - 128) / 128


def _lerp(x: Array, axis: int) -> Array:
  """299 samples along an axis: number i lies at i n / 299, without half-pixel centres."""
  n = x.shape[axis]
  at = np.arange(SIZE, dtype=np.float32) * np.float32(n / SIZE)
  low = np.minimum(at.astype(np.int32), n - 1)
  below, above = (jnp.take(x, i, axis) for i in (low, np.minimum(low + 1, n - 1)))
  weight = (at - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
  return below + (above - below) * weight


def resize_published(x: Num[Array, "b h w c"]) -> Float[Array, "b 299 299 c"]:
  """As all published FID figures resize: `resize_bilinear` of TensorFlow 1, align_corners=False:
  two neighbours per axis however much smaller the image becomes.
  """
  return _lerp(_lerp(x.astype(jnp.float32), 2), 1)


def resize_clean(x: Num[Array, "b h w c"]) -> Float[Array, "b 299 299 c"]:
  """As "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (Parmar et al. 2022):
  Pillow's bicubic filter (a = -1/2), as wide as the image shrinks, in float, not clipped.
  """
  shape = (x.shape[0], SIZE, SIZE, x.shape[3])
  return jax.image.resize(x.astype(jnp.float32), shape, "cubic", antialias=True)
