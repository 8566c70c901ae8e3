"""NCSNv2 on CelebA at 64 px, in score_sde's widths.

Published: no figure
Source:    score_sde, configs/ve/ncsnv2/celeba.py
Command:   python main.py --config=configs/ve/ncsnv2/celeba.py --workdir=runs/ve_ncsnv2_celeba
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ncsnv2(datasets.celeba(), score_sde.CELEBA_LEVELS)
