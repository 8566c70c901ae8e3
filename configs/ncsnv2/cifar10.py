"""NCSNv2 on CIFAR-10.

Published: FID 10.87, IS 8.40 ± 0.07
Source:    Song & Ermon 2020, table 1; ncsnv2, configs/cifar10.yml
Command:   python main.py --config=configs/ncsnv2/cifar10.py --workdir=runs/ncsnv2_cifar10
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ncsn


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ncsn.ncsnv2(datasets.CIFAR10, ncsn.CIFAR10, 300_000)
