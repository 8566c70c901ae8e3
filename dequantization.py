"""Dequantization: laws of the state at t_min given integers k, each with its log-density, and the
bounds on log P(k) made of them.

log P(k) >= E_q[log p(x) - log q(x | k)] (Ho et al. 2019, "Flow++", eq. 11), in the model's units:
bits/dim = -(log p - log q) / (D log 2), with no further offset.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Num, PyTree

from bounds import sum_dims
from data import Transform
from errors import check
from likelihood import continuous_bound
from parameterization import NoiseFn
from sde_lib import SDE, Keys, example_keys, fold_in, marginal, normal, time_of_log_snr


class Dequantized(NamedTuple):
  """A draw for each example and its log-density under the law, nats."""

  x: Float[Array, "b *d"]
  log_q: Float[Array, " b"]


def uniform(key: Keys, sde: SDE, transform: Transform, k: Num[Array, "b *d"]) -> Dequantized:
  """Uniform in the bin of each value, taken as the state at t_min (Theis et al. 2016, section
  3.1).
  """
  x = transform.dequantize(key, k)
  return Dequantized(x, jnp.full(len(x), -x[0].size * jnp.log(transform.bin_width)))


def truncated_normal(
  key: Keys, sde: SDE, transform: Transform, k: Num[Array, "b *d"]
) -> Dequantized:
  """x = alpha (c + delta) at t_min, c the bin's centre and delta ~ N(0, (sigma / alpha)^2) within
  the bin (Zheng et al. 2023, "Improved techniques for maximum likelihood estimation for diffusion
  ODEs", section 4.2): the model's own noise, so nothing is trained and no start-time error is left.

  For a model of values at the centres, of a process that ends where the noise fits the bin:
  `matched`.
  """
  alpha, sigma = marginal(sde, sde.t_min)
  bound = 0.5 * transform.bin_width * alpha / sigma
  draw = lambda key: jax.random.truncated_normal(key, -bound, bound, k.shape[1:])
  noise = jax.vmap(draw)(example_keys(key, len(k)))
  mass = jnp.log(jax.scipy.special.erf(bound / np.sqrt(2)))
  log_q = sum_dims(-0.5 * noise**2 - jnp.log(sigma * np.sqrt(2 * np.pi)) - mass)
  return Dequantized(alpha * transform.forward(k) + sigma * noise, log_q)


def matched_time(sde: SDE, transform: Transform, bound: float = 3.0) -> float:
  """The time at which half a bin is `bound` standard deviations of the noise sigma / alpha. Raises
  where the process has no such time.
  """
  log_snr_there = 2 * np.log(2 * bound / transform.bin_width)
  t = float(time_of_log_snr(sde, log_snr_there))
  alpha, sigma = marginal(sde, t)
  found = float(0.5 * transform.bin_width * alpha / sigma)
  legal = f"a width that the process reaches: its nearest is {found:.3g}"
  check(abs(found / bound - 1) < 1e-3, "bound of the truncated normal", bound, legal)
  return t


def matched(sde: SDE, transform: Transform, bound: float = 3.0) -> SDE:
  """The process ended at `matched_time`, for `truncated_normal`; itself where its noise fills the
  bin already.
  """
  with jax.ensure_compile_time_eval():
    alpha, sigma = marginal(sde, sde.t_min)
    if 0.5 * transform.bin_width * alpha <= bound * sigma:
      return sde
    return dataclasses.replace(sde, t_min=matched_time(sde, transform, bound))


# likelihood.decoder: the lowest level of a chain, where half a bin is so many standard deviations
# of the noise
DECODERS = {"discretized": 1.5, "fitted": 0.5}

# name: (key, sde, transform, k [b, *d]) -> Dequantized
DEQUANTIZATIONS = {"uniform": uniform, "truncated_normal": truncated_normal}


class Dequantizer(nn.Module):
  """Mean and log std [b, *d] of the logit of u, the place of x in its bin, given the bins' centres:
  the simplest law of variational dequantization (Ho et al. 2019, "Flow++", section 3.1), Gaussian
  and independent over dimensions given k. At the start nearly uniform.

  Attributes:
    features: width of its two hidden layers.
  """

  features: int = 32

  @nn.compact
  def __call__(
    self, centres: Float[Array, "b *d"]
  ) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """Convolutions of width 3 over the axes between batch and channels; vectors have none."""
    axes, h = centres.ndim - 2, centres
    layer = (lambda n, **kw: nn.Conv(n, (3,) * axes, **kw)) if axes else nn.Dense
    for _ in range(2):
      h = nn.swish(layer(self.features)(h))
    out = layer(2 * centres.shape[-1], kernel_init=nn.initializers.zeros)(h)
    mean, log_std = jnp.split(out, 2, axis=-1)
    return mean, log_std + UNIFORM_LOG_STD


# of the normal law whose logistic function is nearest to uniform on [0, 1]: KL 0.01
UNIFORM_LOG_STD = np.log(1.6)


def variational(module: Dequantizer, params: PyTree) -> Callable:
  """The law of a trained `Dequantizer`, with the signature of `DEQUANTIZATIONS`, differentiable in
  `params`.
  """

  def law(key: Keys, sde: SDE, transform: Transform, k: Num[Array, "b *d"]) -> Dequantized:
    mean, log_std = module.apply({"params": params}, transform.forward(k))
    noise = normal(key, k.shape)
    logit = mean + jnp.exp(log_std) * noise
    slope = jax.nn.log_sigmoid(logit) + jax.nn.log_sigmoid(-logit)
    log_normal = -0.5 * noise**2 - 0.5 * np.log(2 * np.pi)
    log_q = sum_dims(log_normal - log_std - slope - np.log(transform.bin_width))
    u = jnp.minimum(jax.nn.sigmoid(logit), 1 - 2.0**-14)  # as `Transform.dequantize`
    return Dequantized(transform.low + (k + u) * transform.bin_width, log_q)

  return law


# name: (module, its parameters) -> a law of the signature of `DEQUANTIZATIONS`
TRAINED = {"variational": variational}


def dequantization_loss(
  key: Keys,
  law: Callable,
  sde: SDE,
  transform: Transform,
  noise_fn: NoiseFn,
  k: Num[Array, "b *d"],
  *,
  labels: Int[Array, " b"] | None = None,
) -> Float[Array, " b"]:
  """One draw of the bound -log P(k) <= E_q[log q(x | k) + `continuous_bound`(x)], nats, whose mean
  a variational law is trained on; the network may stay as it is.
  """
  keys = example_keys(key, len(k))
  x, log_q = law(fold_in(keys, 0), sde, transform, k)
  return log_q + continuous_bound(fold_in(keys, 1), sde, noise_fn, x, labels=labels)


def importance_bound(log_weights: Float[Array, "k b"]) -> Float[Array, " b"]:
  """log of the mean over K draws of p / q from log p - log q (Burda et al. 2016, eq. 8): a bound on
  log P(k) in expectation, tighter with K; one draw is the plain bound.
  """
  return jax.nn.logsumexp(log_weights, axis=0) - jnp.log(len(log_weights))


def bits_of_bound(log_weight: Float[Array, " b"], num_dims: int) -> Float[Array, " b"]:
  """Bits/dim of log p - log q, nats, for any law of `DEQUANTIZATIONS`, or of an
  `importance_bound`.
  """
  return -log_weight / (num_dims * jnp.log(2.0))
