"""NCSN++ on CIFAR-10 with 1000 levels of the VE process.

Published: FID 2.45, IS 9.73 (best checkpoint)
Source:    Song et al. 2021, tables 2 and 3; score_sde, configs/ve/cifar10_ncsnpp.py
Command:   python main.py --config=configs/ve/cifar10_ncsnpp.py --workdir=runs/ve_cifar10_ncsnpp
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ve_cifar10(score_sde.SMLD, score_sde.NCSNPP)
