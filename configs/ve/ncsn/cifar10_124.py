"""NCSN on CIFAR-10 with techniques 1, 2 and 4 of Song & Ermon 2020, the noise levels.

Published: no figure
Source:    score_sde, configs/ve/ncsn/cifar10_124.py
Command:   python main.py --config=configs/ve/ncsn/cifar10_124.py --workdir=runs/ve_ncsn_cifar10_124
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ncsn(datasets.CIFAR10, score_sde.CIFAR10_LEVELS)
