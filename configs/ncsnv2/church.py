"""NCSNv2 on LSUN church at 96 px (as the README says and the levels fit; the file says 64).

Published: no figure
Source:    Song & Ermon 2020; ncsnv2, configs/church.yml
Command:   python main.py --config=configs/ncsnv2/church.py --workdir=runs/ncsnv2_church
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ncsn


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ncsn.ncsnv2(datasets.lsun("church_outdoor", 96), ncsn.CHURCH, 200_000, ncsn.DEEPER)
