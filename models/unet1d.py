"""The U-Net of DDPM for sequences."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import unet
from models.layers.conv import Conv


class Model(nn.Module):
  """DDPM U-Net (Ho et al. 2020, appendix B) along one axis, for sequences [b, length, c] of any
  length that can be halved often enough.

  It is the 2-D network on images that are constant along their width, when only the middle column
  of each 3x3 kernel is not zero; the parameters have the same names.

  Attributes:
    nf: channels at full length; level i has nf * ch_mult[i].
    ch_mult: one factor per resolution level: its length is the depth.
    num_res_blocks: residual blocks per level going down; one more going up.
    attn_resolutions: lengths at which attention blocks stand.
    attn_every_block: attention after every up-block (the original) or once per level (score_sde).
    dropout: rate inside the residual blocks while training.
    resamp_with_conv: convolve when resampling.
    conditional: whether the network is told about time.
    num_classes: 0 for an unconditional network; labels are 0 .. num_classes - 1, None means no
      class.
    learned_variance: 2 c output channels, the second half for the variance.
    dtype: of the computation; parameters and output are float32.
    remat: compute the residual blocks again in the backward pass: less memory, more time.
  """

  nf: int = 64
  ch_mult: tuple[int, ...] = (1, 2, 2, 2)
  num_res_blocks: int = 2
  attn_resolutions: tuple[int, ...] = (16,)
  attn_every_block: bool = True
  dropout: float = 0.1
  resamp_with_conv: bool = True
  conditional: bool = True
  num_classes: int = 0
  learned_variance: bool = False
  dtype: str = "float32"
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b l c"],
    c_noise: Float[Array, " b"],
    labels: Int[Array, " b"] | None = None,
    train: bool = False,
  ) -> Float[Array, "b l out"]:
    """Maps x [b, length, c] and the noise condition c_noise [b] to [b, length, c], or [b, length, 2
    c] with learned_variance.
    """
    unet.check_size(x.shape[1:2], 2 ** (len(self.ch_mult) - 1))
    embedding = self._embedding(c_noise, labels)
    h = conv(self.nf, self.dtype)(x)
    skips = [h]
    for level, mult in enumerate(self.ch_mult):
      if level:
        h = Downsample(self.resamp_with_conv, self.dtype)(h)
        skips.append(h)
      for _ in range(self.num_res_blocks):
        h = self._block(h, mult * self.nf, embedding, train)
        skips.append(h)
    h = self._block(h, h.shape[-1], embedding, train, attention=True)
    h = self._block(h, h.shape[-1], embedding, train, attention=False)
    for level, mult in reversed(list(enumerate(self.ch_mult))):
      for i in range(self.num_res_blocks + 1):
        attention = None if self.attn_every_block or i == self.num_res_blocks else False
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self._block(h, mult * self.nf, embedding, train, attention)
      if level:
        h = Upsample(self.resamp_with_conv, self.dtype)(h)
    channels = x.shape[-1] * (2 if self.learned_variance else 1)
    h = nn.swish(unet.group_norm(h.shape[-1], dtype=self.dtype)(h))
    return conv(channels, self.dtype, scale=0.0)(h).astype(jnp.float32)

  def _embedding(self, c_noise, labels):
    """[b, 4 nf], None for a network blind to time."""
    if not self.conditional:
      return None
    features = unet.sinusoidal_embedding(c_noise, self.nf)
    return unet.noise_embedding(features, 4 * self.nf, self.num_classes, labels, self.dtype)

  def _block(self, h, features, embedding, train, attention: bool | None = None):
    """A residual block, then attention where asked for (None: at the lengths that have it)."""
    block = ResnetBlock(features, self.dropout, self.dtype)
    h = unet.call_block(block, h, embedding, train, remat=self.remat)
    wanted = h.shape[1] in self.attn_resolutions if attention is None else attention
    return unet.AttentionBlock(dtype=self.dtype)(h[:, :, None])[:, :, 0] if wanted else h


def conv(features: int, dtype: str, *, stride: int = 1, scale: float = 1.0) -> Conv:
  """Convolution of width 3 with the initialisation of Ho et al. 2020, computed in `dtype`."""
  init = unet.variance_scaling(scale)
  return Conv(features, (3,), (stride,), dtype=dtype, kernel_init=init)


class ResnetBlock(nn.Module):
  """Two normalised convolutions with a time shift between them and a residual connection (Ho et al.
  2020, appendix B).
  """

  features: int
  dropout: float
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "b l c"], embedding: Float[Array, "b e"] | None, train: bool
  ) -> Float[Array, "b l f"]:
    """Returns [b, l, features]; `embedding` [b, e] or None for a network blind to time."""
    norm = lambda h: unet.group_norm(h.shape[-1], dtype=self.dtype)(h)
    h = conv(self.features, self.dtype)(nn.swish(norm(x)))
    if embedding is not None:
      h += unet.dense(self.features, dtype=self.dtype)(nn.swish(embedding))[:, None]
    h = nn.Dropout(self.dropout)(nn.swish(norm(h)), deterministic=not train)
    h = conv(self.features, self.dtype, scale=0.0)(h)
    if x.shape[-1] != self.features:
      x = unet.dense(self.features, dtype=self.dtype, name="shortcut")(x)
    return x + h


class Downsample(nn.Module):
  """Halves the length: stride-2 convolution, or averages of pairs."""

  with_conv: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l2 c"]:
    """[b, l, c] -> [b, l / 2, c]."""
    if self.with_conv:
      return conv(x.shape[-1], self.dtype, stride=2)(x)
    return nn.avg_pool(x, (2,), (2,))


class Upsample(nn.Module):
  """Doubles the length: nearest neighbour, then a convolution by option."""

  with_conv: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l2 c"]:
    """[b, l, c] -> [b, 2 l, c]."""
    x = x.repeat(2, axis=1)
    return conv(x.shape[-1], self.dtype)(x) if self.with_conv else x
