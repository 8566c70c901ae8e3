"""The U-Net of DDPM for images."""

from models.layers import ddpm


class Model(ddpm.UNet):
  """DDPM U-Net (Ho et al. 2020, appendix B) for images [b, h, w, c]; attributes as of `UNet`."""
