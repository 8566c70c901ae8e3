"""NCSN++ on CelebA at 64 px with 1000 levels of the VE process.

Published: no figure
Source:    score_sde, configs/ve/celeba_ncsnpp.py
Command:   python main.py --config=configs/ve/celeba_ncsnpp.py --workdir=runs/ve_celeba_ncsnpp
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ve_64(datasets.celeba())
