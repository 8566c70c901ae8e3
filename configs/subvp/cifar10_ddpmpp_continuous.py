r"""DDPM++ on CIFAR-10 under the sub-VP SDE.

Published: FID 2.61, IS 9.56 (best checkpoint); FID 3.16, 3.02 bits/dim (last checkpoint, ODE)
Source:    Song et al. 2021, tables 2 and 3; score_sde, configs/subvp/cifar10_ddpmpp_continuous.py
Command:   python main.py --config=configs/subvp/cifar10_ddpmpp_continuous.py \
             --workdir=runs/subvp_cifar10_ddpmpp_continuous
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.cifar10(score_sde.SUB_VP, score_sde.DDPMPP)
