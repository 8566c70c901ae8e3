"""EDM on ImageNet at 64 px with labels and the ADM network.

Published: FID 1.36 with 511 network evaluations
Source:    Karras et al. 2022, abstract; edm, README
Command:   python main.py --config=configs/edm/imagenet64_adm.py --workdir=runs/edm_imagenet64_adm
"""

from ml_collections import ConfigDict

from configs.bases import edm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return edm.imagenet64()
