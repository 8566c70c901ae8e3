"""NCSN on CelebA at 32 px.

Published: no figure
Source:    Song & Ermon 2019; ncsn, configs/anneal.yml
Command:   python main.py --config=configs/ncsn/celeba.py --workdir=runs/ncsn_celeba
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ncsn


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ncsn.ncsn(datasets.celeba(32))
