"""DDPM on CIFAR-10 with 1000 levels of the VE process.

Published: no figure
Source:    score_sde, configs/ve/cifar10_ddpm.py
Command:   python main.py --config=configs/ve/cifar10_ddpm.py --workdir=runs/ve_cifar10_ddpm
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ve_cifar10(score_sde.SMLD, score_sde.DDPM)
