"""NCSNv2 on CelebA at 64 px.

Published: no figure
Source:    Song & Ermon 2020; ncsnv2, configs/celeba.yml
Command:   python main.py --config=configs/ncsnv2/celeba.py --workdir=runs/ncsnv2_celeba
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ncsn


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ncsn.ncsnv2(datasets.celeba(), ncsn.CELEBA, 210_000)
