"""Denoising loss per noise level, beside what predictors without a network reach."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from losses import noise_error
from parameterization import NoiseFn
from sde_lib import SDE, fold_in, marginal


def loss_per_level(
  key: Key[Array, ""],
  sde: SDE,
  noise_fn: NoiseFn,
  x0: Float[Array, "b *d"],
  times: Float[Array, " t"],
  num_draws: int,
) -> Float[Array, "t b"]:
  """E ||noise_hat - noise||^2 / D of each example at each time, over `num_draws` draws; 1 for
  noise_hat = 0.
  """

  def level(position):
    i, t = position
    errors = [
      noise_error(fold_in(key, i * num_draws + j), sde, noise_fn, x0, t) for j in range(num_draws)
    ]
    return sum(errors) / num_draws / x0[0].size

  return jax.lax.map(level, (jnp.arange(len(times)), times))


def gaussian_predictor_loss(
  sde: SDE, x0: Float[np.ndarray, "b *d"], times: Float[Array, " t"]
) -> Float[np.ndarray, " t"]:
  """The same loss of the best predictor for Gaussian data with the mean and covariance of x0.

  Per eigenvalue v of the covariance: alpha^2 v / (alpha^2 v + sigma^2).
  """
  eigenvalues = np.linalg.eigvalsh(np.cov(x0.reshape(len(x0), -1).astype(np.float64), rowvar=False))
  alpha, sigma = (np.asarray(c, np.float64)[:, None] for c in marginal(sde, times))
  signal = alpha**2 * np.maximum(eigenvalues, 0.0)
  return (signal / (signal + sigma**2)).mean(1)
