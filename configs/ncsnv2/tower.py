"""NCSNv2 on LSUN tower at 128 px.

Published: no figure
Source:    Song & Ermon 2020; ncsnv2, configs/tower.yml
Command:   python main.py --config=configs/ncsnv2/tower.py --workdir=runs/ncsnv2_tower
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ncsn


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ncsn.ncsnv2(datasets.lsun("tower", 128), ncsn.LSUN_128, 150_000, ncsn.DEEPER)
