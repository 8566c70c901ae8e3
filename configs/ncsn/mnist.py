"""NCSN on MNIST, 28 px.

Published: no figure
Source:    Song & Ermon 2019; ncsn, configs/anneal.yml
Command:   python main.py --config=configs/ncsn/mnist.py --workdir=runs/ncsn_mnist
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ncsn


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ncsn.ncsn(datasets.MNIST, ncsn.MNIST)
