r"""NCSN on CIFAR-10 with techniques 1, 2, 4 and 5 of Song & Ermon 2020.

Published: no figure
Source:    score_sde, configs/ve/ncsn/cifar10_1245.py
Command:   python main.py --config=configs/ve/ncsn/cifar10_1245.py \
             --workdir=runs/ve_ncsn_cifar10_1245
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ncsn(datasets.CIFAR10, score_sde.CIFAR10_LEVELS, ema_rate=0.999)
