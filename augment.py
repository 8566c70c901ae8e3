"""Random flips, and the augmentation whose parameters the network is told, so that it does not leak
into the samples (Karras et al. 2022, appendix F.2).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from sde_lib import Keys, example_keys

SCALE_STD = 0.2  # of the base-2 logarithm of both kinds of scaling
TRANSLATION_STD = 0.125  # of the height and the width
MOST_SHRUNK = 2  # the filter is widened up to this factor, beyond it there is aliasing


def flip(keys: Keys, x: Num[Array, "b h w c"]) -> Num[Array, "b h w c"]:
  """Mirrors each image left to right with probability 1/2, by one key or one per example."""
  mirror = lambda key, image: jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
  return jax.vmap(mirror)(example_keys(keys, len(x)), x)


def augment(
  keys: Keys, x: Float[Array, "b h w c"], probability: float | Float[Array, ""]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b 9"]]:
  """Images under random affine maps, and the conditions [b, 9] that say which: the geometric
  pipeline of Karras et al. 2022, table 6, each transformation with `probability`.

  `keys` is one key or one per example. With probability 0, x comes back bit for bit.
  """
  draw = lambda key: draw_conditions(key, probability)
  conditions = jax.vmap(draw)(example_keys(keys, len(x)))
  return transform(x, conditions), conditions


def draw_conditions(
  key: Key[Array, ""], probability: float | Float[Array, ""]
) -> Float[Array, "9"]:
  """The conditions of one image, in the order of the published networks, 0 for what does not
  happen.

  0: mirrored left to right: by a fair coin for every image, unless `probability` is 0.
  1: mirrored top to bottom: by a fair coin.
  2: w of the enlargement by 2^(0.2 w), w ~ N(0, 1).
  3, 4: cos a - 1 and sin a of the counter-clockwise rotation by a, uniform on the circle.
  5, 6: w cos r and w sin r of the enlargement by 2^(0.2 w) along an axis and by its inverse across
    it, w ~ N(0, 1); the axis is at r = 0, or with probability 1/2 at r uniform on the circle. As
    (w, r) and (-w, r + pi) have the same conditions, the map is that of the pair with cos r > 0; in
    the published code it is either, with the same law of images and of conditions.
  7, 8: shifts to the right and down in eighths of the width and height, N(0, 1) each.
  """
  coins, events, normals, angles = jax.random.split(key, 4)
  x_flip, y_flip, tilted = jax.random.bernoulli(coins, shape=(3,)).astype(jnp.float32)
  happens = (jax.random.uniform(events, (5,)) < probability).astype(jnp.float32)
  flipped, scaled, rotated, stretched, shifted = happens
  scale, stretch, *shifts = jax.random.normal(normals, (4,))
  angle, tilt = jax.random.uniform(angles, (2,), minval=-1) * math.pi
  angle, tilt, stretch = rotated * angle, tilted * tilt, stretched * stretch
  conditions = [(jnp.asarray(probability) > 0) * x_flip, flipped * y_flip, scaled * scale]
  conditions += [jnp.cos(angle) - 1, jnp.sin(angle)]
  conditions += [stretch * jnp.cos(tilt), stretch * jnp.sin(tilt)]
  return jnp.stack([*conditions, *(shifted * shift for shift in shifts)])


def affine(
  conditions: Float[Array, "9"], height: int, width: int
) -> tuple[Float[Array, "2 2"], Float[Array, "2"]]:
  """(A, d) of the map that the conditions of one image describe: the pixel at (x, y), from the
  centre to the right and down, comes from A (x, y) + d.
  """
  x_flip, y_flip, scale, cos_less_1, sin, *axis, right, down = conditions
  cos, one = 1 + cos_less_1, jnp.ones_like(sin)
  sign = jnp.where(axis[0] < 0, -one, one)
  stretch, tilt = sign * jnp.hypot(*axis), jnp.arctan2(sign * axis[1], jnp.abs(axis[0]))
  rotate = jnp.array([[cos, -sin], [sin, cos]])
  turn = jnp.array([[jnp.cos(tilt), -jnp.sin(tilt)], [jnp.sin(tilt), jnp.cos(tilt)]])
  flips = jnp.diag(jnp.array([1 - 2 * x_flip, 1 - 2 * y_flip]))
  squeeze = jnp.diag(jnp.exp2(-SCALE_STD * jnp.array([stretch, -stretch])))
  with jax.default_matmul_precision("highest"):
    linear = jnp.exp2(-SCALE_STD * scale) * (flips @ rotate @ turn.T @ squeeze @ turn)
    return linear, -linear @ (TRANSLATION_STD * jnp.array([right * width, down * height]))


def transform(
  x: Float[Array, "b h w c"], conditions: Float[Array, "b 9"]
) -> Float[Array, "b h w c"]:
  """The images under the maps that their conditions describe, resampled once, the pixels outside
  reflected without end.

  By cubic convolution (Keys 1981, a = -1/2), widened along each axis of the image by as much as the
  map shrinks it: permutations of the pixels are exact. The published code doubles the image with
  the wavelet sym6, interpolates linearly and halves it with the same filter; it flips before.
  """
  return jax.vmap(_resample)(x, conditions)


def _resample(image, conditions):
  """The image [h, w, c] at the places that its pixels come from."""
  size = image.shape[:2]
  linear, shift = affine(conditions, *size)
  y, x = (jnp.arange(n) - (n - 1) / 2 for n in size)
  places = [row[0] * x[None] + row[1] * y[:, None] + d for row, d in zip(linear, shift)]
  (columns, of_columns), (rows, of_rows) = (
    _taps(place + (n - 1) / 2, n, jnp.linalg.norm(row))
    for place, n, row in zip(places, size[::-1], linear)
  )
  weights = of_rows[:, None] * of_columns[None]
  pixels = image[rows[:, None], columns[None]]
  return (weights[..., None] * pixels).sum((0, 1)).astype(image.dtype)


def _taps(place, n: int, shrinking):
  """The pixels [k, h, w] along an axis of n that make up the value at `place` [h, w], and their
  weights.
  """
  stretch = jnp.clip(shrinking, 1, MOST_SHRUNK)
  offsets = jnp.arange(1 - 2 * MOST_SHRUNK, 1 + 2 * MOST_SHRUNK)[:, None, None]
  index = jnp.floor(place).astype(jnp.int32)[None] + offsets
  weights = _cubic((index - place[None]) / stretch)
  mirrored = index % max(1, 2 * (n - 1))
  return jnp.minimum(mirrored, 2 * (n - 1) - mirrored), weights / weights.sum(0, keepdims=True)


def _cubic(d):
  """Keys 1981, equation 15: 1 at 0, 0 at the other integers, exact for parabolas."""
  d = jnp.abs(d)
  near, far = (1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
  return jnp.where(d < 1, near, jnp.where(d < 2, far, 0))
