r"""NCSN++ on CelebA-HQ at 1024 px under the VE SDE.

Published: no figure
Source:    score_sde, configs/ve/celebahq_ncsnpp_continuous.py
Command:   python main.py --config=configs/ve/celebahq_ncsnpp_continuous.py \
             --workdir=runs/ve_celebahq_ncsnpp_continuous
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ve_1024(datasets.CELEBA_HQ_1024)
