"""Log-likelihoods against closed forms, bits per dimension, and the transform behind them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PAPER, Mixture, diagonal, rotated

from data import Transform
from errors import ConfigError
from likelihood import (
  DIVERGENCES,
  STARTS,
  bits_per_dim,
  decode,
  encode,
  log_likelihood,
  start_offset,
  variational_bound,
)
from sampling import time_grid
from sde_lib import example_keys, fold_in, make_sde, marginal, normal, perturb, prior_log_prob

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
  log_prob, latent, nfe, *_ = jax.jit(run)(x)
  exact_latent, exact = jax.jit(lambda x: model_log_prob(sde, law, x))(x)
  np.testing.assert_allclose(log_prob, exact, rtol=0, atol=1e-4)
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
  np.testing.assert_allclose(result.log_prob, exact, rtol=0, atol=1e-4)


def test_likelihoods_do_not_depend_on_batch_mates(batch):
  """Each example has its own steps; rounding may tip the acceptance of one (6 evaluations)."""
  keys, x, labels, result = batch
  alone = [exact_likelihood(*(a[i : i + 1] for a in (keys, x, labels))) for i in range(7)]
  log_prob, latent, nfe, *_ = (np.concatenate(values) for values in zip(*alone))
  np.testing.assert_allclose(result.log_prob, log_prob, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(result.latent, latent, rtol=1e-5, atol=1e-5)
  assert np.abs(result.nfe - nfe).max() <= 6
  assert len(set(nfe.tolist())) > 1


def test_a_failed_solve_is_nan_for_its_example_only(batch):
  keys, x, labels, result = batch
  failed = exact_likelihood(keys, x.at[2].set(2e3), labels)
  for name in ("log_prob", "prior", "divergence", "standard_error", "offset"):
    value = getattr(failed, name)
    np.testing.assert_array_equal(np.isnan(value), np.arange(7) == 2)
    np.testing.assert_array_equal(np.delete(value, 2), np.delete(getattr(result, name), 2))


def test_each_example_has_its_own_probes():
  """The estimate follows an example's key, wherever the example stands in the batch."""
  law, keys = rotated([0.0, 0.0], [0.1, 2.0]), example_keys(jax.random.key(0), 6)
  score_fn, x = law.score_fn(SDE), jnp.ones((6, 2))
  run = jax.jit(lambda keys: log_likelihood(keys, SDE, score_fn, x, rtol=1e-3, atol=1e-3).log_prob)
  log_prob = run(keys)
  np.testing.assert_allclose(run(keys[::-1])[::-1], log_prob, rtol=1e-6)
  assert np.ptp(log_prob) > 0.1  # the two signs of the off-diagonal part


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_parts_add_up(divergence):
  """log_prob = prior + divergence + offset; the error is 0 for the exact trace only."""
  law, x = rotated([0.0] * 6, [0.1, 2.0, 1.0, 1.0, 0.4, 0.6]), jnp.ones((2, 6)) / 3
  options = {"divergence": divergence, "num_probes": 6, "rtol": 1e-3, "atol": 1e-3}
  run = lambda x: log_likelihood(jax.random.key(0), SDE, law.score_fn(SDE), x, **options)
  result = jax.jit(run)(x)
  np.testing.assert_allclose(result.prior, prior_log_prob(SDE, result.latent), rtol=1e-6)
  total = result.prior + result.divergence + result.offset
  np.testing.assert_allclose(result.log_prob, total, rtol=1e-6)
  zero = divergence in ("exact", "orthogonal")  # as many orthogonal probes as dimensions
  assert (result.standard_error < 1e-6).all() if zero else (result.standard_error > 1e-3).all()
  np.testing.assert_array_equal(result.offset, np.zeros(2))


SIGNS = jnp.array([[1.0], [-1.0]])  # mean 0, variance 1: exact for quadratics of a normal


@names
def test_start_offset_is_the_decoder_over_the_encoder(x64, name):
  """Against the two densities, written out, with the score of a Gaussian."""
  sde, law = make_sde(name), diagonal([0.5], [0.3])
  x, (alpha, sigma) = jnp.array([[0.9], [-0.3]]), marginal(sde, sde.t_min)
  x_t = perturb(sde, x, SIGNS, sde.t_min)
  predicted = law.denoise(x_t, alpha, sigma)
  density = lambda y, std: -0.5 * (y / std) ** 2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)
  direct = density(x - predicted, sigma / alpha) - density(x_t - alpha * x, sigma)
  offset = start_offset(sde, law.score_fn(sde), x, x_t)
  np.testing.assert_allclose(offset, direct[:, 0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name, t_min", [("vp", 1e-3), ("vp", 3e-2), ("ve", 0.0)])
def test_corrected_start_bounds_the_density_of_the_data(x64, name, t_min):
  """Its expectation is below log p(x), by less than sigma^2 / v; the mean of its exponential is the
  density of data noised to t_min and decoded, of variance (alpha v)^2 / (alpha^2 v + sigma^2) +
  (sigma / alpha)^2 (PITFALLS, row 27).
  """
  sde, law, x = make_sde(name, t_min=t_min), diagonal([0.5], [0.3]), jnp.array([[0.9]])
  alpha, sigma = marginal(sde, sde.t_min)

  def corrected(noise):
    x_t = perturb(sde, x, noise, sde.t_min)
    return law.log_prob(x_t, alpha, sigma) + start_offset(sde, law.score_fn(sde), x, x_t)

  mean = np.mean([corrected(z[None])[0] for z in SIGNS])
  gap = float(law.log_prob(x)[0] - mean)
  assert 0 < gap < float(sigma**2 / 0.3)
  nodes, weights = np.polynomial.hermite_e.hermegauss(60)
  each = np.exp([float(corrected(jnp.array([[z]]))[0]) for z in nodes])
  total = alpha**2 * 0.3 + sigma**2
  variance = (alpha * 0.3) ** 2 / total + (sigma / alpha) ** 2
  decoded = diagonal([0.5], [float(variance)]).log_prob(x)[0]
  np.testing.assert_allclose(np.log(weights @ each / weights.sum()), decoded, rtol=1e-10)


def test_a_perturbed_start_is_the_density_there_and_the_offset(x64):
  """One evaluation more; the noise follows the example's key."""
  sde, law = make_sde("vp", t_min=0.01), rotated([0.5, -0.2], [0.1, 2.0])
  x, keys = law.sample(jax.random.key(3), 2), example_keys(jax.random.key(0), 2)
  score_fn, options = law.score_fn(sde), {"divergence": "exact", "rtol": 1e-7, "atol": 1e-7}
  run = lambda x, start: log_likelihood(keys, sde, score_fn, x, start=start, **options)
  x_t = perturb(sde, x, normal(fold_in(keys, 1), x.shape), sde.t_min)
  plain, result = jax.jit(lambda: (run(x_t, "none"), run(x, "perturb")))()
  np.testing.assert_allclose(result.offset, start_offset(sde, score_fn, x, x_t), rtol=1e-10)
  np.testing.assert_allclose(result.log_prob, plain.log_prob + result.offset, rtol=1e-10)
  np.testing.assert_array_equal(result.nfe, plain.nfe + 1)
  assert set(STARTS) == {"none", "perturb"}


@pytest.fixture(scope="module")
def latents():
  """Seven points of two laws by label, encoded."""
  x, labels = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2))), jnp.arange(7) % 2
  return x, labels, jax.jit(lambda x: encode(SDE, mirrored_score, x, labels=labels))(x)


def test_decoding_undoes_encoding(latents, batch):
  x, labels, (latent, nfe) = latents
  back, _ = jax.jit(lambda z: decode(SDE, mirrored_score, z, labels=labels))(latent)
  np.testing.assert_allclose(back, x, atol=2e-4)
  np.testing.assert_allclose(latent, batch[-1].latent, atol=2e-4)
  assert nfe.shape == (7,) and len(set(nfe.tolist())) > 1


def test_encoding_fails_alone(latents):
  x, labels, (latent, _) = latents
  run = jax.jit(lambda x: encode(SDE, mirrored_score, x, labels=labels)[0])
  failed = run(x.at[2].set(2e3))
  np.testing.assert_array_equal(np.isnan(failed).all(1), np.arange(7) == 2)
  np.testing.assert_array_equal(np.delete(failed, 2, 0), np.delete(latent, 2, 0))


def test_encoding_whitens_a_gaussian():
  """VP: the symmetric root of the inverse covariance, for the prior forgets the data."""
  law = rotated([0.5, -0.2, 0.1], [0.1, 1.0, 2.0])
  x = law.sample(jax.random.key(0), 4)
  latent = jax.jit(lambda x: encode(SDE, law.score_fn(SDE), x)[0])(x)
  white = ((x - law.mean) @ law.basis / jnp.sqrt(law.variances)) @ law.basis.T
  np.testing.assert_allclose(latent, white, atol=0.02)


def test_a_tolerance_below_the_resolution_is_refused():
  with pytest.raises(ConfigError, match=r"likelihood.rtol = 1e-08"):
    log_likelihood(jax.random.key(0), SDE, TRIANGLE.score_fn(SDE), jnp.zeros((1, 2)), rtol=1e-8)


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


def test_the_bound_with_the_exact_decoder_is_nearly_tight():
  """Independent uniform integers: with the exact denoiser and their exact posterior given its
  prediction, -log P(k) is D log(levels), which the bound approaches from above.
  """
  levels, d, n = 5, 3, 4000
  transform = Transform(levels=levels, low=-1.0, high=1.0)
  centres = transform.forward(jnp.arange(float(levels)))
  sde = dataclasses.replace(SDE, t_min=0.05)  # there the noise is as wide as a bin
  sde = dataclasses.replace(sde, times=time_grid(sde, 199, "log_snr")[::-1])

  def log_posterior(x, t):
    alpha, sigma = marginal(sde, jnp.max(t))
    away = jnp.subtract.outer(x, alpha * centres) / sigma
    return jax.nn.log_softmax(-0.5 * away**2)

  def noise_fn(x, t, labels=None):
    alpha, sigma = marginal(sde, jnp.max(t))
    return (x - alpha * jnp.exp(log_posterior(x, t)) @ centres) / sigma

  grid = jnp.linspace(-3.0, 3.0, 4001)
  means = jnp.exp(log_posterior(grid, sde.times[0])) @ centres  # grow: the prediction tells x

  def decoder(predicted):
    log_p = log_posterior(jnp.interp(predicted, means, grid), sde.times[0])
    return jnp.take_along_axis(log_p, k.astype(int)[..., None], -1).sum((1, 2))

  k = jax.random.randint(jax.random.key(1), (n, d), 0, levels).astype(jnp.float32)
  given = {"variance": "posterior", "transform": transform}

  @jax.jit
  def bound(key):
    x, laws = transform.forward(k), (decoder, None)
    return [variational_bound(key, sde, noise_fn, x, **given, decoder=law).total for law in laws]

  fitted, gaussian = (np.asarray(total) / d for total in bound(jax.random.key(2)))
  error = fitted.std() / np.sqrt(n)
  assert -3 * error < fitted.mean() - np.log(levels) < 0.01 + 3 * error
  assert gaussian.mean() > fitted.mean() + 0.05


def test_the_step_control_suits_a_flow_that_is_rough_in_time(x64, monkeypatch):
  """As the embedding of time makes it: less error than by plain integral control, for less."""
  sde, x = make_sde("vp"), jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)))
  score_fn = lambda x, t, labels: -x * (1 + 2 * jnp.sin(300 * t))

  def run(solver, tolerance):
    options = {"solver": solver, "rtol": tolerance, "atol": tolerance, "max_steps": 10_000}
    evaluate = lambda x: log_likelihood(
      jax.random.key(0), sde, score_fn, x, divergence="exact", **options
    )
    result = jax.jit(evaluate)(x)
    return result.log_prob, result.nfe.mean()

  exact = run("dopri8", 1e-9)[0]
  rms = lambda log_prob: float(jnp.sqrt(jnp.mean((log_prob - exact) ** 2)))
  log_prob, nfe = run("dopri5", 1e-4)
  monkeypatch.setattr("likelihood.GAINS", (0.0, 1.0))
  plain, plain_nfe = run("dopri5", 1e-4)
  assert rms(log_prob) < 0.75 * rms(plain) and nfe < plain_nfe
