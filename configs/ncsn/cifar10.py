"""NCSN on CIFAR-10.

Published: FID 25.32, IS 8.87 ± 0.12
Source:    Song & Ermon 2019, table 1; ncsn, configs/anneal.yml
Command:   python main.py --config=configs/ncsn/cifar10.py --workdir=runs/ncsn_cifar10
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ncsn


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ncsn.ncsn(datasets.CIFAR10)
