"""DDPM on CelebA-HQ at 256 px.

Published: samples without a figure
Source:    Ho et al. 2020, appendix B; diffusion, scripts/run_celebahq.py
Command:   python main.py --config=configs/ddpm/celebahq.py --workdir=runs/ddpm_celebahq
"""

from ml_collections import ConfigDict

from configs.bases import datasets, ddpm


def get_config() -> ConfigDict:
  """The settings of the run."""
  return ddpm.at_256(datasets.CELEBA_HQ_256, 500_000)
