"""Blocks shared by the U-Nets: time embedding, residual block, attention, resampling."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def variance_scaling(scale: float = 1.0):
  """Uniform fan-average initialiser of Ho et al. 2020; scale 0 means 1e-10, nearly zero output."""
  return nn.initializers.variance_scaling(max(scale, 1e-10), "fan_avg", "uniform")


def conv(
  features: int, kernel: int = 3, *, stride: int = 1, scale: float = 1.0, name: str | None = None
) -> nn.Conv:
  """Square convolution with the initialisation of Ho et al. 2020."""
  return nn.Conv(
    features, (kernel, kernel), (stride, stride), kernel_init=variance_scaling(scale), name=name
  )


def dense(features: int, *, scale: float = 1.0, name: str | None = None) -> nn.Dense:
  """Linear map over the last axis with the initialisation of Ho et al. 2020."""
  return nn.Dense(features, kernel_init=variance_scaling(scale), name=name)


def group_norm(channels: int, name: str | None = None) -> nn.GroupNorm:
  """GroupNorm with as many groups as divide the channels, at most 32 and each of at least 4
  channels.
  """
  most = min(32, max(1, channels // 4))
  return nn.GroupNorm(
    next(groups for groups in range(most, 0, -1) if channels % groups == 0), name=name
  )


def sinusoidal_embedding(
  c_noise: Float[Array, " b"], dim: int, max_period: float = 10000.0
) -> Float[Array, "b dim"]:
  """[sin, cos] at `dim` / 2 geometric frequencies from 1 to 1 / max_period (Vaswani et al. 2017,
  section 3.5).
  """
  half = dim // 2
  frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half) / (half - 1))
  angles = c_noise[:, None] * frequencies[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def check_size(size: tuple[int, ...], factor: int) -> None:
  """Raises a ValueError that names the nearest legal sizes unless each side divides by `factor`."""
  for side in size:
    if side % factor:
      below, above = side // factor * factor, (side // factor + 1) * factor
      nearest = f"{below} or {above}" if below else f"{above}"
      raise ValueError(
        f"image size {size} cannot be halved {factor.bit_length() - 1} times: every side must be a "
        f"multiple of {factor}; nearest to {side}: {nearest}, or make ch_mult shorter"
      )


class ResnetBlock(nn.Module):
  """Two normalised 3x3 convolutions with a time shift between them and a residual connection (Ho et
  al. 2020, appendix B).
  """

  features: int
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"] | None, train: bool
  ) -> Float[Array, "b h w f"]:
    """Returns [b, h, w, features]; `embedding` [b, e] or None for a network blind to time."""
    h = conv(self.features)(nn.swish(group_norm(x.shape[-1])(x)))
    if embedding is not None:
      h += dense(self.features)(nn.swish(embedding))[:, None, None, :]
    h = nn.swish(group_norm(self.features)(h))
    h = conv(self.features, scale=0.0)(nn.Dropout(self.dropout)(h, deterministic=not train))
    return h + (x if x.shape[-1] == self.features else dense(self.features, name="shortcut")(x))


class AttentionBlock(nn.Module):
  """Single-head self-attention over the pixels, residual (Ho et al. 2020, appendix B)."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Keeps the shape."""
    b, h, w, c = x.shape
    pixels = group_norm(c)(x).reshape(b, h * w, 1, c)
    query, key, value = (dense(c, name=n)(pixels) for n in ("query", "key", "value"))
    out = jax.nn.dot_product_attention(query, key, value).reshape(b, h, w, c)
    return x + dense(c, scale=0.0, name="out")(out)


class Downsample(nn.Module):
  """Halves height and width: stride-2 convolution, or 2x2 average pooling."""

  with_conv: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """[b, h, w, c] -> [b, h / 2, w / 2, c]."""
    return conv(x.shape[-1], stride=2)(x) if self.with_conv else nn.avg_pool(x, (2, 2), (2, 2))


class Upsample(nn.Module):
  """Doubles height and width: nearest neighbour, then a convolution by option."""

  with_conv: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """[b, h, w, c] -> [b, 2 h, 2 w, c]."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return conv(x.shape[-1])(x) if self.with_conv else x
