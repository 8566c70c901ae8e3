"""EDM on CIFAR-10 with the NCSN++ network.

Published: FID 1.98 with 35 network evaluations
Source:    Karras et al. 2022, table 2; edm, README
Command:   python main.py --config=configs/edm/cifar10_ncsnpp.py --workdir=runs/edm_cifar10_ncsnpp
"""

from ml_collections import ConfigDict

from configs.bases import edm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return edm.cifar10(edm.NCSNPP)
