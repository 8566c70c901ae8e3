"""The SDE framework: Song et al. 2021, and its code, yang-song/score_sde.

Published settings without a field here: losses summed over the values of an image
(reduce_mean=False; here always their mean, which also changes what clipping at norm 1 does); VP and
sub-VP sampled down to t = 1e-3 but trained from 1e-5 (one t_min here).
"""

from ml_collections import ConfigDict

from configs import bases
from configs.bases import datasets
from configs.bases.datasets import UNCENTERED

UNET = {"nf": 128, "ch_mult": (1, 2, 2, 2), "attn_resolutions": (16,), "dropout": 0.1}
ONCE = {"num_res_blocks": 2, "attn_every_block": False}
LARGE = {"ch_mult": (1, 1, 2, 2, 4, 4), "dropout": 0.0}
DDPM = bases.network("ddpm", **UNET | ONCE)
DDPM_256 = bases.network("ddpm", **UNET | ONCE | LARGE)
UNTOLD = bases.changed(conditional=False)

POSITIONAL = UNET | {"num_res_blocks": 4, "embedding_type": "positional"}
NCSNPP = bases.network("ncsnpp", **POSITIONAL)
DDPMPP = bases.network("ncsnpp", **POSITIONAL, fir=False, progressive_input="none")
FOURIER = bases.changed(embedding_type="fourier")
DEEP = bases.changed(num_res_blocks=8) | {"training": {"num_steps": 950_000}}

SKIPS = {"progressive": "output_skip", "progressive_input": "input_skip", "dropout": 0.0}
AT_256 = {"ch_mult": (1, 1, 2, 2, 2, 2, 2), "num_res_blocks": 2}
AT_1024 = {"nf": 16, "ch_mult": (1, 2, 4, 8, 16, 32, 32, 32), "num_res_blocks": 1}
NCSNPP_256 = bases.network("ncsnpp", **UNET | SKIPS | AT_256)
NCSNPP_1024 = bases.network("ncsnpp", **UNET | SKIPS | AT_1024)

LINEAR = {"beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-5}
EULER = {"sampling": {"sampler": "euler_maruyama", "spacing": "time", "num_steps": 1000}}
VP = bases.process("vp", **LINEAR) | bases.told("noise", "t999") | EULER
SUB_VP = VP | bases.process("sub_vp", **LINEAR)
BETA = {"ancestral": {"variance": "beta"}}
VP_DISCRETE = (
  bases.CHAIN
  | bases.told("noise", "index")
  | {"sampling": bases.CHAIN["sampling"] | {"options": BETA}}
)
REVERSE_DIFFUSION = {"sampling": {"sampler": "reverse_diffusion"}}


def ve(sigma_max: float, snr: float, num_steps: int = 1000) -> dict:
  """The continuous VE SDE from 0.01 to `sigma_max` on data in [0, 1], for a Fourier network, and
  `num_steps` steps of predictor and corrector.
  """
  sampling = {
    "sampler": "predictor_corrector",
    "options": {"predictor_corrector": {"snr": snr}},
    "spacing": "time",
    "num_steps": num_steps - 1,
    "denoise": "tweedie",
  }
  part = bases.process("ve", sigma_min=0.01, sigma_max=sigma_max, t_min=1e-5)
  return part | bases.told("scaled_score", "log_sigma") | {"sampling": sampling} | UNCENTERED


def smld(sigma_max: float, snr: float) -> dict:
  """The same for 1000 discrete levels and a network told their index, the largest noise first."""
  part, levels = ve(sigma_max, snr), bases.noise_scales(sigma_max, 1000)
  sampling = {"sampling": part["sampling"] | levels["sampling"]}
  return part | levels | bases.told("scaled_score", "index_from_noise") | sampling


VE = ve(50.0, 0.16)
SMLD = smld(50.0, 0.16)


def cifar10(process: dict, *parts: dict, ema_rate: float = 0.9999) -> ConfigDict:
  """A network and its changes on CIFAR-10."""
  return _config(datasets.CIFAR10, bases.training(2e-4, 128, 1_300_000, ema_rate), process, *parts)


def ve_cifar10(process: dict, *parts: dict) -> ConfigDict:
  """The same for VE, whose EMA is shorter."""
  return cifar10(process, *parts, ema_rate=0.999)


def vp_256(data: dict) -> ConfigDict:
  """DDPM at 256 px."""
  return _config(data, bases.training(2e-5, 64, 2_400_000, 0.9999), VP_DISCRETE, DDPM_256)


def ve_64(data: dict) -> ConfigDict:
  """NCSN++ with discrete levels at 64 px."""
  return _config(data, bases.training(2e-4, 128, 1_300_000, 0.999), smld(90.0, 0.17), NCSNPP)


def ve_256(data: dict, sigma_max: float) -> ConfigDict:
  """NCSN++ at 256 px."""
  process = ve(sigma_max, 0.075, num_steps=2000)
  return _config(data, bases.training(2e-4, 64, 2_400_000, 0.999), process, NCSNPP_256)


def ve_1024(data: dict) -> ConfigDict:
  """NCSN++ at 1024 px."""
  few = {"sampling": {"num_samples": 8, "batch_size": 8}, "likelihood": {"batch_size": 8}}
  process = ve(1348.0, 0.15, num_steps=2000)
  return _config(data, bases.training(2e-4, 8, 2_400_000, 0.9999), process, NCSNPP_1024, few)


def ald(sigma_max: float, num_scales: int, snr: float, num_steps: int) -> dict:
  """Noise levels and the corrector "ald" without a predictor, `num_steps` of (snr sigma)^2 on each:
  annealed Langevin dynamics.
  """
  return bases.annealed(sigma_max, num_scales, 2 * (snr * 0.01) ** 2, num_steps)


# the levels of Song & Ermon 2019; those of techniques 1, 2 and 4 of Song & Ermon 2020
LEVELS_2019 = ald(1.0, 10, 0.316, 100)
CIFAR10_LEVELS = ald(50.0, 232, 0.176, 5)
CELEBA_LEVELS = ald(90.0, 500, 0.128, 5)
BEDROOM_LEVELS = ald(190.0, 1086, 0.095, 3)


def ncsn(data: dict, levels: dict, ema_rate: float = 0.0) -> ConfigDict:
  """NCSN (2019) in this code's widths; with an EMA it is technique 5."""
  trained = bases.training(1e-3, 128, 1_300_000, ema_rate)
  network = bases.network("ncsn", nf=128, num_scales=levels["sde"]["args"]["num_scales"])
  return _refinenet(data, levels, trained, network, "score")


def ncsnv2(data: dict, levels: dict) -> ConfigDict:
  """NCSNv2 in this code's widths."""
  trained = bases.training(1e-4, 128, 1_300_000, 0.999)
  network = bases.network("ncsnv2", nf=128)
  return _refinenet(data, levels, trained, network, "scaled_score")


def ncsnv2_128(data: dict, levels: dict) -> ConfigDict:
  """The deeper network at 128 px."""
  trained = bases.training(1e-4, 128, 2_400_000, 0.9999)
  network = bases.network("ncsnv2", nf=128, resolution_class=128)
  return _refinenet(data, levels, trained, network, "scaled_score")


def _refinenet(data: dict, levels: dict, trained: dict, network: dict, output: str) -> ConfigDict:
  parts = levels, trained, network, bases.told(output, "index_from_noise")
  return _config(data, *parts, bases.changed(decoder_widths="score_sde"), bases.PLAIN, UNCENTERED)


def _config(*parts: dict) -> ConfigDict:
  return bases.published({"seed": 42}, bases.FLIPPED, *parts)
