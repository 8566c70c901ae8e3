"""The U-Net of DDPM along any number of axes: residual blocks, attention at chosen resolutions,
time embedding.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import unet


class UNet(nn.Module):
  """DDPM U-Net (Ho et al. 2020, appendix B) for [b, *hw, c], images or sequences, of any size that
  can be halved often enough.

  Attributes:
    nf: channels at full resolution; level i has nf * ch_mult[i].
    ch_mult: one factor per resolution level: its length is the depth.
    num_res_blocks: residual blocks per level going down; one more going up.
    attn_resolutions: heights (of sequences: lengths) at which attention blocks stand.
    attn_every_block: attention after every up-block (the original) or once per level (score_sde).
    dropout: rate inside the residual blocks while training.
    resamp_with_conv: convolve when resampling.
    conditional: whether the network is told about time.
    num_classes: 0 for an unconditional network; labels are 0 .. num_classes - 1, None means no
      class.
    augment_dim: number of conditions that tell how the images were augmented, 9 for
      `augment.augment`; 0: the network takes none.
    centered: the data are in [-1, 1]; False: in [0, 1], mapped to [-1, 1] here.
    learned_variance: 2 c output channels, the second half about the variance (Nichol & Dhariwal
      2021).
    group_size: fewest channels in a normalisation group; 1 gives the 32 groups of the published
      code also to networks of fewer than 128 channels.
    dtype: of the computation; parameters and output are float32.
    remat: compute the residual blocks again in the backward pass: less memory, more time.
  """

  nf: int = 128
  ch_mult: tuple[int, ...] = (1, 2, 2, 2)
  num_res_blocks: int = 2
  attn_resolutions: tuple[int, ...] = (16,)
  attn_every_block: bool = True
  dropout: float = 0.1
  resamp_with_conv: bool = True
  conditional: bool = True
  num_classes: int = 0
  augment_dim: int = 0
  centered: bool = True
  learned_variance: bool = False
  group_size: int = 4
  dtype: str = "float32"
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b *hw c"],
    c_noise: Float[Array, " b"],
    labels: Int[Array, " b"] | None = None,
    train: bool = False,
    augmentation: Float[Array, "b n"] | None = None,
  ) -> Float[Array, "b *hw f"]:
    """Maps x [b, *hw, c] and the noise condition c_noise [b] to an output of the shape of x, or of
    2 c channels for `learned_variance`.
    """
    unet.check_size(x.shape[1:-1], 2 ** (len(self.ch_mult) - 1))
    embedding = self._embedding(c_noise, labels, augmentation)
    h, rank = (x if self.centered else 2 * x - 1).astype(self.dtype), x.ndim - 2
    h = unet.conv(self.nf, rank=rank, dtype=self.dtype)(h)
    skips = [h]
    for level, mult in enumerate(self.ch_mult):
      if level:
        h = unet.Downsample(self.resamp_with_conv, dtype=self.dtype)(h)
        skips.append(h)
      for _ in range(self.num_res_blocks):
        h = self._block(h, mult * self.nf, embedding, train)
        skips.append(h)
    h = self._block(h, h.shape[-1], embedding, train, attention=True)
    h = self._block(h, h.shape[-1], embedding, train, attention=False)
    for level, mult in reversed(list(enumerate(self.ch_mult))):
      for block in range(self.num_res_blocks + 1):
        attention = None if self.attn_every_block or block == self.num_res_blocks else False
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self._block(h, mult * self.nf, embedding, train, attention)
      if level:
        h = unet.Upsample(self.resamp_with_conv, dtype=self.dtype)(h)
    h = unet.group_norm(h.shape[-1], group_size=self.group_size, dtype=self.dtype)(h)
    features = x.shape[-1] * (2 if self.learned_variance else 1)
    h = unet.conv(features, rank=rank, scale=0.0, dtype=self.dtype)(nn.swish(h))
    return h.astype(jnp.float32)

  def _embedding(self, c_noise, labels, augmentation):
    """[b, 4 nf], None for a network blind to time."""
    if not self.conditional:
      unet.check_augmentation(0, augmentation)
      return None
    features = unet.sinusoidal_embedding(c_noise, self.nf)
    features = unet.augmented(features, self.augment_dim, augmentation, dtype=self.dtype)
    return unet.noise_embedding(features, 4 * self.nf, self.num_classes, labels, self.dtype)

  def _block(self, h, features, embedding, train, attention: bool | None = None):
    """A residual block, then attention where asked for (None: at the resolutions that have it)."""
    options = {"group_size": self.group_size, "dtype": self.dtype}
    block = unet.ResnetBlock(features, self.dropout, **options)
    h = unet.call_block(block, h, embedding, train, remat=self.remat)
    wanted = h.shape[1] in self.attn_resolutions if attention is None else attention
    return unet.AttentionBlock(**options)(h) if wanted else h
