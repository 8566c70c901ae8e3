"""NCSNv2 on LSUN bedroom at 128 px.

Published: no figure
Source:    score_sde, configs/ve/ncsnv2/bedroom.py
Command:   python main.py --config=configs/ve/ncsnv2/bedroom.py --workdir=runs/ve_ncsnv2_bedroom
"""

from ml_collections import ConfigDict

from configs.bases import datasets, score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ncsnv2_128(datasets.lsun("bedroom", 128), score_sde.BEDROOM_LEVELS)
