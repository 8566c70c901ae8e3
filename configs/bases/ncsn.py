"""NCSN and NCSNv2: Song & Ermon 2019 and 2020, and their codes, ermongroup/ncsn and ncsnv2.

Published setting without a field here: the choice among checkpoints by a quick FID.
"""

from ml_collections import ConfigDict

from configs import bases
from configs.bases import datasets

STARTED = {"sampling": {"init": "unit_uniform"}}
# the way of 2019: dequantized data, samples with the noise of the last step
NOISY = {"training": {"dequantize": True}, "sampling": {"denoise": "none"}}
LEVELS_2019 = bases.annealed(1.0, 10, 2e-5, 100)
NCSN = bases.network("ncsn", nf=128, num_scales=10) | bases.told("score", "index_from_noise")
MNIST = bases.changed(nf=64) | {"data": {"flip": False}}

CLEAN = {"sampling": {"denoise": "tweedie"}}
CIFAR10 = bases.annealed(50.0, 232, 6.2e-6, 5)
CELEBA = bases.annealed(90.0, 500, 3.3e-6, 5)
CHURCH = bases.annealed(140.0, 788, 4.9e-6, 4)
LSUN_128 = bases.annealed(190.0, 1086, 1.8e-6, 3)
FFHQ = bases.annealed(348.0, 2311, 0.9e-6, 3)
NCSNV2 = bases.network("ncsnv2", nf=128) | bases.told("scaled_score", "index_from_noise")
DEEPER = bases.changed(resolution_class=128)
DEEPEST = bases.changed(resolution_class=256)
EPS = {"optimizer": {"options": {"adam": {"eps": 1e-3}}}}
AT_256 = EPS | bases.batch(32, ema_rate=0.999)


def ncsn(data: dict, *changes: dict) -> ConfigDict:
  """The one setting of NCSN on a data set, with changes."""
  trained = bases.training(1e-3, 128, 200_000, 0.0)
  return _config(data, trained, LEVELS_2019, NOISY, NCSN, *changes)


def ncsnv2(data: dict, levels: dict, num_steps: int, *changes: dict) -> ConfigDict:
  """NCSNv2 with the noise levels that its techniques gave for the data set, with changes."""
  trained = bases.training(1e-4, 128, num_steps, 0.999)
  return _config(data, trained, levels, CLEAN, NCSNV2, *changes)


def original(data: dict, num_steps: int) -> ConfigDict:
  """The network of NCSNv2 in the setting of NCSN."""
  trained = bases.training(1e-3, 128, num_steps, 0.0)
  return _config(data, trained, LEVELS_2019, NOISY, NCSNV2)


def _config(*parts: dict) -> ConfigDict:
  shared = bases.PLAIN, bases.FLIPPED, STARTED, datasets.UNCENTERED
  return bases.published(*shared, *parts)
