"""DDPM on CIFAR-10.

Published: FID 3.17, IS 9.46 ± 0.11, at most 3.75 bits/dim
Source:    Ho et al. 2020, table 1; diffusion, scripts/run_cifar.py
Command:   python main.py --config=configs/ddpm/cifar10.py --workdir=runs/ddpm_cifar10
"""

from ml_collections import ConfigDict

from configs.bases import ddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ddpm.cifar10()
