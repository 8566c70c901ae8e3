"""DDPM on LSUN bedroom at 256 px.

Published: FID 6.36 (a larger network: 4.90)
Source:    Ho et al. 2020, table 3; diffusion, scripts/run_lsun.py
Command:   python main.py --config=configs/ddpm/bedroom.py --workdir=runs/ddpm_bedroom
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ddpm.at_256(datasets.lsun("bedroom"), 2_400_000)
