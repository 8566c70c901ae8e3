"""Blocks of iDDPM and ADM (Nichol & Dhariwal 2021; Dhariwal & Nichol 2021), and the downward half
of their U-Net that the network and the classifier share.

Parameters are float32 whatever `dtype`, the dtype of the computation; statistics of the norms,
softmax and the embedding's path stay float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from models.layers import unet
from models.layers.conv import Conv
from models.layers.norm import GroupNorm

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for weights
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
ZEROS = nn.initializers.zeros


def conv(
  features: int, *, name: str, stride: int = 1, init=UNIFORM, dtype: str = "float32"
) -> Conv:
  """3x3 convolution padded by one pixel on every side, also where the stride is 2."""
  pads, strides = ((1, 1), (1, 1)), (stride, stride)
  return Conv(features, (3, 3), strides, pads, kernel_init=init, dtype=dtype, name=name)


def dense(features: int, *, name: str, init=UNIFORM, dtype: str = "float32") -> nn.Dense:
  """Linear map over the last axis."""
  return nn.Dense(features, kernel_init=init, dtype=dtype, name=name)


def group_norm(channels: int, *, name: str, dtype: str = "float32") -> GroupNorm:
  """GroupNorm of 32 groups, or of the most that divide both 32 and the channels, eps 1e-5."""
  return GroupNorm(math.gcd(32, channels), epsilon=1e-5, dtype=dtype, name=name)


def timestep_embedding(c_noise: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
  """[cos, sin] at the `dim` / 2 frequencies 10000^(-i / (dim / 2)), i = 0, 1, ... (Nichol &
  Dhariwal 2021, released code); unlike `unet.sinusoidal_embedding` in order and last frequency.
  """
  half = dim // 2
  frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half) / half)
  angles = c_noise[:, None] * frequencies[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def count_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
  """`num_heads`, or where `num_head_channels` is not 0 as many heads of that width as the channels
  hold; a ValueError where the channels do not split evenly.
  """
  if channels % (num_head_channels or num_heads):
    wanted = f"heads of {num_head_channels}" if num_head_channels else f"{num_heads} equal heads"
    raise ValueError(f"attention over {channels} channels cannot be split into {wanted}")
  return channels // num_head_channels if num_head_channels else num_heads


def attend(qkv: Float[Array, "b n c3"], num_heads: int, split_first: bool) -> Float[Array, "b n c"]:
  """Multi-head self-attention over n positions.

  Args:
    qkv: queries, keys and values of all heads in one axis of 3 c channels.
    split_first: how that axis is laid out: [3, num_heads, c / num_heads] (ADM's "new attention
      order") or [num_heads, 3, c / num_heads] (iDDPM; ADM calls it legacy and has it by default).
  """
  b, n, c3 = qkv.shape
  layout = (3, num_heads) if split_first else (num_heads, 3)
  parts = jnp.moveaxis(qkv.reshape(b, n, *layout, -1), 2 if split_first else 3, 0)
  return jax.nn.dot_product_attention(*parts).reshape(b, n, c3 // 3)


def halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """Averages 2x2 pixels."""
  return nn.avg_pool(x, (2, 2), (2, 2))


def double(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """Repeats every pixel 2x2 times."""
  return x.repeat(2, axis=1).repeat(2, axis=2)


RESIZE = {"down": halve, "up": double, None: lambda x: x}


class ResBlock(nn.Module):
  """Residual block told the embedding by a shift, or by scale and shift after the norm ("adaptive
  group normalisation", Dhariwal & Nichol 2021, section 3.1).

  Attributes:
    features: channels of the output.
    resample: "down" or "up" resizes inside the block, before its first convolution and on the
      shortcut (section 3, after BigGAN); None keeps the size.
  """

  features: int
  dropout: float = 0.0
  use_scale_shift_norm: bool = True
  resample: str | None = None
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"], train: bool
  ) -> Float[Array, "b h2 w2 f"]:
    """Returns [b, h, w, features], h and w halved or doubled where the block resamples."""
    resize = RESIZE[self.resample]
    h = nn.swish(group_norm(x.shape[-1], name="in_norm", dtype=self.dtype)(x))
    h = conv(self.features, name="in_conv", dtype=self.dtype)(resize(h))
    width = self.features * (2 if self.use_scale_shift_norm else 1)
    told = dense(width, name="embedding")(nn.swish(embedding)).astype(h.dtype)[:, None, None, :]
    norm = group_norm(self.features, name="out_norm", dtype=self.dtype)
    if self.use_scale_shift_norm:
      scale, shift = jnp.split(told, 2, axis=-1)
      h = norm(h) * (1 + scale) + shift
    else:
      h = norm(h + told)
    h = nn.Dropout(self.dropout)(nn.swish(h), deterministic=not train)
    h = conv(self.features, name="out_conv", init=ZEROS, dtype=self.dtype)(h)
    x = resize(x)
    if x.shape[-1] != self.features:
      x = dense(self.features, name="shortcut", dtype=self.dtype)(x)
    return x + h


class AttentionBlock(nn.Module):
  """Multi-head self-attention over the pixels, residual."""

  num_heads: int
  split_first: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Keeps the shape."""
    b, h, w, c = x.shape
    pixels = group_norm(c, name="norm", dtype=self.dtype)(x).reshape(b, h * w, c)
    qkv = dense(3 * c, name="qkv", dtype=self.dtype)(pixels)
    out = attend(qkv, self.num_heads, self.split_first)
    return x + dense(c, name="out", init=ZEROS, dtype=self.dtype)(out).reshape(x.shape)


class AttentionPool(nn.Module):
  """Attention pooling (Radford et al. 2021, section 2.4; Dhariwal & Nichol 2021, section 4): the
  mean of the pixels asks, the pixels and their mean answer. The table of positions fixes the size
  of the image.
  """

  num_heads: int
  features: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b f"]:
    """Returns [b, features]."""
    b, h, w, c = x.shape
    pixels = x.reshape(b, h * w, c)
    tokens = jnp.concatenate([pixels.mean(1, keepdims=True), pixels], axis=1)
    init = nn.initializers.normal(c**-0.5)
    tokens += self.param("positions", init, (1, h * w + 1, c))
    answers = attend(dense(3 * c, name="qkv")(tokens), self.num_heads, split_first=True)
    return dense(self.features, name="out")(answers[:, 0])


class Downsample(nn.Module):
  """Halves height and width: stride-2 convolution, or 2x2 average pooling."""

  with_conv: bool = True
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """[b, h, w, c] -> [b, h / 2, w / 2, c]."""
    if not self.with_conv:
      return halve(x)
    return conv(x.shape[-1], name="conv", stride=2, dtype=self.dtype)(x)


class Upsample(nn.Module):
  """Doubles height and width: nearest neighbour, then a convolution by option."""

  with_conv: bool = True
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """[b, h, w, c] -> [b, 2 h, 2 w, c]."""
    x = double(x)
    return conv(x.shape[-1], name="conv", dtype=self.dtype)(x) if self.with_conv else x


RESAMPLE = {"down": Downsample, "up": Upsample}


class Trunk(nn.Module):
  """What the U-Net and the classifier of ADM share: the settings and the way down. Its methods make
  submodules and are called from a compact `__call__`.

  Attributes:
    nf: base width; level i has int(nf * ch_mult[i]) channels.
    ch_mult: one factor per resolution level: its length is the depth.
    num_res_blocks: residual blocks per level going down; one more going up.
    attn_resolutions: heights at which attention stands after every residual block; the papers give
      factors: height = image height / factor.
    dropout: rate inside the residual blocks while training.
    num_heads: attention heads, where `num_head_channels` is 0.
    num_head_channels: channels per head; then the number of heads follows the width.
    use_scale_shift_norm: the embedding scales and shifts after the norm, or only shifts before it.
    resblock_updown: resample inside residual blocks (ADM) or by layers of their own (iDDPM).
    resamp_with_conv: these layers convolve; without effect if resblock_updown.
    use_new_attention_order: layout of the attention's channels, `attend`'s split_first; matters
      for imported parameters only. True in ADM's 64x64 network and nowhere else in the papers.
    dtype: of the computation; parameters and output are float32.
    remat: recompute residual blocks in the backward pass instead of storing what is inside them.
  """

  nf: int = 128
  ch_mult: tuple[int | float, ...] = (1, 2, 2, 2)
  num_res_blocks: int = 3
  attn_resolutions: tuple[int, ...] = (16, 8)
  dropout: float = 0.3
  num_heads: int = 4
  num_head_channels: int = 0
  use_scale_shift_norm: bool = True
  resblock_updown: bool = False
  resamp_with_conv: bool = True
  use_new_attention_order: bool = False
  dtype: str = "float32"
  remat: bool = False

  def time_embedding(self, c_noise: Float[Array, " b"]) -> Float[Array, "b e"]:
    """[b, 4 nf], float32."""
    hidden = dense(4 * self.nf, name="time_0")(timestep_embedding(c_noise, self.nf))
    return dense(4 * self.nf, name="time_2")(nn.swish(hidden))

  def encode(self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"], train: bool):
    """Down to the lowest level and through the middle: (h [b, h', w', c'], what the levels hand
    across, first first). A height or width that cannot be halved raises a ValueError.
    """
    unet.check_size(x.shape[1:3], 2 ** (len(self.ch_mult) - 1))
    widths = self.widths()
    h = conv(widths[0], name="input_0_0", dtype=self.dtype)(x)
    skips = [h]
    for level, width in enumerate(widths):
      if level:
        h = self.resample(f"input_{len(skips)}_0", "down", h, embedding, train)
        skips.append(h)
      for _ in range(self.num_res_blocks):
        h = self.stage(f"input_{len(skips)}", h, width, embedding, train)
        skips.append(h)
    h = self.block("middle_0", h.shape[-1], None, h, embedding, train)
    h = self.attention("middle_1", h)
    return self.block("middle_2", h.shape[-1], None, h, embedding, train), skips

  def widths(self) -> list[int]:
    """Channels of every level."""
    return [int(mult * self.nf) for mult in self.ch_mult]

  def stage(self, name, h, width, embedding, train, up: bool = False):
    """A residual block, attention where the height has it, doubling if `up`, numbered in a row."""
    h = self.block(f"{name}_0", width, None, h, embedding, train)
    attends = h.shape[1] in self.attn_resolutions
    if attends:
      h = self.attention(f"{name}_1", h)
    return self.resample(f"{name}_{1 + attends}", "up", h, embedding, train) if up else h

  def block(self, name, width, resample, h, embedding, train):
    """A residual block to `width` channels."""
    kind = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
    options = (width, self.dropout, self.use_scale_shift_norm, resample, self.dtype)
    return kind(*options, name=name)(h, embedding, train)

  def attention(self, name, h):
    """Self-attention over the pixels."""
    heads = count_heads(h.shape[-1], self.num_heads, self.num_head_channels)
    return AttentionBlock(heads, self.use_new_attention_order, self.dtype, name=name)(h)

  def resample(self, name, direction, h, embedding, train):
    """Halves ("down") or doubles ("up") height and width."""
    if self.resblock_updown:
      return self.block(name, h.shape[-1], direction, h, embedding, train)
    return RESAMPLE[direction](self.resamp_with_conv, self.dtype, name=name)(h)
