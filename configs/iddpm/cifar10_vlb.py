"""Improved DDPM on CIFAR-10, trained on the variational bound.

Published: FID 11.47, 2.94 bits/dim
Source:    Nichol & Dhariwal 2021; improved-diffusion, README
Command:   python main.py --config=configs/iddpm/cifar10_vlb.py --workdir=runs/iddpm_cifar10_vlb
"""

from ml_collections import ConfigDict

from configs.bases import iddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return iddpm.cifar10(iddpm.VLB)
