"""DDPM on CIFAR-10 with its 1000 levels, attention once per level going up.

Published: FID 3.24 (best checkpoint); FID 3.37, 3.28 bits/dim (last checkpoint, ODE)
Source:    Song et al. 2021, tables 2 and 3; score_sde, configs/vp/ddpm/cifar10.py
Command:   python main.py --config=configs/vp/ddpm/cifar10.py --workdir=runs/vp_ddpm_cifar10
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.cifar10(score_sde.VP_DISCRETE, score_sde.DDPM)
