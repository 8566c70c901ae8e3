"""Improved DDPM: Nichol & Dhariwal 2021, and its code, openai/improved-diffusion.

L_vlb is counted in nats here, in bits there: its weight in L_hybrid, 0.001, is divided by ln 2.
"""

import math

from ml_collections import ConfigDict

from configs import bases
from configs.bases import datasets

# the code tells 1000 i / 4000, i from 0, where it rescales times, and i where it does not
RESCALED, UNSCALED = bases.told("noise", "t999"), bases.told("noise", "index")
COSINE = bases.process("iddpm", num_steps=4000) | {"sampling": {"num_steps": 3999}}
LEARNED = {"sampling": {"options": {"ancestral": {"variance": "learned", "clip": True}}}}
HYBRID = {
  "loss": {"objective": "hybrid", "options": {"hybrid": {"vlb_weight": 0.001 / math.log(2)}}}
}
SAMPLED = {"time_sampler": "loss_second_moment", "options": {"vlb": {"variance": "learned"}}}
VLB = {"loss": {"objective": "vlb"} | SAMPLED}

UNET = {"nf": 128, "num_res_blocks": 3, "attn_resolutions": (16, 8), "learned_variance": True}
CIFAR10 = bases.changed(ch_mult=(1, 2, 2, 2), dropout=0.3)
IMAGENET_64 = bases.changed(ch_mult=(1, 2, 3, 4), dropout=0.0)
CONDITIONAL = bases.changed(nf=192, num_classes=1000)
AT_256 = bases.changed(ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
SMALLER = {"num_res_blocks": 2, "attn_resolutions": (16,), "num_heads": 1}
LSUN = bases.changed(**SMALLER, use_scale_shift_norm=False)


def cifar10(*changes: dict) -> ConfigDict:
  """CIFAR-10, 4000 levels."""
  trained = bases.training(1e-4, 128, 500_000, 0.9999)
  return _config(datasets.CIFAR10, trained, COSINE, RESCALED, CIFAR10, *changes)


def imagenet64(*changes: dict) -> ConfigDict:
  """ImageNet at 64 px without labels, 4000 levels."""
  trained = bases.training(1e-4, 128, 1_500_000, 0.9999)
  data = datasets.IMAGENET_64_UNLABELLED
  return _config(data, trained, COSINE, RESCALED, IMAGENET_64, *changes)


def imagenet64_conditional() -> ConfigDict:
  """The wider network with labels."""
  trained = bases.training(3e-4, 2048, 250_000, 0.9999)
  return _config(datasets.IMAGENET_64, trained, COSINE, UNSCALED, IMAGENET_64, CONDITIONAL)


def bedroom(learning_rate: float, batch_size: int, num_steps: int) -> ConfigDict:
  """LSUN bedroom at 256 px, the 1000 levels of DDPM."""
  trained = bases.training(learning_rate, batch_size, num_steps, 0.9999)
  return _config(datasets.lsun("bedroom"), trained, bases.CHAIN, UNSCALED, AT_256, LSUN)


def _config(*parts: dict) -> ConfigDict:
  shared = bases.PLAIN, bases.LEVELS, bases.AT_LEVELS, HYBRID, LEARNED
  return bases.published(*shared, bases.network("adm", **UNET), *parts)
