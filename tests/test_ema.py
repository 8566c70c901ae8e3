"""Averages of the parameters against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

import ema


def averaged(config, values):
  """The averages after one scalar parameter has had these values, from 0."""
  averages = tuple(jnp.zeros(()) for _ in ema.decays(config))
  for step, value in enumerate(values):
    averages = ema.update(averages, jnp.asarray(value), jnp.asarray(step), config)
  return np.array(averages)


def test_each_average_is_the_weighted_sum_of_its_decays(x64):
  """ema_n = sum_k w_k params_k, w_k = (1 - d_k) prod_{j > k} d_j."""
  changes = {"ema__half_life_images": (20.0, 0.0), "ema__sigma_rel": (0.1,), "ema__ramp_up": 0.5}
  config, values = tiny_config(**changes), np.random.default_rng(0).normal(size=12)
  n = np.arange(1, 13)
  power = (1 - 1 / n) ** (ema.exponent(0.1) + 1)
  decays = 0.5 ** (8 / np.minimum(20.0, 0.5 * 8 * n)), np.zeros(12), power
  for average, d in zip(averaged(config, values), decays):
    weights = [(1 - d[k]) * np.prod(d[k + 1 :]) for k in range(12)]
    np.testing.assert_allclose(average, np.dot(weights, values), rtol=1e-10)


@pytest.mark.parametrize("batch_size", [10, 50])
def test_the_half_life_is_in_images(batch_size):
  """After half-life / batch steps an old value weighs one half, whatever the batch size."""
  for ramp_up in (0.05, 0.0):
    decay = ema.half_life_decay(batch_size, 1000.0, ramp_up)(jnp.asarray(10**6))
    np.testing.assert_allclose(decay ** (1000 / batch_size), 0.5, rtol=1e-4)
  first = ema.half_life_decay(batch_size, 1000.0, 0.0)(jnp.asarray(0))
  np.testing.assert_allclose(first, decay)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_width_of_a_power_function_is_its_relative_standard_deviation(x64, sigma_rel):
  """The weights of the steps of a long run have this standard deviation, relative to its length."""
  num_steps, decay = 20_000, ema.power_decay(sigma_rel)
  d = np.asarray(jax.vmap(decay)(jnp.arange(num_steps)))
  later = np.concatenate([np.cumprod(d[:0:-1])[::-1], [1.0]])
  weights, n = (1 - d) * later, np.arange(1, num_steps + 1)
  np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-10)
  mean = weights @ n
  deviation = np.sqrt(weights @ (n - mean) ** 2)
  np.testing.assert_allclose(deviation / num_steps, sigma_rel, rtol=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.07, 0.15, 0.2])
def test_an_average_put_together_is_the_one_that_would_have_been_kept(x64, sigma_rel):
  """On a parameter that drifts and oscillates; the snapshots are of widths 0.05 and 0.25."""
  num_steps, every = 400, 20
  values = np.sqrt(np.arange(num_steps)) + np.sin(np.arange(num_steps) / 30)
  kept = {w: 0.0 for w in (0.05, 0.25, sigma_rel)}
  stored = []
  for step, value in enumerate(values):
    for width in kept:
      d = float(ema.power_decay(width)(jnp.asarray(float(step))))
      kept[width] = value + d * (kept[width] - value)
    if (step + 1) % every == 0:
      stored += [(step + 1, width, kept[width]) for width in (0.05, 0.25)]
  steps, widths, averages = map(np.array, zip(*stored))
  weights = ema.post_hoc_weights(steps, widths, num_steps, sigma_rel)
  np.testing.assert_allclose(weights @ averages, kept[sigma_rel], rtol=2e-3)
  np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-12)


def test_a_stored_average_is_itself():
  """The profile that is looked for is among the stored ones."""
  weights = ema.post_hoc_weights([10, 10, 20, 20], [0.05, 0.1, 0.05, 0.1], 20, 0.1)
  np.testing.assert_allclose(weights, [0, 0, 0, 1], atol=1e-6)
