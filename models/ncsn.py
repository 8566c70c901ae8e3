"""The RefineNet of NCSN, conditional on the index of the noise level."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import refinenet


class Model(nn.Module):
  """NCSN's noise-conditional RefineNet (Song and Ermon 2019, appendix A) for images [b, h, w, c] of
  even height and width; its output is the score.

  As published the image is halved once, by mean pooling; the two deeper stages dilate instead. The
  28 px of MNIST need nothing special.

  Attributes:
    nf: channels at full resolution (published: 128; 64 for MNIST).
    num_scales: noise levels; every norm has its own parameters for each.
    centered: whether x is in [-1, 1]; else it is in [0, 1], as published, and becomes 2 x - 1.
    decoder_widths: "original", or "score_sde": the third RefineBlock twice as wide.
    dtype: what it computes in; parameters, norms' statistics and the output are float32.
    remat: recompute the residual blocks and RefineBlocks in the backward pass: less memory, more
      time.
  """

  nf: int = 128
  num_scales: int = 10
  centered: bool = False
  decoder_widths: str = "original"
  dtype: str = "float32"
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    c_noise: Float[Array, " b"],
    labels: Int[Array, " b"] | None = None,
    train: bool = False,
  ) -> Float[Array, "b h w c"]:
    """Maps x [b, h, w, c] and the level index c_noise [b], 0 the largest noise, to an output of the
    shape of x; an index outside 0 .. num_scales - 1 gives NaN. `train` changes nothing.
    """
    if labels is not None:
      raise ValueError("models.ncsn has no class conditioning: labels must be None")
    return refinenet.refinenet(
      x,
      jnp.round(c_noise).astype(jnp.int32),
      nf=self.nf,
      stages=refinenet.stages(64, self.decoder_widths),
      num_scales=self.num_scales,
      centered=self.centered,
      dtype=self.dtype,
      remat=self.remat,
    )
