"""DDPM: Ho et al. 2020, and its code, hojonathanho/diffusion."""

from ml_collections import ConfigDict

from configs import bases
from configs.bases import datasets

CLIPPED = {"options": {"ancestral": {"clip": True}}}
CHAIN = (
  bases.CHAIN
  | bases.told("noise", "index")
  | bases.FLIPPED
  | {"sampling": bases.CHAIN["sampling"] | CLIPPED}
)
UNET = {"nf": 128, "num_res_blocks": 2, "attn_resolutions": (16,)}


def cifar10() -> ConfigDict:
  """The network of 35.7 million parameters; the variance of a step is beta ("fixedlarge")."""
  network = bases.network("ddpm", **UNET, ch_mult=(1, 2, 2, 2), dropout=0.1)
  large = {"sampling": {"options": {"ancestral": {"variance": "beta"}}}}
  trained = bases.training(2e-4, 128, 800_000, 0.9999)
  return bases.published(CHAIN, datasets.CIFAR10, trained, network, large)


def at_256(data: dict, num_steps: int) -> ConfigDict:
  """The network of 114 million parameters for 256 px; the variance is the posterior's."""
  network = bases.network("ddpm", **UNET, ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
  return bases.published(CHAIN, data, bases.training(2e-5, 64, num_steps, 0.9999), network)
