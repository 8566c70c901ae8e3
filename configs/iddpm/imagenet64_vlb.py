r"""Improved DDPM on ImageNet 64x64, trained on the variational bound.

Published: FID 40.1, 3.53 bits/dim
Source:    Nichol & Dhariwal 2021; improved-diffusion, README
Command:   python main.py --config=configs/iddpm/imagenet64_vlb.py \
             --workdir=runs/iddpm_imagenet64_vlb
"""

from ml_collections import ConfigDict

from configs.bases import iddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return iddpm.imagenet64(iddpm.VLB)
