r"""NCSN++ on FFHQ at 256 px under the VE SDE.

Published: samples without a figure
Source:    score_sde, configs/ve/ffhq_256_ncsnpp_continuous.py
Command:   python main.py --config=configs/ve/ffhq_256_ncsnpp_continuous.py \
             --workdir=runs/ve_ffhq_256_ncsnpp_continuous
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ve_256(datasets.ffhq(256), sigma_max=348.0)
