"""Laws with closed forms, and the processes of Song et al. 2021 as the paper writes them.

A law's parameters are float64 numpy arrays and its arithmetic is jnp, so it follows the precision
in force. x is [b, D]; alpha and sigma, those of x = alpha x_0 + sigma noise, are scalars or [b].
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sde_lib import marginal


def _columns(alpha, sigma):
  return jnp.reshape(alpha, (-1, 1)), jnp.reshape(sigma, (-1, 1))


class Law:
  """The functions a sampler or a loss takes, from the noised `score` of the law."""

  def __getattribute__(self, name):
    """Copies parameters at each use: jax keeps a numpy constant in the first precision it met."""
    value = super().__getattribute__(name)
    return jnp.asarray(value.copy()) if isinstance(value, np.ndarray) else value

  def score_fn(self, sde):
    return lambda x, t, labels=None: self.score(x, *marginal(sde, t))

  def noise_fn(self, sde):
    def noise(x, t, labels=None):
      alpha, sigma = marginal(sde, t)
      return -jnp.reshape(sigma, (-1, 1)) * self.score(x, alpha, sigma)

    return noise


@dataclasses.dataclass(frozen=True)
class Gaussian(Law):
  """N(mean, basis diag(variances) basis^T), mean and variances [1, D]; variances may be zero."""

  mean: np.ndarray
  variances: np.ndarray
  basis: np.ndarray

  def sample(self, key, n):
    z = jax.random.normal(key, (n, self.mean.size))
    return self.mean + (jnp.sqrt(self.variances) * z) @ self.basis.T

  def _noised(self, x, alpha, sigma):
    """Coordinates of x about the noised mean along the basis, and the noised variances."""
    alpha, sigma = _columns(alpha, sigma)
    return (x - alpha * self.mean) @ self.basis, alpha**2 * self.variances + sigma**2

  def log_prob(self, x, alpha=1.0, sigma=0.0):
    y, variances = self._noised(x, alpha, sigma)
    return -0.5 * (y**2 / variances + jnp.log(2 * jnp.pi * variances)).sum(1)

  def score(self, x, alpha=1.0, sigma=0.0):
    y, variances = self._noised(x, alpha, sigma)
    return -(y / variances) @ self.basis.T

  def denoise(self, x, alpha, sigma):
    """E[x_0 | x] by conditioning the joint law of (x_0, x)."""
    y, variances = self._noised(x, alpha, sigma)
    gain = jnp.reshape(alpha, (-1, 1)) * self.variances / variances
    return self.mean + (gain * y) @ self.basis.T

  def flow(self, sde, x, t, s):
    """Where the probability flow takes x from time t to time s."""
    y, before = self._noised(x, *marginal(sde, t))
    _, after = self._noised(x, *marginal(sde, s))
    return marginal(sde, s)[0] * self.mean + (y * jnp.sqrt(after / before)) @ self.basis.T

  def flow_log_det(self, sde, t, s):
    """log |d flow / d x|, the same for every x."""
    _, before = self._noised(jnp.zeros_like(self.mean), *marginal(sde, t))
    _, after = self._noised(jnp.zeros_like(self.mean), *marginal(sde, s))
    return 0.5 * jnp.log(after / before).sum()


def diagonal(mean, variances) -> Gaussian:
  """N(mean, diag(variances))."""
  return Gaussian(np.array([mean]), np.array([variances]), np.eye(len(mean)))


def rotated(mean, variances, seed=0) -> Gaussian:
  """A Gaussian of the given eigenvalues whose covariance is a full matrix."""
  basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(mean), len(mean))))[0]
  return Gaussian(np.array([mean]), np.array([variances]), basis)


@dataclasses.dataclass(frozen=True)
class Mixture(Law):
  """sum_k weights_k N(means_k, variance I): weights [1, k], means [k, D]."""

  weights: np.ndarray
  means: np.ndarray
  variance: float

  def _noised(self, x, alpha, sigma):
    """x minus each noised mean [b, k, D], the noised variance, the joint log-densities [b, k]."""
    alpha, sigma = _columns(alpha, sigma)
    y = x[:, None] - alpha[:, :, None] * self.means[None]
    variance = alpha**2 * self.variance + sigma**2
    log_norm = 0.5 * x.shape[1] * jnp.log(2 * jnp.pi * variance)
    return y, variance, jnp.log(self.weights) - log_norm - 0.5 * (y**2).sum(2) / variance

  def log_prob(self, x, alpha=1.0, sigma=0.0):
    return jax.nn.logsumexp(self._noised(x, alpha, sigma)[2], axis=1)

  def score(self, x, alpha=1.0, sigma=0.0):
    y, variance, logits = self._noised(x, alpha, sigma)
    return -(jax.nn.softmax(logits)[:, :, None] * y).sum(1) / variance

  def denoise(self, x, alpha, sigma):
    """E[x_0 | x]: each component's conditional mean, by its posterior probability."""
    y, variance, logits = self._noised(x, alpha, sigma)
    gain = (jnp.reshape(alpha, (-1, 1)) * self.variance / variance)[:, :, None]
    return (jax.nn.softmax(logits)[:, :, None] * (self.means[None] + gain * y)).sum(1)


def empirical(points) -> Mixture:
  """The uniform law on `points` [n, D]."""
  return Mixture(np.full((1, len(points)), 1 / len(points)), np.asarray(points), 0.0)


@dataclasses.dataclass(frozen=True)
class Bits(Law):
  """Independent values of -1 or +1 with P(+1) = p: p [1, D]."""

  p: np.ndarray

  def log_prob(self, x, alpha, sigma):
    alpha, sigma = _columns(alpha, sigma)
    up = jnp.log(self.p) - 0.5 * ((x - alpha) / sigma) ** 2
    down = jnp.log1p(-self.p) - 0.5 * ((x + alpha) / sigma) ** 2
    return (jnp.logaddexp(up, down) - jnp.log(sigma * jnp.sqrt(2 * jnp.pi))).sum(1)

  def score(self, x, alpha, sigma):
    denoised = self.denoise(x, alpha, sigma)
    alpha, sigma = _columns(alpha, sigma)
    return (alpha * denoised - x) / sigma**2

  def denoise(self, x, alpha, sigma):
    """E[x_0 | x], a tanh of the log-odds."""
    alpha, sigma = _columns(alpha, sigma)
    return jnp.tanh(alpha * x / sigma**2 + 0.5 * jnp.log(self.p / (1 - self.p)))


@dataclasses.dataclass(frozen=True)
class Process:
  """The float64 numpy closed forms of one process, as functions of time."""

  alpha: Callable
  sigma: Callable
  f: Callable
  g_squared: Callable

  def log_snr(self, t):
    return 2 * np.log(self.alpha(t) / self.sigma(t))

  def variance(self, t, v):
    """Variance at time t of data of variance v."""
    return self.alpha(t) ** 2 * v + self.sigma(t) ** 2


def _beta(t):
  return 0.1 + 19.9 * t


def _integral_of_beta(t):
  return 0.1 * t + 9.95 * t**2


# Song et al. 2021, appendices B and C, for the default arguments
PAPER = {
  "vp": Process(
    lambda t: np.exp(-0.5 * _integral_of_beta(t)),
    lambda t: np.sqrt(-np.expm1(-_integral_of_beta(t))),
    lambda t: -0.5 * _beta(t),
    _beta,
  ),
  "sub_vp": Process(
    lambda t: np.exp(-0.5 * _integral_of_beta(t)),
    lambda t: -np.expm1(-_integral_of_beta(t)),
    lambda t: -0.5 * _beta(t),
    lambda t: _beta(t) * -np.expm1(-2 * _integral_of_beta(t)),
  ),
  "ve": Process(
    np.ones_like,
    lambda t: 0.01 * 5000.0**t,
    np.zeros_like,
    lambda t: 2 * np.log(5000.0) * (0.01 * 5000.0**t) ** 2,
  ),
}
