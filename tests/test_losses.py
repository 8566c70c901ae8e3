"""The objective on Gaussian data in closed form, weightings and time samplers by quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PAPER, diagonal

import losses
from losses import TIME_SAMPLERS, WEIGHTINGS
from sde_lib import make_sde, marginal

names = pytest.mark.parametrize("name", PAPER)
LAW = diagonal([1.5, -0.5], [0.3, 2.0])


def smallest_error(paper, t, variances=(0.3, 2.0)):
  """min E||noise_hat - noise||^2 at time t: the summed variance of the noise given x_t."""
  kept = [paper.alpha(t) ** 2 * v / paper.variance(t, v) for v in variances]
  return np.sum(kept, axis=0)


def quadrature(low=0.0):
  """Gauss-Legendre nodes and weights on [low, 1], in panels that shrink towards `low`."""
  edges = low + (1 - low) * np.concatenate(
    [[0], np.geomspace(1e-9, 1 / 16, 30), np.linspace(1 / 16, 1, 16)[1:]]
  )
  x, w = np.polynomial.legendre.leggauss(12)
  width = np.diff(edges)[:, None]
  return (edges[:-1, None] + width * (x + 1) / 2).ravel(), (width * w / 2).ravel()


@names
@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
def test_exact_noise_prediction_has_the_smallest_error(x64, monkeypatch, name, t):
  """The expectation over (x_0, noise) by Gauss-Hermite quadrature, exact for a quadratic."""
  nodes, weights = np.polynomial.hermite_e.hermegauss(2)
  first, second = (grid.reshape(-1, 1) for grid in np.meshgrid(nodes, nodes))
  x0 = LAW.mean + np.sqrt(LAW.variances) * first
  monkeypatch.setattr(losses, "normal", lambda key, shape: jnp.broadcast_to(second, shape))
  sde = make_sde(name)
  error = losses.noise_error(jax.random.key(0), sde, LAW.noise_fn(sde), jnp.asarray(x0), t)
  mean = error @ np.outer(weights, weights).ravel() / weights.sum() ** 2
  np.testing.assert_allclose(mean, smallest_error(PAPER[name], np.array(t)), rtol=1e-10)


@pytest.mark.parametrize(
  "name, sampler", [("vp", "uniform"), ("sub_vp", "importance"), ("ve", "importance")]
)
def test_denoising_loss_estimates_its_integral(name, sampler):
  """The mean over 20,000 examples: the integral of the smallest error, within 4 standard errors."""
  sde, n = make_sde(name), 20_000
  options = {
    "weighting": WEIGHTINGS["elbo"],
    "time_sampler": losses.independent(TIME_SAMPLERS[sampler]),
  }
  loss = jax.jit(lambda key, x0: losses.denoising_loss(key, sde, LAW.noise_fn(sde), x0, **options))
  value = loss(jax.random.key(1), LAW.sample(jax.random.key(0), n))
  t, weights = quadrature(sde.t_min)
  paper = PAPER[name]
  rate = paper.g_squared(t) / paper.sigma(t) ** 2
  expected = weights @ (0.5 * rate * smallest_error(paper, t)) / (sde.t_max - sde.t_min)
  assert value.shape == (n,)
  assert abs(value.mean() - expected) < 4 * value.std() / np.sqrt(n)


@names
def test_weightings(x64, name):
  sde, paper = make_sde(name), PAPER[name]
  t = np.linspace(0.01, 1.0, 5)
  rate = paper.g_squared(t) / paper.sigma(t) ** 2
  for weighting, expected in {"simple": np.ones(5), "likelihood": rate, "elbo": rate / 2}.items():
    np.testing.assert_allclose(WEIGHTINGS[weighting](sde, jnp.asarray(t)), expected, rtol=1e-10)


@names
def test_uniform_times(x64, name):
  sde, u = make_sde(name), jnp.linspace(0.0, 1.0, 5)
  t, ratio = TIME_SAMPLERS["uniform"](sde, u)
  np.testing.assert_allclose(t, sde.t_min + np.asarray(u) * (1 - sde.t_min), rtol=1e-14)
  np.testing.assert_array_equal(ratio, np.ones(5))


@names
def test_importance_times_are_uniform_in_log_snr(x64, name):
  sde, paper = make_sde(name), PAPER[name]
  u = np.linspace(0.0, 1.0, 101)
  t, _ = TIME_SAMPLERS["importance"](sde, jnp.asarray(u))
  most, least = paper.log_snr(np.array([sde.t_min, sde.t_max]))
  np.testing.assert_allclose(paper.log_snr(np.asarray(t)), most + (least - most) * u, atol=1e-8)


@names
def test_importance_density_is_proportional_to_the_likelihood_weight(x64, name):
  """The second output is uniform density / density: its inverse is g^2 / sigma^2 over its mean."""
  sde, paper = make_sde(name), PAPER[name]
  t, ratio = TIME_SAMPLERS["importance"](sde, jnp.linspace(0.0, 1.0, 101))
  rate = paper.g_squared(np.asarray(t)) / paper.sigma(np.asarray(t)) ** 2
  most, least = paper.log_snr(np.array([sde.t_min, sde.t_max]))
  mean_rate = (most - least) / (sde.t_max - sde.t_min)
  np.testing.assert_allclose(1 / ratio, rate / mean_rate, rtol=1e-9)


@names
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_time_samplers_estimate_the_same_integral(x64, name, weighting):
  sde, (u, weights) = make_sde(name), quadrature()

  def expectation(sampler):
    t, ratio = TIME_SAMPLERS[sampler](sde, jnp.asarray(u))
    error = smallest_error(PAPER[name], np.asarray(t))
    return weights @ np.asarray(ratio * WEIGHTINGS[weighting](sde, t) * error)

  np.testing.assert_allclose(expectation("importance"), expectation("uniform"), rtol=1e-6)


def stratified_u(key, index, total):
  """The numbers in [0, 1) that a stratified sampler hands to its quantile function."""
  return losses.stratified(lambda sde, u: u, key, index, total)(None, None)


def test_stratified_times_cover_each_stratum_once():
  for seed in range(5):
    u = stratified_u(jax.random.key(seed), jnp.arange(16), 16)
    np.testing.assert_array_equal(np.sort(np.floor(u * 16)), np.arange(16))


def test_stratified_draws_are_uniform():
  """The first example's u over 2,000 keys: every tenth of [0, 1] equally often."""
  keys = jax.random.split(jax.random.key(0), 2000)
  first = jax.vmap(lambda key: stratified_u(key, jnp.arange(4), 4)[0])(keys)
  counts = np.histogram(first, np.linspace(0, 1, 11))[0]
  assert (abs(counts - 200) < 4 * np.sqrt(200 * 0.9)).all()


def test_stratified_slices_agree_with_the_whole():
  sde, key, total = make_sde("vp"), jax.random.key(0), 8
  quantile = TIME_SAMPLERS["importance"]
  times = jax.jit(lambda index: losses.stratified(quantile, key, index, total)(None, sde))
  whole, parts = times(jnp.arange(8)), [times(jnp.arange(i, i + 2)) for i in (0, 2, 4, 6)]
  np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


def test_losses_do_not_depend_on_the_batch_size():
  sde, x0 = make_sde("vp"), LAW.sample(jax.random.key(0), 7)
  options = {
    "weighting": WEIGHTINGS["likelihood"],
    "time_sampler": losses.independent(TIME_SAMPLERS["importance"]),
  }
  key, noise_fn = jax.random.key(1), LAW.noise_fn(sde)
  loss = jax.jit(lambda x0: losses.denoising_loss(key, sde, noise_fn, x0, **options))
  np.testing.assert_allclose(loss(x0[:3]), loss(x0)[:3], rtol=1e-6)


def test_labels_reach_the_noise_function():
  """At x_0 = 0 the noise is x / sigma, so the label is the error."""
  sde, x0 = make_sde("vp"), jnp.zeros((2, 3))
  noise_fn = lambda x, t, labels: x / marginal(sde, t)[1] + labels[:, None]
  error = losses.noise_error(jax.random.key(0), sde, noise_fn, x0, 0.5, jnp.array([0, 2]))
  np.testing.assert_allclose(error, [0, 12], rtol=1e-5, atol=1e-10)
