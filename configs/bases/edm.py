"""EDM: Karras et al. 2022, and its code, NVlabs/edm (configuration F).

Published setting without a field here: float16 with loss scaling for ImageNet (here bfloat16).
"""

import math

from ml_collections import ConfigDict

from configs import bases
from configs.bases import datasets

EDM = {
  **bases.process("edm", sigma_min=0.002, sigma_max=80.0),
  "parameterization": {"output": "edm", "c_noise": "log_sigma4", "sigma_data": 0.5},
  "loss": {"weighting": "edm", "time_sampler": "log_normal"},
  "optimizer": {"grad_clip": math.inf},
  "ema": {"ramp_up": 0.05},
  "sampling": {"sampler": "edm", "spacing": "karras", "denoise": "tweedie"},
}
SONG = {"nf": 128, "num_res_blocks": 4, "attn_resolutions": (16,)}
UNFILTERED = {"embedding_type": "positional", "fir": False, "progressive_input": "none"}
NCSNPP = bases.network("ncsnpp", **SONG)
DDPMPP = bases.network("ncsnpp", **SONG, **UNFILTERED)
TEN_CLASSES = bases.changed(num_classes=10, classes_first=True)
DHARIWAL = {"nf": 192, "ch_mult": (1, 2, 3, 4), "num_res_blocks": 3, "dropout": 0.1}
HEADS = {"attn_resolutions": (32, 16, 8), "num_head_channels": 64}
CLASSES = {"num_classes": 1000, "learned_variance": False, "resblock_updown": True}
ADM = bases.network("adm", **DHARIWAL, **HEADS, **CLASSES, dtype="bfloat16")
CHURN = {"gamma": 40 / 256, "churn_min": 0.05, "churn_max": 50.0, "noise_scale": 1.003}


def trained(learning_rate: float, batch_size: int, million_images: int, half_life: float) -> dict:
  """The part that sets the training, counted in millions of images, 10 of them warm-up."""
  return {
    "optimizer": {"learning_rate": learning_rate, "warmup_steps": 10_000_000 // batch_size},
    "training": {"batch_size": batch_size, "num_steps": million_images * 1_000_000 // batch_size},
    "ema": {"half_life_images": (half_life * 1e6,)},
  }


def augmented(probability: float) -> dict:
  """The part that augments the images and tells the network how."""
  return {"data": {"augment": probability}} | bases.changed(augment_dim=9)


def levels(count: int) -> dict:
  """Steps of Heun between `count` levels, and one of Euler to zero: 2 count - 1 evaluations."""
  return {"sampling": {"num_steps": count - 1}}


def cifar10(network: dict, *changes: dict) -> ConfigDict:
  """CIFAR-10."""
  parts = trained(1e-3, 512, 200, 0.5), levels(18), augmented(0.12)
  narrow = bases.changed(ch_mult=(2, 2, 2), dropout=0.13)
  return bases.published(EDM, datasets.CIFAR10, *parts, network, narrow, *changes)


def at_64(data: dict, network: dict, dropout: float) -> ConfigDict:
  """FFHQ and AFHQv2 at 64 px."""
  parts = trained(2e-4, 256, 200, 0.5), levels(40), augmented(0.15)
  wide = bases.changed(ch_mult=(1, 2, 2, 2), dropout=dropout)
  return bases.published(EDM, data, *parts, network, wide)


def imagenet64() -> ConfigDict:
  """ImageNet at 64 px with labels."""
  parts = trained(1e-4, 4096, 2500, 50.0), levels(256)
  churn = {"sampling": {"options": {"edm": CHURN}}}
  return bases.published(EDM, datasets.IMAGENET_64, *parts, ADM, churn)
