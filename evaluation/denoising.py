"""Denoising loss per noise level, beside what predictors without a network reach."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import devices
from evaluation.batches import keys_of, labels_of, parts, spread
from experiment import Experiment
from losses import noise_error
from parameterization import NoiseFn
from sde_lib import SDE, Keys, fold_in, log_snr, marginal, time_of_log_snr


def loss_per_level(
  key: Keys,
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


class HeldOut:
  """The denoising loss of a held-out split at noise levels even in log-SNR, always with the same
  noise.
  """

  def __init__(self, experiment: Experiment):
    self.experiment, self.options = experiment, experiment.config.evaluation
    sde, count = experiment.sde, self.options.num_levels
    self.log_snrs = jnp.linspace(log_snr(sde, sde.t_min), log_snr(sde, sde.t_max), count)
    self.times = time_of_log_snr(sde, self.log_snrs)

  @functools.cached_property
  def _levels(self) -> Callable:
    """(params, one key per example, stored values [b, *d], labels [b]) -> loss / D [b, levels]."""
    experiment, transform = self.experiment, self.experiment.transform

    def levels(params, keys, k, labels):
      x0, noise_fn = transform.dequantize(fold_in(keys, 0), k), experiment.noise_fn(params)
      given = lambda x, t, _: noise_fn(x, t, experiment.labels(labels))
      return loss_per_level(
        fold_in(keys, 1), experiment.sde, given, x0, self.times, self.options.num_draws
      ).T

    return experiment.over_devices(levels, 3)

  def losses(self, params: PyTree) -> np.ndarray:
    """[examples, levels] in float64, of `evaluation.num_examples` (0: all)."""
    split, losses = self.experiment.dataset.splits[self.options.split], []
    count, key = len(split["image"]), jax.random.key(self.options.seed)
    rows = spread(count, self.options.num_examples or count)
    for position, valid in parts(len(rows), self.options.batch_size, "held-out loss"):
      index = rows[position]
      examples = split["image"][index], labels_of(split, index)
      values = self._levels(params, keys_of(key, index), *examples)
      losses.append(np.asarray(devices.to_host(values), np.float64)[:valid])
    return np.concatenate(losses)

  def scalars(self, params: PyTree) -> dict[str, float]:
    """The mean loss, and that of each level by its log-SNR."""
    levels = self.losses(params).mean(0)
    named = {f"held_out_loss/log_snr{s:+.1f}": v for s, v in zip(self.log_snrs.tolist(), levels)}
    return {"held_out_loss": levels.mean()} | named
