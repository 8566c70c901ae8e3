"""The RefineNets of NCSNv2, which are not told the noise level."""

from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import refinenet


class Model(nn.Module):
  """NCSNv2's RefineNet (Song and Ermon 2020, appendix B) for images [b, h, w, c]; its output is the
  score times sigma ("scaled_score"): the published network's last division is the
  parameterization's.

  Attributes:
    nf: channels at full resolution (published: 128).
    resolution_class: 64, 128 or 256: one of the three published networks, which halve the image
      once, twice and three times.
    centered: whether x is in [-1, 1]; else it is in [0, 1], as published, and becomes 2 x - 1.
    decoder_widths: "original", or "score_sde": the third RefineBlock of the 64 px network twice as
      wide.
    dtype: what it computes in; parameters, norms' statistics and the output are float32.
    remat: recompute the residual blocks and RefineBlocks in the backward pass: less memory, more
      time.
  """

  nf: int = 128
  resolution_class: int = 64
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
    """Maps x [b, h, w, c] to an output of its shape; `c_noise` and `train` change nothing."""
    if labels is not None:
      raise ValueError("models.ncsnv2 has no class conditioning: labels must be None")
    return refinenet.refinenet(
      x,
      nf=self.nf,
      stages=refinenet.stages(self.resolution_class, self.decoder_widths),
      num_scales=0,
      centered=self.centered,
      dtype=self.dtype,
      remat=self.remat,
    )
