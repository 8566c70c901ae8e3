"""The forward process dx = f(t) x dt + g(t) dw, given by its marginals N(alpha(t) x_0, sigma(t)^2
I).

Everything else (f, g, log-SNR, posterior) is derived here, once, for every process.
"""

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from errors import ConfigError, check, lookup

Time = Float[Array, ""] | Float[Array, " b"] | np.ndarray | np.floating | float | int
Keys = Key[Array, ""] | Key[Array, " b"]


@dataclasses.dataclass(frozen=True)
class SDE:
  """Linear SDE dx = f(t) x dt + g(t) dw whose marginals are p(x_t | x_0) = N(alpha(t) x_0,
  sigma(t)^2 I).

  Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 5 and 29, with affine drift.
  `log_alpha` and `log_sigma` act elementwise on times and are differentiated: plain jnp, no custom
  rules.
  """

  log_alpha: Callable
  log_sigma: Callable
  t_min: float  # integration ends here: the data end
  t_max: float  # the prior end
  prior_std: float  # std of the prior: 1 for VP and sub-VP, sigma_max for VE
  times: Array | np.ndarray | None = None  # the training grid of a discrete-time model, increasing


def expand(v: Time, x: Float[Array, "b *d"]) -> Array:
  """Gives a scalar or one value per example the rank of `x`, so that `expand(v, x) * x` scales
  examples.
  """
  v = jnp.asarray(v)
  return v.reshape(v.shape + (1,) * (x.ndim - 1)) if v.ndim else v


def example_keys(key: Keys, b: int, first_index: int | Array = 0) -> Key[Array, " b"]:
  """One key per example, a function of its global index only: independent of batch size and device
  count.

  `key` is one key, or already one key per example, which is returned as it is.
  """
  if key.ndim:
    return key
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(first_index + jnp.arange(b))


def fold_in(key: Keys, data: int | Array) -> Keys:
  """`jax.random.fold_in` for one key or for one key per example."""
  return (
    jax.vmap(jax.random.fold_in, (0, None))(key, data)
    if key.ndim
    else jax.random.fold_in(key, data)
  )


def normal(key: Keys, shape: tuple[int, ...]) -> Float[Array, "b *d"]:
  """Standard normal noise of `shape` [b, *d], example i from the i-th key of `example_keys`."""
  return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(example_keys(key, shape[0]))


def marginal(sde: SDE, t: Time) -> tuple[Array, Array]:
  """(alpha(t), sigma(t)) of p(x_t | x_0) = N(alpha x_0, sigma^2 I), each of the shape of `t`."""
  t = jnp.asarray(t, jnp.result_type(float))
  return jnp.exp(sde.log_alpha(t)), jnp.exp(sde.log_sigma(t))


def _rates(sde: SDE, t: Time) -> tuple[Array, Array]:
  """(d log_alpha / dt, d log-SNR / dt)."""
  t = jnp.asarray(t, jnp.result_type(float))
  d_alpha = jax.jvp(sde.log_alpha, (t,), (jnp.ones_like(t),))[1]
  d_sigma = jax.jvp(sde.log_sigma, (t,), (jnp.ones_like(t),))[1]
  return d_alpha, 2 * (d_alpha - d_sigma)


def coefficients(sde: SDE, t: Time) -> tuple[Array, Array]:
  """(f(t), g(t)^2): f = d log_alpha / dt and g^2 = -sigma^2 d log-SNR / dt (Kingma et al. 2021, eq.
  18-19).
  """
  f, d_log_snr = _rates(sde, t)
  return f, -(marginal(sde, t)[1] ** 2) * d_log_snr


def log_snr(sde: SDE, t: Time) -> Array:
  """log alpha(t)^2 / sigma(t)^2, decreasing in t."""
  t = jnp.asarray(t, jnp.result_type(float))
  return 2 * (sde.log_alpha(t) - sde.log_sigma(t))


def log_snr_rate(sde: SDE, t: Time) -> Array:
  """-d log-SNR / dt = g^2 / sigma^2: the density over time of a time sampler uniform in log-SNR."""
  return -_rates(sde, t)[1]


def time_of_log_snr(sde: SDE, value: Time) -> Array:
  """Inverse of `log_snr` on [t_min, t_max] by bisection to the last bit; values outside are
  clamped.
  """
  value = jnp.asarray(value, jnp.result_type(float))

  def halve(_, bracket):
    low, high = bracket
    middle = (low + high) / 2
    noisier = log_snr(sde, middle) < value
    return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

  ends = jnp.full_like(value, sde.t_min), jnp.full_like(value, sde.t_max)
  return jax.lax.fori_loop(0, 80, halve, ends)[1]


def perturb(
  sde: SDE, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Time
) -> Float[Array, "b *d"]:
  """x_t = alpha(t) x_0 + sigma(t) noise; `t` is a scalar or [b]."""
  alpha, sigma = marginal(sde, t)
  return expand(alpha, x0) * x0 + expand(sigma, x0) * noise


def transition(sde: SDE, s: Time, t: Time) -> tuple[Array, Array]:
  """(a, variance) of the forward kernel q(x_t | x_s) = N(a x_s, variance I), s < t: a = alpha_t /
  alpha_s, variance = sigma_t^2 - a^2 sigma_s^2 (Kingma et al. 2021, appendix A.1), without the
  difference.
  """
  keep = jnp.exp(sde.log_alpha(t) - sde.log_alpha(s))
  return keep, -(marginal(sde, t)[1] ** 2) * jnp.expm1(log_snr(sde, t) - log_snr(sde, s))


def posterior(
  sde: SDE, x_t: Float[Array, "b *d"], x0: Float[Array, "b *d"], t: Time, s: Time
) -> tuple[Float[Array, "b *d"], Array]:
  """Mean and std of q(x_s | x_t, x_0) for s < t (Ho et al. 2020, eq. 7; Kingma et al. 2021,
  appendix A).

  With d = log-SNR(t) - log-SNR(s) < 0: mean = (alpha_s / alpha_t) e^d x_t - alpha_s expm1(d) x_0
  and variance = -sigma_s^2 expm1(d), without a difference of variances. std has the shape of `t`.
  """
  alpha_s, sigma_s = marginal(sde, s)
  d = log_snr(sde, t) - log_snr(sde, s)
  keep = jnp.exp(sde.log_alpha(jnp.asarray(s)) - sde.log_alpha(jnp.asarray(t)) + d)
  mean = expand(keep, x_t) * x_t - expand(alpha_s * jnp.expm1(d), x_t) * x0
  return mean, sigma_s * jnp.sqrt(-jnp.expm1(d))


def sample_prior(key: Keys, sde: SDE, shape: tuple[int, ...]) -> Float[Array, "b *d"]:
  """Draws x at t_max from N(0, prior_std^2 I); `key` is one key or one per example."""
  return sde.prior_std * normal(key, shape)


def prior_log_prob(sde: SDE, z: Float[Array, "b *d"]) -> Float[Array, " b"]:
  """Log-density of the prior N(0, prior_std^2 I) at each example, in nats."""
  logp = -0.5 * (z / sde.prior_std) ** 2 - jnp.log(sde.prior_std * jnp.sqrt(2 * jnp.pi))
  return logp.reshape(z.shape[0], -1).sum(1)


def vp(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> SDE:
  """Variance preserving: beta(t) linear on [0, 1], sigma^2 = 1 - alpha^2 (Song et al. 2021, eq. 11
  and 32).
  """

  def log_alpha(t):
    return -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min

  return SDE(log_alpha, lambda t: 0.5 * jnp.log(-jnp.expm1(2 * log_alpha(t))), t_min, 1.0, 1.0)


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> SDE:
  """Sub-VP: alpha of `vp`, sigma = 1 - alpha^2 (Song et al. 2021, eq. 12 and 29)."""
  log_alpha = vp(beta_min, beta_max).log_alpha
  return SDE(log_alpha, lambda t: jnp.log(-jnp.expm1(2 * log_alpha(t))), t_min, 1.0, 1.0)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 0.0) -> SDE:
  """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021,
  eq. 9 and 30).

  sigma(0) = sigma_min: the data end is the data convolved with N(0, sigma_min^2 I).
  """
  log_min, log_ratio = jnp.log(sigma_min), jnp.log(sigma_max / sigma_min)
  return SDE(jnp.zeros_like, lambda t: log_min + t * log_ratio, t_min, 1.0, sigma_max)


def cosine(s: float = 0.008, t_min: float = 1e-5, t_max: float = 0.999) -> SDE:
  """Variance preserving, alpha = cos(phi(t)) / cos(phi(0)), phi = (t + s) / (1 + s) pi / 2 (Nichol
  &
  Dhariwal 2021, eq. 17), ended at `t_max` before alpha reaches zero.

  With d = phi(t) - phi(0): sigma^2 = sin(d) sin(d + 2 phi(0)) / cos(phi(0))^2, exact for small t.
  """
  start, rate = s / (1 + s) * np.pi / 2, np.pi / 2 / (1 + s)

  def log_sigma(t):
    both = jnp.log(jnp.sin(rate * t)) + jnp.log(jnp.sin(rate * t + 2 * start))
    return 0.5 * both - np.log(np.cos(start))

  def log_alpha(t):
    direct = jnp.log(jnp.cos(rate * t + start)) - np.log(np.cos(start))
    small = jnp.minimum(log_sigma(t), -0.5)
    return jnp.where(log_sigma(t) < -0.5, 0.5 * jnp.log1p(-jnp.exp(2 * small)), direct)

  return SDE(log_alpha, log_sigma, t_min, t_max, 1.0)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> SDE:
  """alpha = 1, sigma = t (Karras et al. 2022, table 1)."""
  return SDE(jnp.zeros_like, jnp.log, sigma_min, sigma_max, sigma_max)


def rectified(t_min: float = 1e-3, t_max: float = 0.999) -> SDE:
  """The straight path alpha = 1 - t, sigma = t (Liu et al. 2023, eq. 1; Lipman et al. 2023, eq.
  20).

  Its f and g^2 are unbounded at t = 1, so it is ended at `t_max`.
  """
  return SDE(lambda t: jnp.log1p(-t), jnp.log, t_min, t_max, 1.0)


def user(alpha: Callable, sigma: Callable, *, t_min: float, t_max: float, prior_std: float) -> SDE:
  """A process of your own from two elementwise functions of time, alpha(t) > 0 and sigma(t) > 0.

  alpha^2 / sigma^2 must decrease. Where rounding matters, build `SDE` from the logarithms instead.
  """
  return SDE(lambda t: jnp.log(alpha(t)), lambda t: jnp.log(sigma(t)), t_min, t_max, prior_std)


def _tabulated(log_alphas: np.ndarray, log_sigmas: np.ndarray, prior_std: float) -> SDE:
  """A discrete-time model of N levels at t = i / N, i = 1 .. N; between them logs are interpolated.

  Values and slopes are float64 tables cast last: a slope formed in float32 from neighbouring values
  would be off by 2e-4 for 4,000 levels.
  """
  check(len(log_alphas) > 1, "number of levels", len(log_alphas), "a whole number from 2 up")
  times = np.arange(1, len(log_alphas) + 1) / len(log_alphas)

  def interpolate(table):
    slopes = np.diff(table, append=2 * table[-1] - table[-2]) * len(table)

    def at(t):
      i = jnp.maximum(jnp.searchsorted(jnp.asarray(times), t, side="right") - 1, 0)
      value, slope, knot = (jnp.asarray(a)[i] for a in (table, slopes, times))
      return value + slope * (t - knot)

    return at

  return SDE(interpolate(log_alphas), interpolate(log_sigmas), times[0], 1.0, prior_std, times)


def _from_betas(betas: np.ndarray) -> SDE:
  """The variance-preserving chain x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z_i."""
  log_alphas = 0.5 * np.cumsum(np.log1p(-betas))
  return _tabulated(log_alphas, 0.5 * np.log(-np.expm1(2 * log_alphas)), 1.0)


def ddpm(beta_min: float = 1e-4, beta_max: float = 0.02, num_steps: int = 1000) -> SDE:
  """The chain of DDPM: betas linear in the step (Ho et al. 2020, section 4)."""
  return _from_betas(np.linspace(beta_min, beta_max, num_steps))


def iddpm(num_steps: int = 4000, s: float = 0.008, max_beta: float = 0.999) -> SDE:
  """The chain of improved DDPM: cosine alpha-bar, betas clipped (Nichol & Dhariwal 2021, eq.
  17).
  """
  abar = np.cos((np.arange(num_steps + 1) / num_steps + s) / (1 + s) * np.pi / 2) ** 2
  return _from_betas(np.minimum(1 - abar[1:] / abar[:-1], max_beta))


def ncsn(sigma_max: float = 1.0, sigma_min: float = 0.01, num_scales: int = 10) -> SDE:
  """The noise levels of NCSN: geometric, alpha = 1 (Song & Ermon 2019, section 4.2).

  t = i / L is the i-th smallest level, so time grows with the noise; the first and last are exact.
  """
  sigmas = np.geomspace(sigma_min, sigma_max, num_scales)
  return _tabulated(np.zeros(num_scales), np.log(sigmas), sigma_max)


def make_sde(name: str, **kwargs) -> SDE:
  """The process `SDES[name](**kwargs)`; an unknown name or argument raises and lists the legal
  ones.
  """
  schedule = lookup(SDES, name, "sde.name")
  legal = inspect.signature(schedule).parameters
  for argument in kwargs.keys() - legal.keys():
    raise ConfigError(
      f"sde.args.{argument} is not an argument of {name!r}.\n  legal: {', '.join(legal)}"
    )
  return schedule(**kwargs)


SDES = {
  "vp": vp,
  "sub_vp": sub_vp,
  "ve": ve,
  "cosine": cosine,
  "edm": edm,
  "rectified": rectified,
  "ddpm": ddpm,
  "iddpm": iddpm,
  "ncsn": ncsn,
}
