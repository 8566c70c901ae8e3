"""Handwritten digits (scikit-learn, 8x8, 17 grey levels): the main job.

Command:   python main.py            (or python main.py --config=configs/digits.py:ve, :sub_vp)
Hardware:  2 CPU cores, 10 minutes
"""

from ml_collections import ConfigDict

from configs import bases
from errors import lookup

UNET = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "dropout": 0.1}
DIGITS = {"model": {"name": "ddpm", "args": UNET}, "parameterization": {"sigma_data": 0.75}}
PROCESSES = {
  "vp": bases.process("vp", beta_min=0.1, beta_max=20.0, t_min=1e-5),
  "sub_vp": bases.process("sub_vp", beta_min=0.1, beta_max=20.0, t_min=1e-3),
  "ve": bases.process("ve", sigma_min=0.01, sigma_max=20.0)
  | {"parameterization": {"output": "edm"}},
}


def get_config(process: str = "vp") -> ConfigDict:
  """The configuration; `process` is a key of `PROCESSES`."""
  return bases.config(DIGITS, lookup(PROCESSES, process, "--config=configs/digits.py:"))
