"""Improved DDPM on LSUN bedroom at 256 px, learning rate 2e-5 (batch 64, as the checkpoint's name).

Published: no figure
Source:    Nichol & Dhariwal 2021; improved-diffusion, README
Command:   python main.py --config=configs/iddpm/bedroom_slow.py --workdir=runs/iddpm_bedroom_slow
"""

from ml_collections import ConfigDict

from configs.bases import iddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return iddpm.bedroom(2e-5, 64, num_steps=2_400_000)
