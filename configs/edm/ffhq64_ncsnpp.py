"""EDM on FFHQ at 64 px with the NCSN++ network.

Published: FID 2.53 with 79 network evaluations
Source:    Karras et al. 2022, table 2; edm, README
Command:   python main.py --config=configs/edm/ffhq64_ncsnpp.py --workdir=runs/edm_ffhq64_ncsnpp
"""

from ml_collections import ConfigDict

from configs.bases import datasets, edm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return edm.at_64(datasets.ffhq(64, "lanczos"), edm.NCSNPP, dropout=0.05)
