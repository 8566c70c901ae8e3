"""NCSNv2 on FFHQ at 256 px.

Published: no figure
Source:    Song & Ermon 2020; ncsnv2, configs/ffhq.yml
Command:   python main.py --config=configs/ncsnv2/ffhq.py --workdir=runs/ncsnv2_ffhq
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ncsn


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ncsn.ncsnv2(datasets.ffhq(256), ncsn.FFHQ, 80_000, ncsn.DEEPEST, ncsn.AT_256)
