"""DDPM++ on CIFAR-10 with the 1000 levels of DDPM.

Published: FID 2.78, IS 9.64 (best checkpoint)
Source:    Song et al. 2021, tables 2 and 3; score_sde, configs/vp/cifar10_ddpmpp.py
Command:   python main.py --config=configs/vp/cifar10_ddpmpp.py --workdir=runs/vp_cifar10_ddpmpp
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.cifar10(score_sde.VP_DISCRETE, score_sde.DDPMPP)
