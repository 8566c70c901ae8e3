r"""NCSN++ on LSUN bedroom at 256 px under the VE SDE.

Published: samples without a figure
Source:    score_sde, configs/ve/bedroom_ncsnpp_continuous.py
Command:   python main.py --config=configs/ve/bedroom_ncsnpp_continuous.py \
             --workdir=runs/ve_bedroom_ncsnpp_continuous
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ve_256(datasets.lsun("bedroom"), sigma_max=378.0)
