"""Blocks shared by the U-Nets: time embedding, residual block, attention, resampling.

The axes between batch and channels, `*hw`, are those of an image or of a sequence.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import fir
from models.layers.conv import Conv
from models.layers.norm import GroupNorm


def variance_scaling(scale: float = 1.0):
  """Uniform fan-average initialiser of Ho et al. 2020; scale 0 means 1e-10, nearly zero output."""
  return nn.initializers.variance_scaling(max(scale, 1e-10), "fan_avg", "uniform")


def conv(
  features: int,
  kernel: int = 3,
  *,
  rank: int = 2,
  stride: int = 1,
  scale: float = 1.0,
  padding: str = "SAME",
  dtype: str | None = None,
  name: str | None = None,
) -> Conv:
  """Convolution over `rank` axes alike, with the initialisation of Ho et al. 2020."""
  init = variance_scaling(scale)
  size, strides = (kernel,) * rank, (stride,) * rank
  return Conv(features, size, strides, padding, kernel_init=init, dtype=dtype, name=name)


def dense(
  features: int, *, scale: float = 1.0, dtype: str | None = None, name: str | None = None
) -> nn.Dense:
  """Linear map over the last axis with the initialisation of Ho et al. 2020."""
  return nn.Dense(features, kernel_init=variance_scaling(scale), dtype=dtype, name=name)


def group_norm(
  channels: int, name: str | None = None, *, group_size: int = 4, dtype: str | None = None
) -> GroupNorm:
  """GroupNorm with as many groups as divide the channels, at most 32 and each of at least
  `group_size` channels.
  """
  most = min(32, max(1, channels // group_size))
  groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
  return GroupNorm(groups, dtype=dtype, name=name)


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


def noise_embedding(
  features: Float[Array, "b f"],
  width: int,
  num_classes: int,
  labels: Int[Array, " b"] | None,
  dtype: str | None = None,
) -> Float[Array, "b e"]:
  """[b, width]: two linear maps of the features of time and, where the network has classes, the
  label's vector; for use inside a compact method. Labels None: the class after the last.
  """
  embedding = dense(width, dtype=dtype)(features)
  embedding = dense(width, dtype=dtype)(nn.swish(embedding))
  if num_classes:
    init = variance_scaling()
    table = nn.Embed(num_classes + 1, width, dtype=dtype, embedding_init=init, name="classes")
    embedding += table(jnp.full(len(features), num_classes) if labels is None else labels)
  return embedding


def augmented(
  features: Float[Array, "b f"],
  augment_dim: int,
  augmentation: Float[Array, "b n"] | None,
  *,
  init: nn.initializers.Initializer | None = None,
  dtype: str | None = None,
) -> Float[Array, "b f"]:
  """The features of time plus a linear map of the conditions that tell how the images were
  augmented (Karras et al. 2022, appendix F.2), for use inside a compact method. None is zero: not
  at all; there is no bias, so that it adds nothing.
  """
  check_augmentation(augment_dim, augmentation)
  if not augment_dim:
    return features
  if augmentation is None:
    augmentation = jnp.zeros((len(features), augment_dim))
  options = {"kernel_init": init or variance_scaling(), "dtype": dtype, "name": "augmentation"}
  return features + nn.Dense(features.shape[-1], use_bias=False, **options)(augmentation)


def check_augmentation(augment_dim: int, augmentation: Float[Array, "b n"] | None) -> None:
  """Raises a ValueError unless conditions, where given, are as many as the network takes."""
  if augmentation is not None and augmentation.shape[-1] != augment_dim:
    given = augmentation.shape[-1]
    raise ValueError(
      f"the network was given {given} conditions of the augmentation and takes {augment_dim}: set "
      f"model.args.augment_dim={given} (and model.args.conditional=True)"
    )


def call_block(block: nn.Module, h, embedding, train: bool, *, remat: bool = False):
  """block(h, embedding, train); with `remat` its activations are computed again in the backward
  pass instead of stored. Names of parameters are the same either way.
  """
  run = lambda block, h, embedding: block(h, embedding, train)
  return (nn.remat(run) if remat else run)(block, h, embedding)


def add(x: Float[Array, "*d"], h: Float[Array, "*d"], rescale: bool) -> Float[Array, "*d"]:
  """x + h, divided by sqrt(2) with `rescale` (Song et al. 2021, appendix H.1)."""
  return (x + h) * math.sqrt(0.5) if rescale else x + h


class ResnetBlock(nn.Module):
  """Two normalised convolutions of width 3 with a time shift between them and a residual connection
  (Ho et al. 2020, appendix B).

  Attributes:
    skip_rescale: divide the sum by sqrt(2).
    init_scale: of the last convolution.
    group_size: fewest channels in a normalisation group.
    dtype: of the computation; None follows the input.
  """

  features: int
  dropout: float = 0.0
  skip_rescale: bool = False
  init_scale: float = 0.0
  group_size: int = 4
  dtype: str | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "b *hw c"], embedding: Float[Array, "b e"] | None, train: bool
  ) -> Float[Array, "b *hw f"]:
    """Returns [b, *hw, features]; `embedding` [b, e] or None for a network blind to time."""
    norm = lambda h: group_norm(h.shape[-1], group_size=self.group_size, dtype=self.dtype)(h)
    rank = x.ndim - 2
    h = conv(self.features, rank=rank, dtype=self.dtype)(nn.swish(norm(x)))
    if embedding is not None:
      shift = dense(self.features, dtype=self.dtype)(nn.swish(embedding))
      h += jnp.expand_dims(shift, range(1, rank + 1))
    h = nn.Dropout(self.dropout)(nn.swish(norm(h)), deterministic=not train)
    h = conv(self.features, rank=rank, scale=self.init_scale, dtype=self.dtype)(h)
    if x.shape[-1] != self.features:
      x = dense(self.features, dtype=self.dtype, name="shortcut")(x)
    return add(x, h, self.skip_rescale)


class AttentionBlock(nn.Module):
  """Single-head self-attention over the pixels, residual (Ho et al. 2020, appendix B).

  Attributes:
    skip_rescale, group_size, dtype: as for `ResnetBlock`.
    init_scale: of the output map.
    qkv_scale: of the maps to query, key and value.
  """

  skip_rescale: bool = False
  init_scale: float = 0.0
  qkv_scale: float = 1.0
  group_size: int = 4
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b *hw c"]) -> Float[Array, "b *hw c"]:
    """Keeps the shape."""
    b, c = x.shape[0], x.shape[-1]
    pixels = group_norm(c, group_size=self.group_size, dtype=self.dtype)(x).reshape(b, -1, 1, c)
    query, key, value = (
      dense(c, scale=self.qkv_scale, dtype=self.dtype, name=name)(pixels)
      for name in ("query", "key", "value")
    )
    out = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
    out = dense(c, scale=self.init_scale, dtype=self.dtype, name="out")(out)
    return add(x, out, self.skip_rescale)


class Downsample(nn.Module):
  """Halves every axis: stride-2 convolution, or averages of pairs; with a filter before it.

  Attributes:
    features: channels after the convolution, None keeps them.
    fir_kernel: one axis of the anti-aliasing filter, None for no filter.
  """

  with_conv: bool = True
  features: int | None = None
  fir_kernel: fir.Taps | None = None
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b *hw c"]) -> Float[Array, "b *hw2 f"]:
    """[b, h, ..., c] -> [b, h / 2, ..., features]."""
    if not self.with_conv:
      return fir.downsample(x, self.fir_kernel or (1, 1))
    if self.fir_kernel:
      x = fir.smooth(x, self.fir_kernel)
    padding = "VALID" if self.fir_kernel else "SAME"
    features = self.features or x.shape[-1]
    rank = x.ndim - 2
    return conv(features, rank=rank, stride=2, padding=padding, dtype=self.dtype)(x)


class Upsample(nn.Module):
  """Doubles every axis: nearest neighbour or filtered, then a convolution by option.

  Attributes: as for `Downsample`.
  """

  with_conv: bool = True
  features: int | None = None
  fir_kernel: fir.Taps | None = None
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b *hw c"]) -> Float[Array, "b *hw2 f"]:
    """[b, h, ..., c] -> [b, 2 h, ..., features]."""
    features = self.features or x.shape[-1]
    filtered_conv = bool(self.with_conv and self.fir_kernel)
    x = fir.upsample(x, self.fir_kernel or (1, 1), margin=int(filtered_conv))
    if not self.with_conv:
      return x
    padding = "VALID" if filtered_conv else "SAME"
    return conv(features, rank=x.ndim - 2, padding=padding, dtype=self.dtype)(x)
