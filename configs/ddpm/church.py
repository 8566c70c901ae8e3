"""DDPM on LSUN church at 256 px.

Published: FID 7.89
Source:    Ho et al. 2020, table 3; diffusion, scripts/run_lsun.py
Command:   python main.py --config=configs/ddpm/church.py --workdir=runs/ddpm_church
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ddpm.at_256(datasets.lsun("church_outdoor"), 1_200_000)
