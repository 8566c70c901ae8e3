"""NCSN++ on CIFAR-10 with the 1000 levels of DDPM, sampled by reverse diffusion.

Published: no figure
Source:    score_sde, configs/vp/cifar10_ncsnpp.py
Command:   python main.py --config=configs/vp/cifar10_ncsnpp.py --workdir=runs/vp_cifar10_ncsnpp
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.cifar10(score_sde.VP_DISCRETE, score_sde.NCSNPP, score_sde.REVERSE_DIFFUSION)
