"""The U-Net of DDPM for sequences."""

from models.layers import ddpm


class Model(ddpm.UNet):
  """DDPM U-Net (Ho et al. 2020, appendix B) for sequences [b, length, c]; attributes as of `UNet`.

  It is the network for images on those that are constant along their width, when only the middle
  column of each 3x3 kernel is not zero; the parameters have the same names.
  """

  nf: int = 64
