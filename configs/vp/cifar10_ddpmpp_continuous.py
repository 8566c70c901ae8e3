r"""DDPM++ on CIFAR-10 under the VP SDE.

Published: FID 2.55, IS 9.58 (best checkpoint); FID 3.93, 3.16 bits/dim (last checkpoint, ODE)
Source:    Song et al. 2021, tables 2 and 3; score_sde, configs/vp/cifar10_ddpmpp_continuous.py
Command:   python main.py --config=configs/vp/cifar10_ddpmpp_continuous.py \
             --workdir=runs/vp_cifar10_ddpmpp_continuous
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.cifar10(score_sde.VP, score_sde.DDPMPP)
