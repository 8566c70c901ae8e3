r"""DDPM on CIFAR-10, not told the time.

Published: no figure
Source:    score_sde, configs/vp/ddpm/cifar10_unconditional.py
Command:   python main.py --config=configs/vp/ddpm/cifar10_unconditional.py \
             --workdir=runs/vp_ddpm_cifar10_unconditional
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.cifar10(score_sde.VP_DISCRETE, score_sde.DDPM, score_sde.UNTOLD)
