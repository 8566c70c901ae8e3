"""Blocks that NCSN++ and DDPM++ add to the U-Net (Song et al. 2021, appendix H)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from models.layers import fir, unet


class BigGANBlock(nn.Module):
  """Residual block that also resamples, as in BigGAN (Brock et al. 2019; Song et al. 2021, appendix
  H.1): both branches are resampled after the first activation.

  Attributes:
    resample: "up", "down" or None.
    fir_kernel: one axis of the resampling filter; (1, 1) is nearest neighbour and mean.
    skip_rescale: divide the sum by sqrt(2).
    init_scale: of the last convolution.
    dtype: of the computation; None follows the input.
  """

  features: int
  dropout: float = 0.0
  resample: str | None = None
  fir_kernel: fir.Taps = (1, 1)
  skip_rescale: bool = True
  init_scale: float = 0.0
  dtype: str | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"] | None, train: bool
  ) -> Float[Array, "b h2 w2 f"]:
    """Returns [b, h2, w2, features], sides doubled, halved or kept."""
    norm = lambda h: unet.group_norm(h.shape[-1], dtype=self.dtype)(h)
    h = nn.swish(norm(x))
    if self.resample:
      change = {"up": fir.upsample, "down": fir.downsample}[self.resample]
      h, x = change(h, self.fir_kernel), change(x, self.fir_kernel)
    h = unet.conv(self.features, dtype=self.dtype)(h)
    if embedding is not None:
      h += unet.dense(self.features, dtype=self.dtype)(nn.swish(embedding))[:, None, None, :]
    h = nn.Dropout(self.dropout)(nn.swish(norm(h)), deterministic=not train)
    h = unet.conv(self.features, scale=self.init_scale, dtype=self.dtype)(h)
    if self.resample or x.shape[-1] != self.features:
      x = unet.conv(self.features, 1, dtype=self.dtype, name="shortcut")(x)
    return unet.add(x, h, self.skip_rescale)


class FourierEmbedding(nn.Module):
  """[sin, cos] of the noise level at fixed random frequencies (Tancik et al. 2020; Song et al.
  2021, appendix H.1). They are a parameter, so that a checkpoint has them, of zero gradient.
  """

  num_frequencies: int
  scale: float = 16.0

  @nn.compact
  def __call__(self, c_noise: Float[Array, " b"]) -> Float[Array, "b f"]:
    """[b] -> [b, 2 num_frequencies]."""
    init = nn.initializers.normal(self.scale)
    frequencies = self.param("frequencies", init, (self.num_frequencies,))
    angles = 2 * jnp.pi * c_noise[:, None] * jax.lax.stop_gradient(frequencies)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class Combine(nn.Module):
  """Joins the resampled input to the features: a 1x1 convolution of it, then "sum" or "cat"."""

  method: str = "sum"
  dtype: str | None = None

  @nn.compact
  def __call__(
    self, pyramid: Float[Array, "b h w p"], h: Float[Array, "b h w c"]
  ) -> Float[Array, "b h w f"]:
    """Returns c channels, or 2 c after "cat"."""
    pyramid = unet.conv(h.shape[-1], 1, dtype=self.dtype)(pyramid)
    return pyramid + h if self.method == "sum" else jnp.concatenate([pyramid, h], axis=-1)
