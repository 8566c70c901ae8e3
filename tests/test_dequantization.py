"""Laws of dequantization against scipy's and quadrature, the bounds against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analytic import Mixture, diagonal
from scipy.stats import kstest, norm, truncnorm

import dequantization
from data import Transform
from dequantization import (
  DEQUANTIZATIONS,
  Dequantizer,
  bits_of_bound,
  dequantization_loss,
  importance_bound,
  matched_time,
  truncated_normal,
  uniform,
  variational,
)
from errors import ConfigError
from likelihood import bits_per_dim
from sde_lib import make_sde, marginal

TRANSFORM = Transform(17)
processes = pytest.mark.parametrize("name", ["vp", "ve", "cosine"])
laws = pytest.mark.parametrize("law", DEQUANTIZATIONS)


def matched(name, bound=3.0):
  return dequantization.matched(make_sde(name), TRANSFORM, bound)


def values(b, d):
  return jnp.arange(b * d).reshape(b, d) % TRANSFORM.levels


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_uniform_law_has_the_bits_of_its_levels(levels):
  """By the bound and by the density, whatever their number (PITFALLS, row 30)."""
  transform = Transform(levels)
  x, log_q = uniform(jax.random.key(0), make_sde("vp"), transform, jnp.zeros((3, 12), int))
  log_p = jnp.full(3, -12 * np.log(transform.high - transform.low))
  np.testing.assert_allclose(bits_of_bound(log_p - log_q, 12), np.log2(levels), rtol=2e-7)
  bits = bits_of_bound(log_p - log_q, 12)
  np.testing.assert_allclose(bits, bits_per_dim(log_p, 12, transform), rtol=2e-7)
  np.testing.assert_array_equal(transform.inverse(x), np.zeros((3, 12)))


@processes
@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_truncated_normal_against_scipy(name, bound):
  """Draws, log-density of each, and its integral over the bin by its own values."""
  sde = matched(name, bound)
  alpha, sigma = (float(c) for c in marginal(sde, sde.t_min))
  k = values(5000, 1)
  x, log_q = truncated_normal(jax.random.key(0), sde, TRANSFORM, k)
  centre = np.asarray(TRANSFORM.forward(k), np.float64)
  edge = alpha * TRANSFORM.bin_width / 2 / sigma
  np.testing.assert_allclose(edge, bound, rtol=2e-4)
  law = truncnorm(-edge, edge, scale=sigma)
  offset = np.asarray(x, np.float64) - alpha * centre
  np.testing.assert_allclose(log_q, law.logpdf(offset)[:, 0], atol=2e-3 / sigma * 1e-3 + 1e-3)
  assert kstest(offset[:, 0], law.cdf).pvalue > 1e-3
  np.testing.assert_array_equal(TRANSFORM.inverse(x / alpha), k)
  order = np.argsort(offset[:, 0])
  density = np.exp(np.asarray(log_q, np.float64))[order]
  covered = np.diff(law.cdf(offset[order[[0, -1]], 0]))
  np.testing.assert_allclose(np.trapezoid(density, offset[order, 0]), covered, atol=1e-3)


def test_log_density_adds_up_over_dimensions():
  sde, k = matched("vp"), values(2, 6)
  together = truncated_normal(jax.random.key(0), sde, TRANSFORM, k)
  alpha, sigma = (np.float64(c) for c in marginal(sde, sde.t_min))
  offset = np.asarray(together.x) - alpha * np.asarray(TRANSFORM.forward(k))
  each = truncnorm(-3, 3, scale=sigma).logpdf(offset)
  np.testing.assert_allclose(together.log_q, each.sum(1), atol=5e-3)


@laws
def test_bound_is_the_mass_of_the_bin_in_expectation(law):
  """E_q[p / q] = integral of p over the bin (of the state), p a Gaussian; one draw is below."""
  sde, n = matched("vp", 1.5), 40_000
  alpha = float(marginal(sde, sde.t_min)[0]) if law == "truncated_normal" else 1.0
  k = jnp.full((n, 1), 11)
  x, log_q = DEQUANTIZATIONS[law](jax.random.key(1), sde, TRANSFORM, k)
  weights = diagonal([0.1], [0.04]).log_prob(x) - log_q
  low, high = alpha * (-1 + TRANSFORM.bin_width * np.array([11, 12]))
  exact = np.log(np.diff(norm(0.1, 0.2).cdf([low, high])))[0]
  spread = float(jnp.exp(weights - exact).std()) / np.sqrt(n)
  np.testing.assert_allclose(importance_bound(weights[:, None])[0], exact, rtol=0, atol=5 * spread)
  assert weights.mean() < exact
  assert spread < 0.01


def test_truncated_normal_leaves_no_gap_for_a_matched_model(x64):
  """Discrete data noised to t_min: log p(x) - log q(x | k) = log P(k) + log of the mass of the
  truncated law, but for the neighbours' tails; uniform noise leaves a gap of 0.7 bits.
  """
  sde, p = matched("vp", 5.0), np.linspace(1.0, 3.0, 17)
  p = p / p.sum()
  centres = np.asarray(TRANSFORM.forward(jnp.arange(17)), np.float64)[:, None]
  law, k = Mixture(p[None], centres, 0.0), values(34, 1)
  x, log_q = truncated_normal(jax.random.key(0), sde, TRANSFORM, k)
  weights = law.log_prob(x, *marginal(sde, sde.t_min)) - log_q
  exact = np.log(p[np.asarray(k)[:, 0]])
  np.testing.assert_allclose(weights, exact + np.log(2 * norm.cdf(5.0) - 1), atol=1e-4)
  x, log_q = uniform(jax.random.key(0), sde, TRANSFORM, k)
  worse = law.log_prob(x, *marginal(sde, sde.t_min)) - log_q
  assert worse.mean() < exact.mean() - 0.5


def started(shape):
  module = Dequantizer(features=8)
  return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *shape)))["params"]


@pytest.mark.parametrize("shape", [(2,), (5, 3), (4, 4, 1)])
def test_variational_law_starts_nearly_uniform_and_in_its_bins(shape):
  module, params = started(shape)
  k = values(6, int(np.prod(shape))).reshape(6, *shape)
  law = variational(module, params)
  draw = lambda k: law(jax.random.key(1), make_sde("vp"), TRANSFORM, k)
  x, log_q = jax.jit(draw)(k)
  np.testing.assert_array_equal(TRANSFORM.inverse(x), k)
  flat = -np.prod(shape) * np.log(TRANSFORM.bin_width)
  assert abs(float(log_q.mean()) - flat) < 0.3 * np.prod(shape) and log_q.std() > 0


def test_variational_density_integrates_to_one():
  """By its own values, at parameters that are not those of the start."""
  module, params = started((1,))
  params = jax.tree.map(lambda a: a - 0.2, params)
  k = jnp.full((20_000, 1), 4)
  x, log_q = variational(module, params)(jax.random.key(1), make_sde("vp"), TRANSFORM, k)
  order = np.argsort(np.asarray(x)[:, 0])
  place = np.asarray(x, np.float64)[order, 0]
  total = np.trapezoid(np.exp(np.asarray(log_q, np.float64))[order], place)
  np.testing.assert_allclose(total, 1.0, atol=0.01)


def test_variational_law_closes_the_gap_of_the_uniform():
  """Trained on a density that falls steeply in the bin, E[log p - log q] comes near log P(k)."""
  module, params = started((1,))
  k, law = jnp.full((256, 1), 11), diagonal([0.2], [0.0005])
  edges = -1 + TRANSFORM.bin_width * np.array([11, 12])
  exact = np.log(np.diff(norm(0.2, 0.0005**0.5).cdf(edges)))[0]

  def loss(params, key):
    x, log_q = variational(module, params)(key, make_sde("vp"), TRANSFORM, k)
    return jnp.mean(log_q - law.log_prob(x))

  adam = optax.adam(0.02)

  def step(carry, key):
    params, state = carry
    value, slope = jax.value_and_grad(loss)(params, key)
    update, state = adam.update(slope, state)
    return (optax.apply_updates(params, update), state), value

  keys = jax.random.split(jax.random.key(0), 300)
  _, losses = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, adam.init(params)))
  gaps = np.asarray(losses) + exact
  assert gaps[:20].mean() > 0.3
  assert 0 <= gaps[-100:].mean() < 0.1


@pytest.mark.parametrize("sde", [make_sde("vp", t_min=1e-4), make_sde("edm")], ids=["vp", "edm"])
def test_dequantization_loss_bounds_the_mass_of_the_bin(sde):
  """With the exact network of a Gaussian it is E[log q - log p], above -log P(k)."""
  law = diagonal([0.1], [0.04])
  k = jnp.full((200_000, 1), 11)
  run = lambda key: dequantization_loss(key, uniform, sde, TRANSFORM, law.noise_fn(sde), k)
  losses = np.asarray(jax.jit(run)(jax.random.key(0)), np.float64)
  exact = -np.log(np.diff(norm(0.1, 0.2).cdf(-1 + TRANSFORM.bin_width * np.array([11, 12]))))[0]
  x, log_q = uniform(jax.random.key(0), sde, TRANSFORM, k)
  plain = float((log_q - law.log_prob(x)).mean())  # the bound by the exact log p
  error = losses.std() / np.sqrt(len(losses))
  assert exact < plain
  np.testing.assert_allclose(losses.mean(), plain, rtol=0, atol=5 * error + 1e-3)


def test_the_network_is_told_the_labels():
  seen, labels = [], jnp.array([2, 0])
  noise_fn = lambda x, t, labels: seen.append(labels) or x
  sde, k = make_sde("vp"), values(2, 3)
  dequantization_loss(jax.random.key(0), uniform, sde, TRANSFORM, noise_fn, k, labels=labels)
  assert len(seen) == 2 and all((told == labels).all() for told in seen)


def test_importance_bound_is_the_log_of_the_mean():
  weights = jnp.array(np.random.default_rng(0).normal(size=(5, 3)) - 900)
  exact = np.log(np.exp(np.asarray(weights, np.float64) + 900).mean(0)) - 900
  np.testing.assert_allclose(importance_bound(weights), exact, rtol=1e-6)
  np.testing.assert_allclose(importance_bound(weights[:1]), weights[0], rtol=1e-7)
  assert (importance_bound(weights) > weights.mean(0)).all()


@laws
def test_draws_do_not_depend_on_batch_mates(law):
  sde, k = matched("vp"), values(6, 4)
  all_, few = (DEQUANTIZATIONS[law](jax.random.key(0), sde, TRANSFORM, k[:n]) for n in (6, 2))
  np.testing.assert_array_equal(all_.x[:2], few.x)
  np.testing.assert_array_equal(all_.log_q[:2], few.log_q)
  assert len(np.unique(np.asarray(all_.x - TRANSFORM.forward(k)))) > 20


@processes
def test_matched_time(name):
  alpha, sigma = marginal(matched(name), matched(name).t_min)
  np.testing.assert_allclose(alpha / sigma * TRANSFORM.bin_width / 2, 3.0, rtol=2e-4)


def test_a_width_that_the_process_does_not_reach():
  with pytest.raises(ConfigError, match=r"0\.195"):
    matched_time(make_sde("ve"), Transform(512))


def test_a_process_whose_noise_fills_the_bin_stays():
  assert dequantization.matched(make_sde("ve"), Transform(512)).t_min == make_sde("ve").t_min
