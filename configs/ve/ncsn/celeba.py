"""NCSN of 2019 on CelebA at 64 px, in score_sde's widths.

Published: no figure
Source:    score_sde, configs/ve/ncsn/celeba.py
Command:   python main.py --config=configs/ve/ncsn/celeba.py --workdir=runs/ve_ncsn_celeba
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ncsn(datasets.celeba(), score_sde.LEVELS_2019)
