"""NCSNv2 on LSUN bedroom at 128 px.

Published: no figure
Source:    Song & Ermon 2020; ncsnv2, configs/bedroom.yml
Command:   python main.py --config=configs/ncsnv2/bedroom.py --workdir=runs/ncsnv2_bedroom
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ncsn


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ncsn.ncsnv2(datasets.lsun("bedroom", 128), ncsn.LSUN_128, 150_000, ncsn.DEEPER)
