"""Improved DDPM on ImageNet 64x64, L_hybrid.

Published: FID 19.2, 3.57 bits/dim
Source:    Nichol & Dhariwal 2021; improved-diffusion, README
Command:   python main.py --config=configs/iddpm/imagenet64.py --workdir=runs/iddpm_imagenet64
"""

from ml_collections import ConfigDict

from configs.bases import iddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return iddpm.imagenet64()
