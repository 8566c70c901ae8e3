"""DDPM on LSUN bedroom at 256 px.

Published: no figure
Source:    score_sde, configs/vp/ddpm/bedroom.py
Command:   python main.py --config=configs/vp/ddpm/bedroom.py --workdir=runs/vp_ddpm_bedroom
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.vp_256(datasets.lsun("bedroom"))
