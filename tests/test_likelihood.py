"""Log-likelihoods against closed forms, bits per dimension, and the transform behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PAPER, Mixture, diagonal, rotated

from data import Transform
from errors import ConfigError
from likelihood import DIVERGENCES, bits_per_dim, log_likelihood
from sde_lib import example_keys, make_sde, marginal, prior_log_prob

names = pytest.mark.parametrize("name", PAPER)
transforms = pytest.mark.parametrize(
  "transform", [Transform(2, 0.0, 1.0), Transform(17), Transform(256)], ids=["2", "17", "256"]
)

# Mean 0 and covariance I, so that the prior's mismatch is of third order in alpha(t_max) = 7e-3
TRIANGLE = Mixture(
  np.full((1, 3), 1 / 3), 1.2 * np.array([[0, 1], [0.75**0.5, -0.5], [-(0.75**0.5), -0.5]]), 0.28
)


def model_log_prob(sde, law, x):
  """The prior's density pulled back through the closed-form flow of a Gaussian."""
  latent = law.flow(sde, x, sde.t_min, sde.t_max)
  return latent, prior_log_prob(sde, latent) + law.flow_log_det(sde, sde.t_min, sde.t_max)


@names
def test_gaussian_log_prob_by_the_exact_trace(name):
  sde, law = make_sde(name), rotated([0.5, -0.2, 0.1], [0.1, 1.0, 2.0])
  x = law.sample(jax.random.key(0), 3)
  run = lambda x: log_likelihood(jax.random.key(1), sde, law.score_fn(sde), x, divergence="exact")
  log_prob, latent, nfe = jax.jit(run)(x)
  exact_latent, exact = jax.jit(lambda x: model_log_prob(sde, law, x))(x)
  np.testing.assert_allclose(log_prob, exact, rtol=0, atol=3e-4)
  np.testing.assert_allclose(latent, exact_latent, rtol=1e-4, atol=1e-4)
  assert log_prob.shape == nfe.shape == (3,)


def test_rademacher_is_exact_for_a_diagonal_gaussian(executions):
  """Its Jacobian is diagonal, so v^T J v is the trace for every probe; nfe counts network runs."""
  sde, law = make_sde("vp"), diagonal([0.5, -0.2], [0.1, 2.0])
  x = law.sample(jax.random.key(0), 1)
  score_fn = lambda x, t, labels: law.score_fn(sde)(executions.mark(x), t)
  run = lambda key, x: log_likelihood(key, sde, score_fn, x, num_probes=2)
  result = jax.jit(run)(jax.random.key(1), x)
  exact = jax.jit(lambda x: model_log_prob(sde, law, x)[1])(x)
  np.testing.assert_allclose(result.log_prob, exact, rtol=0, atol=2e-4)
  assert result.nfe[0] == executions.count() > 10


SDE = make_sde("vp")


def mirrored_score(x, t, labels):
  """The score of TRIANGLE, upside down for label 1; NaN far from the data."""
  sign = jnp.stack([jnp.ones(labels.shape), 1.0 - 2.0 * labels], axis=1)
  return jnp.where(jnp.abs(x) > 1e3, jnp.nan, sign * TRIANGLE.score_fn(SDE)(sign * x, t))


@jax.jit
def exact_likelihood(key, x, labels):
  return log_likelihood(key, SDE, mirrored_score, x, divergence="exact", labels=labels)


@pytest.fixture(scope="module")
def batch():
  """Seven points under both labels' laws, and their likelihoods."""
  keys = example_keys(jax.random.key(1), 7)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2)))
  labels = jnp.arange(7) % 2
  return keys, x, labels, exact_likelihood(keys, x, labels)


def test_mixture_log_prob_is_the_noised_density_at_t_min(batch):
  _, x, labels, result = batch
  sign = np.stack([np.ones(7), 1 - 2 * labels], axis=1).astype(np.float32)
  exact = jax.jit(TRIANGLE.log_prob)(sign * x, *marginal(SDE, SDE.t_min))
  np.testing.assert_allclose(result.log_prob, exact, rtol=0, atol=2e-4)


def test_likelihoods_do_not_depend_on_batch_mates(batch):
  """Each example has its own steps; rounding may tip the acceptance of one (6 evaluations)."""
  keys, x, labels, result = batch
  alone = [exact_likelihood(*(a[i : i + 1] for a in (keys, x, labels))) for i in range(7)]
  log_prob, latent, nfe = (np.concatenate(values) for values in zip(*alone))
  np.testing.assert_allclose(result.log_prob, log_prob, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(result.latent, latent, rtol=1e-5, atol=1e-5)
  assert np.abs(result.nfe - nfe).max() <= 6
  assert len(set(nfe.tolist())) > 1


def test_a_failed_solve_is_nan_for_its_example_only(batch):
  keys, x, labels, result = batch
  failed = exact_likelihood(keys, x.at[2].set(2e3), labels).log_prob
  np.testing.assert_array_equal(np.isnan(failed), np.arange(7) == 2)
  np.testing.assert_array_equal(np.delete(failed, 2), np.delete(result.log_prob, 2))


def test_each_example_has_its_own_probes():
  """The estimate follows an example's key, wherever the example stands in the batch."""
  law, keys = rotated([0.0, 0.0], [0.1, 2.0]), example_keys(jax.random.key(0), 6)
  score_fn, x = law.score_fn(SDE), jnp.ones((6, 2))
  run = jax.jit(lambda keys: log_likelihood(keys, SDE, score_fn, x, rtol=1e-3, atol=1e-3).log_prob)
  log_prob = run(keys)
  np.testing.assert_allclose(run(keys[::-1])[::-1], log_prob, rtol=1e-6)
  assert np.ptp(log_prob) > 0.1  # the two signs of the off-diagonal part


def test_unknown_divergence_lists_the_legal_ones():
  with pytest.raises(ConfigError, match="divergence = 'hutchinson'") as error:
    log_likelihood(
      jax.random.key(0), SDE, TRIANGLE.score_fn(SDE), jnp.zeros((1, 2)), divergence="hutchinson"
    )
  assert all(repr(name) in str(error.value) for name in DIVERGENCES)


def test_rademacher_probes_are_signs_that_differ():
  probes = DIVERGENCES["rademacher"](jax.random.key(0), jnp.ones((4, 3)), 5)
  assert probes.shape == (5, 4, 3) and set(np.unique(probes)) == {-1.0, 1.0}
  assert len(np.unique(probes, axis=0)) == 5


@transforms
def test_bits_per_dim_of_the_uniform_law_are_the_bits_of_its_levels(transform):
  num_dims = 12
  log_prob = jnp.full(2, -num_dims * np.log(transform.high - transform.low))
  bits = bits_per_dim(log_prob, num_dims, transform)
  np.testing.assert_allclose(bits, np.full(2, np.log2(transform.levels)), rtol=2e-7)


def test_a_nat_per_dimension_is_log2_e_bits():
  bits = bits_per_dim(jnp.array([0.0, 12.0]), 12, Transform(256))
  np.testing.assert_allclose(bits[0] - bits[1], np.log2(np.e), rtol=1e-6)


def test_bits_per_dim_need_levels():
  with pytest.raises(ConfigError, match="nats"):
    bits_per_dim(jnp.zeros(1), 12, Transform(0))


def values(transform):
  """Every value of the transform, some more than once: one shape for all."""
  return jnp.arange(8000).reshape(16, 500) % transform.levels


@transforms
def test_inverse_undoes_forward(transform):
  k = values(transform)
  np.testing.assert_array_equal(transform.inverse(transform.forward(k)), k)


@transforms
def test_forward_gives_the_centres_of_bins_that_tile_the_range(transform):
  centres = np.unique(transform.forward(values(transform))).astype(np.float64)
  edges = np.linspace(transform.low, transform.high, transform.levels + 1)
  np.testing.assert_allclose(centres, (edges[1:] + edges[:-1]) / 2, rtol=0, atol=2e-7)
  np.testing.assert_allclose(transform.bin_width, np.diff(edges), rtol=1e-12)


@transforms
def test_dequantized_values_are_uniform_in_their_bins(transform):
  k = values(transform)
  x = transform.dequantize(jax.random.key(0), k)
  np.testing.assert_array_equal(transform.inverse(x), k)
  u = (np.asarray(x, np.float64) - transform.low) / transform.bin_width - np.asarray(k)
  assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * u.size)
  assert abs((u**2).mean() - 1 / 3) < 4 * np.sqrt(4 / 45 / u.size)


def test_values_outside_the_range_go_to_the_nearest_bin():
  np.testing.assert_array_equal(Transform(17).inverse(jnp.array([[-9.0, 9.0, 1.0]])), [[0, 16, 16]])


def test_dequantization_does_not_depend_on_the_batch_size():
  x = Transform(1).dequantize(jax.random.key(0), jnp.zeros((16, 500), int))
  part = Transform(1).dequantize(jax.random.key(0), jnp.zeros((2, 500), int))
  np.testing.assert_array_equal(part, x[:2])
  assert len(np.unique(x[:, :5])) == 16 * 5


def test_likelihood_runs_in_float64(x64):
  sde = make_sde("vp")
  x = jnp.ones((2, 3)) / 2
  result = log_likelihood(jax.random.key(0), sde, diagonal([0.0] * 3, [1.0] * 3).score_fn(sde), x)
  assert result.log_prob.dtype == jnp.float64
