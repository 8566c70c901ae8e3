"""Improved DDPM on LSUN bedroom at 256 px, learning rate 1e-4.

Published: no figure
Source:    Nichol & Dhariwal 2021; improved-diffusion, README
Command:   python main.py --config=configs/iddpm/bedroom.py --workdir=runs/iddpm_bedroom
"""

from ml_collections import ConfigDict

from configs.bases import iddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return iddpm.bedroom(1e-4, 128, num_steps=1_200_000)
