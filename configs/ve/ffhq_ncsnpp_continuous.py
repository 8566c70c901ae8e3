r"""NCSN++ on FFHQ at 1024 px under the VE SDE.

Published: samples without a figure
Source:    score_sde, configs/ve/ffhq_ncsnpp_continuous.py
Command:   python main.py --config=configs/ve/ffhq_ncsnpp_continuous.py \
             --workdir=runs/ve_ffhq_ncsnpp_continuous
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ve_1024(datasets.ffhq(1024))
