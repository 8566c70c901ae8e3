"""Improved DDPM on CIFAR-10: cosine schedule, learned variance, L_hybrid.

Published: FID 3.19, 3.17 bits/dim
Source:    Nichol & Dhariwal 2021; improved-diffusion, README
Command:   python main.py --config=configs/iddpm/cifar10.py --workdir=runs/iddpm_cifar10
"""

from ml_collections import ConfigDict

from configs.bases import iddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return iddpm.cifar10()
