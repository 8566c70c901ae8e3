"""Training objectives: w(t) ||noise_hat - noise||^2 under a law of t; weightings and time samplers
are tables.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from parameterization import NoiseFn
from sde_lib import (
  SDE,
  Keys,
  Time,
  example_keys,
  fold_in,
  log_snr,
  log_snr_rate,
  normal,
  perturb,
  time_of_log_snr,
)

Weighting = Callable  # (sde, t [b]) -> w(t) [b]
Quantile = Callable  # (sde, u [b] in [0, 1)) -> (t [b], uniform density / density of t [b])
TimeSampler = Callable  # (keys [b], sde) -> the same pair

# w of w(t) ||noise_hat - noise||^2; likelihood and elbo by g^2 / sigma^2 = -d log-SNR / dt
WEIGHTINGS = {
  "simple": lambda sde, t: jnp.ones_like(t),  # Ho et al. 2020, eq. 14
  "likelihood": log_snr_rate,  # Song et al. 2021b (maximum likelihood training), eq. 7
  "elbo": lambda sde, t: 0.5 * log_snr_rate(sde, t),  # Kingma et al. 2021, eq. 16: nats
}


def uniform_quantile(sde: SDE, u: Float[Array, " b"]) -> tuple[Array, Array]:
  """t uniform on [t_min, t_max]."""
  return sde.t_min + (sde.t_max - sde.t_min) * u, jnp.ones_like(u)


def importance_quantile(sde: SDE, u: Float[Array, " b"]) -> tuple[Array, Array]:
  """t with density proportional to g^2 / sigma^2, that is uniform in log-SNR (Song et al. 2021b,
  section 5.1).

  Under the likelihood and elbo weightings the weight times the density ratio is a constant.
  """
  most, least = log_snr(sde, sde.t_min), log_snr(sde, sde.t_max)
  t = time_of_log_snr(sde, most + (least - most) * u)
  return t, (most - least) / (sde.t_max - sde.t_min) / log_snr_rate(sde, t)


TIME_SAMPLERS = {"uniform": uniform_quantile, "importance": importance_quantile}


def independent(quantile: Quantile) -> TimeSampler:
  """Draws each example's time on its own."""
  return lambda keys, sde: quantile(sde, jax.vmap(jax.random.uniform)(keys))


def stratified(quantile: Quantile, key: Key[Array, ""], index: Array, total: int) -> TimeSampler:
  """One uniform draw shifted by index / total: times that cover a batch evenly (Kingma et al. 2021,
  appendix I.1).

  Args:
    index: [b] positions of these examples in the global batch of `total`, so that devices share one
      draw.
  """
  u = (jax.random.uniform(key) + index / total) % 1
  return lambda keys, sde: quantile(sde, u)


def denoising_loss(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x0: Float[Array, "b *d"],
  *,
  weighting: Weighting,
  time_sampler: TimeSampler,
  labels: Array | None = None,
) -> Float[Array, " b"]:
  """Weighted denoising score matching of each example (Song et al. 2021, eq. 7), summed over
  dimensions.

  An unbiased estimate of the integral of w(t) E||noise_hat - noise||^2 over [t_min, t_max], divided
  by its length; with "elbo" that is nats. `key` is one key, or one per example.
  """
  keys = example_keys(key, x0.shape[0])
  t, density_ratio = time_sampler(fold_in(keys, 0), sde)
  return (
    density_ratio * weighting(sde, t) * noise_error(fold_in(keys, 1), sde, noise_fn, x0, t, labels)
  )


def noise_error(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x0: Float[Array, "b *d"],
  t: Time,
  labels: Array | None = None,
) -> Float[Array, " b"]:
  """||noise_hat - noise||^2 of each example at time t (scalar or [b]) for one draw of the noise; D
  for noise_hat = 0.
  """
  noise = normal(key, x0.shape)
  error = noise_fn(perturb(sde, x0, noise, t), t, labels) - noise
  return (error**2).reshape(x0.shape[0], -1).sum(1)
