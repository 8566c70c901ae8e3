"""NCSN of 2019 on CIFAR-10, in score_sde's widths.

Published: no figure
Source:    score_sde, configs/ve/ncsn/cifar10.py
Command:   python main.py --config=configs/ve/ncsn/cifar10.py --workdir=runs/ve_ncsn_cifar10
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ncsn(datasets.CIFAR10, score_sde.LEVELS_2019)
