r"""The network of NCSNv2 on CIFAR-10 with the levels and the training of NCSN.

Published: no figure
Source:    Song & Ermon 2020; ncsnv2, configs/ncsn_original.yml
Command:   python main.py --config=configs/ncsnv2/cifar10_original.py \
             --workdir=runs/ncsnv2_cifar10_original
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ncsn


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ncsn.original(datasets.CIFAR10, 300_000)
