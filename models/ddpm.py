"""The U-Net of DDPM: residual blocks, attention at chosen resolutions, time embedding."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import unet


class Model(nn.Module):
  """DDPM U-Net (Ho et al. 2020, appendix B) for images [b, h, w, c] of any size that can be halved
  often enough.

  Attributes:
    nf: channels at full resolution; level i has nf * ch_mult[i].
    ch_mult: one factor per resolution level: its length is the depth.
    num_res_blocks: residual blocks per level going down; one more going up.
    attn_resolutions: heights at which attention blocks stand.
    attn_every_block: attention after every up-block (the original) or once per level (score_sde).
    dropout: rate inside the residual blocks while training.
    resamp_with_conv: convolve when resampling.
    conditional: whether the network is told about time.
    num_classes: 0 for an unconditional network; labels are 0 .. num_classes - 1, None means no
      class.
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

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    c_noise: Float[Array, " b"],
    labels: Int[Array, " b"] | None = None,
    train: bool = False,
  ) -> Float[Array, "b h w c"]:
    """Maps x [b, h, w, c] and the noise condition c_noise [b] to an output of the shape of x."""
    unet.check_size(x.shape[1:3], 2 ** (len(self.ch_mult) - 1))
    embedding = self._embedding(c_noise, labels)
    h = unet.conv(self.nf)(x)
    skips = [h]
    for level, mult in enumerate(self.ch_mult):
      if level:
        h = unet.Downsample(self.resamp_with_conv)(h)
        skips.append(h)
      for _ in range(self.num_res_blocks):
        h = self._block(h, mult * self.nf, embedding, train)
        skips.append(h)
    h = self._block(h, h.shape[-1], embedding, train, attention=True)
    h = self._block(h, h.shape[-1], embedding, train, attention=False)
    for level, mult in reversed(list(enumerate(self.ch_mult))):
      for block in range(self.num_res_blocks + 1):
        last = block == self.num_res_blocks
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self._block(
          h,
          mult * self.nf,
          embedding,
          train,
          attention=None if self.attn_every_block or last else False,
        )
      if level:
        h = unet.Upsample(self.resamp_with_conv)(h)
    return unet.conv(x.shape[-1], scale=0.0)(nn.swish(unet.group_norm(h.shape[-1])(h)))

  def _embedding(self, c_noise, labels):
    """[b, 4 nf] from the sinusoidal time embedding and, where the network has classes, the label's
    vector.
    """
    if not self.conditional:
      return None
    width = 4 * self.nf
    embedding = unet.dense(width)(
      nn.swish(unet.dense(width)(unet.sinusoidal_embedding(c_noise, self.nf)))
    )
    if self.num_classes:
      table = nn.Embed(
        self.num_classes + 1, width, embedding_init=unet.variance_scaling(), name="classes"
      )
      embedding += table(jnp.full(c_noise.shape, self.num_classes) if labels is None else labels)
    return embedding

  def _block(self, h, features, embedding, train, attention: bool | None = None):
    """A residual block, then attention where asked for (None: at the resolutions that have it)."""
    h = unet.ResnetBlock(features, self.dropout)(h, embedding, train)
    wanted = h.shape[1] in self.attn_resolutions if attention is None else attention
    return unet.AttentionBlock()(h) if wanted else h
