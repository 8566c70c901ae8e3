r"""NCSN++ of twice the depth on CIFAR-10 under the VE SDE.

Published: FID 2.20, IS 9.89 (best checkpoint)
Source:    Song et al. 2021, tables 2 and 3; score_sde, configs/ve/cifar10_ncsnpp_deep_continuous.py
Command:   python main.py --config=configs/ve/cifar10_ncsnpp_deep_continuous.py \
             --workdir=runs/ve_cifar10_ncsnpp_deep_continuous
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.ve_cifar10(score_sde.VE, score_sde.NCSNPP, score_sde.FOURIER, score_sde.DEEP)
