r"""EDM on AFHQv2 at 64 px with the DDPM++ network.

Published: FID 1.96 with 79 network evaluations
Source:    Karras et al. 2022, table 2; edm, README
Command:   python main.py --config=configs/edm/afhqv2_64_ddpmpp.py \
             --workdir=runs/edm_afhqv2_64_ddpmpp
"""

from ml_collections import ConfigDict

from configs.bases import datasets, edm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return edm.at_64(datasets.AFHQV2_64, edm.DDPMPP, dropout=0.25)
