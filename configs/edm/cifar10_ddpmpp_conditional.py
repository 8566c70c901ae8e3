r"""EDM on CIFAR-10 with labels and the DDPM++ network.

Published: FID 1.79 with 35 network evaluations
Source:    Karras et al. 2022, table 2; edm, README
Command:   python main.py --config=configs/edm/cifar10_ddpmpp_conditional.py \
             --workdir=runs/edm_cifar10_ddpmpp_conditional
"""

from ml_collections import ConfigDict

from configs.bases import edm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return edm.cifar10(edm.DDPMPP, edm.TEN_CLASSES)
