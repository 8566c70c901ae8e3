"""NCSN on CIFAR-10 with technique 5 of Song & Ermon 2020, the EMA.

Published: no figure
Source:    score_sde, configs/ve/ncsn/cifar10_5.py
Command:   python main.py --config=configs/ve/ncsn/cifar10_5.py --workdir=runs/ve_ncsn_cifar10_5
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ncsn(datasets.CIFAR10, score_sde.LEVELS_2019, ema_rate=0.999)
