"""Exponential moving averages of the parameters: several half-lives in images, power functions, and
averages of any length put together after the training.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

Decay = Callable[[Array], Array]  # step (from 0) -> weight of the old average


def half_life_decay(batch_size: int, half_life_images: float, ramp_up: float) -> Decay:
  """0.5^(batch / half-life) with the half-life at most `ramp_up` times the images seen (Karras et
  al. 2022, appendix F.2); 0 is no ramp-up.
  """

  def decay(step):
    seen = (step + 1) * batch_size
    longest = ramp_up * seen if ramp_up else jnp.inf
    return 0.5 ** (batch_size / jnp.maximum(jnp.minimum(half_life_images, longest), 1e-8))

  return decay


def exponent(sigma_rel: float) -> float:
  """gamma of the power function average t^gamma whose relative standard deviation is `sigma_rel`
  (Karras et al. 2024, "Analyzing and improving the training dynamics", section 3.1).
  """
  inverse = sigma_rel**-2
  return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_decay(sigma_rel: float) -> Decay:
  """(1 - 1 / n)^(gamma + 1) at the n-th step: the average weighs step i by about i^gamma (the
  same).
  """
  power = exponent(sigma_rel) + 1
  return lambda step: (1 - 1 / (step + 1)) ** power


def decays(config: ConfigDict) -> list[Decay]:
  """The averages that a run keeps: those of `ema.half_life_images`, then those of
  `ema.sigma_rel`.
  """
  settings, batch_size = config.ema, config.training.batch_size
  lives = [half_life_decay(batch_size, h, settings.ramp_up) for h in settings.half_life_images]
  return lives + [power_decay(s) for s in settings.sigma_rel]


def update(averages: tuple, params: PyTree, step: Array, config: ConfigDict) -> tuple:
  """Each average d old + (1 - d) params after the step with this number (from 0)."""
  weigh = lambda d: lambda old, new: new + d * (old - new)
  return tuple(
    jax.tree.map(weigh(decay(step)), average, params)
    for decay, average in zip(decays(config), averages)
  )


def _inner_products(t1, gamma1, t2, gamma2) -> np.ndarray:
  """Integrals of the products of the profiles (g + 1) / t^(g + 1) tau^g on [0, t]."""
  shorter = np.minimum(t1, t2)
  logs = (gamma1 + gamma2 + 1) * np.log(shorter) - (gamma1 + 1) * np.log(t1)
  logs = logs - (gamma2 + 1) * np.log(t2)
  return (gamma1 + 1) * (gamma2 + 1) / (gamma1 + gamma2 + 1) * np.exp(logs)


def post_hoc_weights(
  steps: np.ndarray, sigma_rels: np.ndarray, step: int, sigma_rel: float
) -> np.ndarray:
  """Weights of stored power function averages whose sum is nearest to the one at `step` of relative
  standard deviation `sigma_rel`, by least squares over their profiles (the same, section 3.2).

  Args:
    steps: [n] when each was stored.
    sigma_rels: [n] of which relative standard deviation it is.
  """
  t, gamma = np.asarray(steps, np.float64), np.array([exponent(s) for s in sigma_rels])
  gram = _inner_products(t[:, None], gamma[:, None], t[None], gamma[None])
  target = _inner_products(t, gamma, float(step), exponent(sigma_rel))
  weights = np.linalg.lstsq(gram, target, rcond=None)[0]
  return weights / weights.sum()
