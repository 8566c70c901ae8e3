r"""Improved DDPM on ImageNet 64x64 with labels, 270 million parameters.

Published: FID 2.92
Source:    Nichol & Dhariwal 2021; improved-diffusion, README
Command:   python main.py --config=configs/iddpm/imagenet64_conditional.py \
             --workdir=runs/iddpm_imagenet64_conditional
"""

from ml_collections import ConfigDict

from configs.bases import iddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return iddpm.imagenet64_conditional()
