r"""DDPM on CIFAR-10 under the VP SDE.

Published: FID 3.69, 3.21 bits/dim (last checkpoint, ODE)
Source:    Song et al. 2021, tables 2 and 3; score_sde, configs/vp/ddpm/cifar10_continuous.py
Command:   python main.py --config=configs/vp/ddpm/cifar10_continuous.py \
             --workdir=runs/vp_ddpm_cifar10_continuous
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.cifar10(score_sde.VP, score_sde.DDPM)
