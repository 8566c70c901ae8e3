r"""DDPM++ of twice the depth on CIFAR-10 under the VP SDE.

Published: FID 2.41, IS 9.68 (best checkpoint); FID 3.08, 3.13 bits/dim (last checkpoint, ODE)
Source:    Song et al. 2021, tables 2 and 3; score_sde, configs/vp/cifar10_ddpmpp_deep_continuous.py
Command:   python main.py --config=configs/vp/cifar10_ddpmpp_deep_continuous.py \
             --workdir=runs/vp_cifar10_ddpmpp_deep_continuous
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.cifar10(score_sde.VP, score_sde.DDPMPP, score_sde.DEEP)
