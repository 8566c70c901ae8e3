"""The variational bound of a discrete chain, level by level: divergences of reverse kernels, the
discretized decoder, the prior, and the chain's weight along one path.

Level i (from 0) stands at `sde.times[i]`; below level 0 are the data. Nats, summed over dimensions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Int

from errors import check, lookup
from parameterization import VARIANCES, NoiseFn, data_from_noise, reverse_kernel
from sde_lib import SDE, Time, expand, marginal, perturb, posterior


def level_times(sde: SDE) -> Float[Array, " n"]:
  """The times of the levels of a discrete chain; a process without levels raises."""
  legal = "a process with levels, such as 'ddpm', 'iddpm' or 'ncsn'"
  check(sde.times is not None, "sde", "a process in continuous time", legal, "set sde.name to one")
  return jnp.asarray(sde.times, jnp.result_type(float))


def sum_dims(x: Float[Array, "b *d"]) -> Float[Array, " b"]:
  """The sum over each example's dimensions."""
  return x.reshape(x.shape[0], -1).sum(1)


def _divergence(log_ratio: Array, difference: Array) -> Array:
  """KL(N(m, s^2) || N(n, r^2)) elementwise from log(r / s) and (m - n) / r: no term is large where
  the laws agree.
  """
  return log_ratio + 0.5 * jnp.expm1(-2 * log_ratio) + 0.5 * difference**2


class Prediction(NamedTuple):
  """What the network says at one level: the noise, v of a reverse step, v of the decoder."""

  noise: Array
  v: Array | float
  decoder_v: Array | float


def predict(
  noise_fn: NoiseFn, x: Float[Array, "b *d"], t: Time, labels: Array | None, variance: str
) -> Prediction:
  """The `Prediction` for a name in `VARIANCES`.

  A fixed variance of the decoder is beta~ of the second level, for "beta" too, as in the code of Ho
  et al. 2020; a learned one lies between it and beta of the first.
  """
  noise, v = lookup(VARIANCES, variance, "variance")(noise_fn, x, t, labels)
  return Prediction(noise, v, v if variance == "learned" else 0.0)


def log_bin_probability(
  x0: Float[Array, "b *d"], mean: Array, std: Array, transform
) -> Float[Array, "b *d"]:
  """log of the mass of N(mean, std^2) on the bin of each value; the end bins reach to infinity (Ho
  et al. 2020, eq. 13).

  Args:
    x0: centres of bins.
    transform: declares `low`, `high` and `bin_width`, as `data.Transform`.
  """
  half = 0.5 * transform.bin_width
  low, high = (x0 - half - mean) / std, (x0 + half - mean) / std
  # mirrored into the lower tail, where logarithms of the normal law keep their digits
  mirrored = low + high > 0
  below, above = (log_ndtr(jnp.where(mirrored, -a, b)) for a, b in ((high, low), (low, high)))
  gap = jnp.minimum(below - above, -jnp.finfo(x0.dtype).tiny)  # rounded to 0 far out: log 0
  inside = above + jnp.log(-jnp.expm1(gap))
  last = jnp.where(x0 > transform.high - transform.bin_width, log_ndtr(-low), inside)
  return jnp.where(x0 < transform.low + transform.bin_width, log_ndtr(high), last)


def decoder_log_prob(
  sde: SDE, x0: Float[Array, "b *d"], x: Array, prediction: Prediction, transform, clip: bool
) -> Float[Array, " b"]:
  """log p(x_0 | x) for x at level 0, Gaussian about the predicted data: of bins, or without
  levels the density.

  beta~ of the first step is 0, so that of the second stands for it (Nichol & Dhariwal 2021, section
  3.1).
  """
  times = level_times(sde)
  data = data_from_noise(sde, x, prediction.noise, times[0])
  data = jnp.clip(data, -1, 1) if clip else data
  clipped = posterior(sde, x, x0, times[1], times[0])[1]
  std = clipped * (marginal(sde, times[0])[1] / clipped) ** prediction.decoder_v
  if transform and transform.levels:
    return sum_dims(log_bin_probability(x0, data, std, transform))
  density = -0.5 * ((x0 - data) / std) ** 2 - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)
  return sum_dims(density)


def _kernels(sde, x0, x, prediction, level, clip):
  """Of a step down from `level` > 0: (mean, std) of q(x_s | x_t, x_0), then of p(x_s | x_t)."""
  times = level_times(sde)
  t, s = times[level], times[level - 1]
  mean, std = posterior(sde, x, x0, t, s)
  model = reverse_kernel(sde, x, prediction.noise, prediction.v, t, s, clip)
  return mean, expand(std, x), *model


def level_term(
  sde: SDE,
  x0: Float[Array, "b *d"],
  x: Float[Array, "b *d"],
  prediction: Prediction,
  level: Int[Array, " b"] | Int[Array, ""],
  transform,
  clip: bool = False,
) -> Float[Array, " b"]:
  """The bound's term of each example at its level, for x there: KL(q(x_s | x_t, x_0) || p(x_s |
  x_t)), or at level 0 -log p(x_0 | x_1) (Ho et al. 2020, eq. 5).
  """
  mean, std, model_mean, model_std = _kernels(sde, x0, x, prediction, jnp.maximum(level, 1), clip)
  divergence = _divergence(jnp.log(model_std / std), (mean - model_mean) / model_std)
  decoder = -decoder_log_prob(sde, x0, x, prediction, transform, clip)
  return jnp.where(level == 0, decoder, sum_dims(divergence))


def prior_term(sde: SDE, x0: Float[Array, "b *d"]) -> Float[Array, " b"]:
  """L_T = KL(q(x_T | x_0) || N(0, prior_std^2)) of each example at the last level, in continuous
  time at t_max (Ho et al. 2020, eq. 5).
  """
  alpha, sigma = marginal(sde, sde.t_max if sde.times is None else level_times(sde)[-1])
  return sum_dims(_divergence(jnp.log(sde.prior_std / sigma), alpha * x0 / sde.prior_std))


def log_weight(
  draw: Callable[[Array], Array],
  sde: SDE,
  noise_fn: NoiseFn,
  x0: Float[Array, "b *d"],
  *,
  variance: str,
  transform,
  clip: bool = False,
  labels: Array | None = None,
) -> Float[Array, " b"]:
  """log p(x_{0:T}) - log q(x_{1:T} | x_0) along a path drawn from q, downwards (Sohl-Dickstein et
  al. 2015, eq. 9): the mean of its exponential is p(x_0), that of its negative the bound.

  `draw(i)` is the standard normal noise [b, *d] of the state at level i.
  """
  times = level_times(sde)

  def ratio(log_ratio, z, x, mean, std):
    return sum_dims(-log_ratio + 0.5 * z**2 - 0.5 * ((x - mean) / std) ** 2)

  def descend(carry, level):
    x, total = carry
    prediction = predict(noise_fn, x, times[level], labels, variance)
    mean, std, *model = _kernels(sde, x0, x, prediction, level, clip)
    z = draw(level - 1)
    lower = mean + std * z
    return (lower, total + ratio(jnp.log(model[1] / std), z, lower, *model)), None

  last = len(times) - 1
  z = draw(last)
  x = perturb(sde, x0, z, times[last])
  log_ratio = jnp.log(sde.prior_std / marginal(sde, times[last])[1])
  start = x, ratio(log_ratio, z, x, 0.0, sde.prior_std)
  (x, total), _ = jax.lax.scan(descend, start, jnp.arange(last, 0, -1))
  prediction = predict(noise_fn, x, times[0], labels, variance)
  return total + decoder_log_prob(sde, x0, x, prediction, transform, clip)
