"""Handwritten digits (scikit-learn, 8x8, 17 grey levels): the main job.

Command:   python main.py            (or --config=configs/digits.py:ve, :sub_vp, :conditional)
Hardware:  2 CPU cores, 10 minutes
"""

from configs import bases
from errors import lookup

UNET = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "dropout": 0.1}
DIGITS = {"model": {"name": "ddpm", "args": UNET}, "parameterization": {"sigma_data": 0.75}}
# on 8x8 pixels no worse than a small wide ResNet, its gradient in x 25 times cheaper
PERCEPTRON = {"architecture": "mlp", "hidden": (512, 512, 512)}
CLASSIFIER = {"classifier": {"args": PERCEPTRON, "num_steps": 4000, "batch_size": 128}}
VP = bases.process("vp", beta_min=0.1, beta_max=20.0, t_min=1e-5)
SUB_VP = bases.process("sub_vp", beta_min=0.1, beta_max=20.0, t_min=1e-3)
VE = bases.process("ve", sigma_min=0.01, sigma_max=20.0) | {"parameterization": {"output": "edm"}}
CLASSES = {"model": {"args": {"num_classes": 10}}, "loss": {"label_dropout": 0.1}}
VARIANTS = {"vp": VP, "sub_vp": SUB_VP, "ve": VE, "conditional": VP | CLASSES}


def get_config(variant: str = "vp"):
  """The configuration; `variant` is a key of `VARIANTS`."""
  return bases.config(DIGITS, CLASSIFIER, lookup(VARIANTS, variant, "--config=configs/digits.py:"))
