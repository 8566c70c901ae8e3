"""Score matching with and without noise: closed forms, identities by quadrature, all probes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analytic import Mixture
from jax.extend.core import jaxprs_in_params

import losses
from errors import ConfigError
from losses import (
  OBJECTIVES,
  WEIGHTINGS,
  fisher_divergence,
  score_matching_trace,
  sliced_score_matching,
)
from parameterization import score_from_noise
from sde_lib import make_sde, marginal, perturb


def gauss_hermite(n, dims):
  """Nodes [n^dims, dims] and weights of the standard normal law, exact to degree 2n - 1."""
  nodes, weights = np.polynomial.hermite_e.hermegauss(n)
  grids = np.meshgrid(*[nodes] * dims, indexing="ij")
  joint = np.meshgrid(*[weights / weights.sum()] * dims, indexing="ij")
  return np.stack([g.ravel() for g in grids], 1), np.prod([w.ravel() for w in joint], axis=0)


def network(seed, dims, width=5):
  """A random smooth map whose Jacobian is full and not symmetric."""
  first, second = np.random.default_rng(seed).normal(size=(2, dims, width))
  return lambda x: jnp.tanh(x @ first) @ second.T


@pytest.mark.parametrize("w", [0.5, 1.3, 4.0])
def test_linear_score_on_a_gaussian(x64, w):
  """CATALOGUE rows 8, 9: s = -x / w on N(0, v I): D v/2 (1/w - 1/v)^2, -D/w + D v / (2 w^2), and
  their difference D / 2v whatever w.
  """
  v, dims = 1.3, 3
  z, weights = gauss_hermite(2, dims)
  x, score = jnp.asarray(np.sqrt(v) * z), lambda x: -x / w
  explicit = weights @ fisher_divergence(score, x, lambda x: -x / v)
  trace = weights @ score_matching_trace(score, x)
  np.testing.assert_allclose(explicit, dims * v / 2 * (1 / w - 1 / v) ** 2, atol=1e-14)
  np.testing.assert_allclose(trace, -dims / w + dims * v / (2 * w**2), rtol=1e-13)
  np.testing.assert_allclose(explicit - trace, dims / (2 * v), rtol=1e-13)


@pytest.mark.parametrize("chunk", [1, 4, 7, 16])
def test_the_trace_is_that_of_the_jacobian(x64, chunk):
  """For any chunk and any shape of an example."""
  s = network(0, 6)
  score = lambda x: s(x.reshape(-1, 6)).reshape(x.shape)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 3)))
  jacobians = jax.vmap(jax.jacfwd(lambda x: s(x[None])[0]))(x.reshape(4, 6))
  expected = jnp.trace(jacobians, axis1=1, axis2=2) + 0.5 * (s(x.reshape(4, 6)) ** 2).sum(1)
  found = jax.jit(lambda x: score_matching_trace(score, x, chunk))(x)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("variance_reduced", [True, False])
def test_sliced_score_matching_over_all_probes(x64, monkeypatch, variance_reduced):
  """CATALOGUE row 10: the mean over all 2^D Rademacher probes is the trace form."""
  dims, score = 5, network(2, 5)
  cube = 2.0 * ((np.arange(2**dims)[:, None] >> np.arange(dims)) & 1) - 1
  monkeypatch.setattr(jax.random, "rademacher", lambda key, shape, dtype: jnp.asarray(cube))
  x = jnp.asarray(np.random.default_rng(3).normal(size=(4, dims)))
  sliced = sliced_score_matching(jax.random.key(0), score, x, 2**dims, variance_reduced)
  np.testing.assert_allclose(sliced, score_matching_trace(score, x), rtol=1e-12)


def test_variance_is_reduced_and_probes_are_averaged(x64):
  """Over 2,000 keys: unbiased within 4 standard errors, half the variance with two probes."""
  score, x = network(4, 4), jnp.asarray(np.random.default_rng(5).normal(size=(1, 4)))
  keys = jax.random.split(jax.random.key(0), 2000)
  draws = {
    case: np.asarray(jax.vmap(lambda k, case=case: sliced_score_matching(k, score, x, *case))(keys))
    for case in [(1, True), (2, True), (1, False)]
  }
  exact = score_matching_trace(score, x)[0]
  for values in draws.values():
    assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(2000)
  spread = {case: values.var() for case, values in draws.items()}
  assert spread[1, True] < spread[1, False]
  assert spread[2, True] == pytest.approx(spread[1, True] / 2, rel=0.15)


def product_size(function, x):
  """Values that the matrix products of a program compute, loops counted as often as they run."""

  def count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
      inner = sum(map(count, jaxprs_in_params(equation.params)))
      own = equation.outvars[0].aval.size if equation.primitive.name == "dot_general" else 0
      total += own + equation.params.get("length", 1) * inner
    return total

  return count(jax.make_jaxpr(function)(x).jaxpr)


def test_cost_grows_with_the_dimension_for_the_trace_only():
  """CATALOGUE row 10: products of the network per value of x."""
  cost = {}
  for dims in (16, 64):
    score, x = network(0, dims, width=dims), jnp.zeros((2, dims))
    cost["trace", dims] = product_size(lambda x, s=score: score_matching_trace(s, x), x) / dims
    sliced = lambda x, s=score: sliced_score_matching(jax.random.key(0), s, x)
    cost["sliced", dims] = product_size(sliced, x) / dims
  assert 3.5 < cost["trace", 64] / cost["trace", 16] < 4
  assert cost["sliced", 64] == cost["sliced", 16]


def test_a_law_without_full_support_needs_noise(x64):
  """CATALOGUE row 16: for s = -K x on a rank-1 Gaussian the trace loss -tr K + 1/2 tr(K C K^T) has
  no lower bound; noise of variance sigma^2 makes it -1/2 tr((C + sigma^2 I)^-1).
  """
  direction, sigma = np.array([0.6, 0.8]), 0.3
  covariance = 2.0 * np.outer(direction, direction)
  noisy = covariance + sigma**2 * np.eye(2)
  z, weights = gauss_hermite(2, 2)

  def loss(k, covariance):
    values, vectors = np.linalg.eigh(covariance)
    x = z @ (vectors * np.sqrt(np.maximum(values, 0))).T
    return weights @ score_matching_trace(lambda x: -x @ k.T, jnp.asarray(x))

  null = np.outer([0.8, -0.6], [0.8, -0.6])
  k = np.linalg.inv(noisy)
  expected = -np.trace(k) + 0.5 * np.trace(k @ covariance @ k.T)
  np.testing.assert_allclose(loss(k, covariance), expected, rtol=1e-10)
  for c in (1e3, 1e6):
    np.testing.assert_allclose(loss(c * null, covariance), -c, rtol=1e-8)
  least = -0.5 * np.trace(np.linalg.inv(noisy))
  np.testing.assert_allclose(loss(k, noisy), least, rtol=1e-10)
  slope = jax.grad(lambda k: loss(k, noisy))(jnp.asarray(k))
  np.testing.assert_allclose(slope, 0, atol=1e-10)


def objective_mean(name, sde, t, noise_fn, monkeypatch, weighting="simple", law=(0.4, 0.7), **more):
  """The expectation over x_0 ~ N(mean, variance) and the noise at time t, D = 1, by quadrature."""
  z, weights = gauss_hermite(12, 2)
  x0 = law[0] + np.sqrt(law[1]) * z[:, :1]
  monkeypatch.setattr(losses, "normal", lambda key, shape: jnp.asarray(z[:, 1:]))
  sampler = lambda keys, sde: (jnp.full(len(z), t), jnp.full(len(z), 1.5))
  draw = {"weighting": WEIGHTINGS[weighting], "time_sampler": sampler, **more}
  loss = OBJECTIVES[name](jax.random.key(0), sde, noise_fn, jnp.asarray(x0), **draw)
  return weights @ np.asarray(loss) / 1.5


def cubic(a, b):
  """A noise prediction that is a polynomial, for which the quadrature is exact."""
  return lambda x, t, labels=None: a * x + b * x**3 + 0.1


@pytest.mark.parametrize("name, t", [("vp", 0.2), ("ve", 0.4)])
@pytest.mark.parametrize("weighting", ["simple", "elbo"])
def test_objectives_differ_by_constants(x64, monkeypatch, name, t, weighting):
  """CATALOGUE row 11 (Vincent): denoising less explicit score matching is w D, and both less the
  Fisher divergence of the noised law are the same for every network.
  """
  sde = make_sde(name)
  alpha, sigma = (float(c) for c in marginal(sde, t))
  variance, w = alpha**2 * 0.7 + sigma**2, float(WEIGHTINGS[weighting](sde, jnp.array([t]))[0])
  z, weights = gauss_hermite(12, 1)
  x = jnp.asarray(alpha * 0.4 + np.sqrt(variance) * z)
  gaps = []
  for noise_fn in (cubic(0.3, 0.05), cubic(-1.0, 0.02)):
    draw = (sde, t, noise_fn, monkeypatch, weighting)
    denoising, explicit = (objective_mean(o, *draw) for o in ("denoising", "score_matching"))
    np.testing.assert_allclose(denoising - explicit, w, rtol=1e-9)
    score = lambda x, noise_fn=noise_fn: -noise_fn(x, t) / sigma
    fisher = fisher_divergence(score, x, lambda x: -(x - alpha * 0.4) / variance)
    gaps.append(explicit - 2 * w * sigma**2 * weights @ np.asarray(fisher))
    # in one dimension a Rademacher probe is exact
    probes = objective_mean("sliced_vr", *draw, num_probes=2), objective_mean("sliced", *draw)
    np.testing.assert_allclose(probes, explicit, rtol=1e-12)
  np.testing.assert_allclose(gaps, -w * sigma**2 / variance, rtol=1e-8)


@pytest.mark.parametrize("name", ["denoising", "score_matching", "sliced_vr"])
def test_the_optimum_is_the_score_of_the_noised_law(x64, monkeypatch, name):
  """CATALOGUE rows 11, 12: the best affine score is -(x - m) / (v + sigma^2); beside the data's its
  slope is off by sigma^2 / (v + sigma^2) exactly.
  """
  sde, t, (m, v) = make_sde("ve"), 0.5, (0.4, 0.7)
  sigma = float(marginal(sde, t)[1])

  z, weights = gauss_hermite(3, 2)
  monkeypatch.setattr(losses, "normal", lambda key, shape: jnp.asarray(z[:, 1:]))
  x0 = jnp.asarray(m + np.sqrt(v) * z[:, :1])
  sampler = lambda keys, sde: (jnp.full(len(z), t), jnp.ones(len(z)))
  draw = {"weighting": WEIGHTINGS["simple"], "time_sampler": sampler}

  def loss(parameters):
    noise_fn = lambda x, t, labels=None: parameters[0] * x + parameters[1]
    return weights @ OBJECTIVES[name](jax.random.key(0), sde, noise_fn, x0, **draw)

  start = jnp.zeros(2)
  best = -jnp.linalg.solve(jax.hessian(loss)(start), jax.grad(loss)(start))  # of a quadratic
  slope, offset = -np.asarray(best) / sigma
  np.testing.assert_allclose([slope, offset], [-1 / (v + sigma**2), m / (v + sigma**2)], rtol=1e-9)
  np.testing.assert_allclose(1 - slope / (-1 / v), sigma**2 / (v + sigma**2), rtol=1e-9)


@pytest.mark.parametrize("name", ["denoising", "score_matching", "sliced", "sliced_vr"])
def test_examples_are_on_their_own(name):
  """Not of the batch size, and each with its label."""
  sde, x0 = make_sde("vp"), jax.random.normal(jax.random.key(0), (5, 2, 3))
  noise_fn = lambda x, t, labels: jnp.tanh(x + labels[:, None, None])
  sampler = losses.independent(losses.TIME_SAMPLERS["importance"])
  draw = {"weighting": WEIGHTINGS["simple"], "time_sampler": sampler}

  @jax.jit
  def run(x0, labels):
    return OBJECTIVES[name](jax.random.key(1), sde, noise_fn, x0, labels=labels, **draw)

  labels = jnp.arange(5.0)
  whole = run(x0, labels)
  np.testing.assert_allclose(run(x0[:2], labels[:2]), whole[:2], rtol=1e-5)
  assert abs(run(x0, labels[::-1]) - whole)[jnp.array([0, 1, 3, 4])].min() > 1e-4


@pytest.mark.parametrize("name", ["vlb", "hybrid"])
def test_bounds_need_levels_and_a_predicted_variance(name):
  sampler = lambda keys, sde: (jnp.full(2, 1.0), jnp.ones(2))
  draw = {"weighting": WEIGHTINGS["simple"], "time_sampler": sampler, "transform": None}
  run = lambda sde: OBJECTIVES[name](
    jax.random.key(0), sde, lambda x, t, labels: x, jnp.zeros((2, 1)), **draw
  )
  with pytest.raises(ConfigError, match="'learned'"):
    run(make_sde("ddpm"))
  with pytest.raises(ConfigError, match=r"levels.*'ddpm'"):
    losses.level_times(make_sde("vp"))


TOY = Mixture(np.array([[0.8, 0.2]]), np.array([[5.0, 5.0], [-5.0, -5.0]]), 1.0)


def test_the_score_is_poor_where_there_are_no_data():
  """CATALOGUE row 17 (Song & Ermon 2019, figure 2): an MLP 2-128-128-2 by SSM-VR; its error over
  the plane against that under the data, and its fall with the density.
  """
  sizes = [(2, 128), (128, 128), (128, 2)]
  keys = jax.random.split(jax.random.key(0), 3)
  layers = [(jax.random.normal(k, s) / np.sqrt(s[0]), jnp.zeros(s[1])) for k, s in zip(keys, sizes)]

  def score(layers, x):
    for weight, bias in layers[:-1]:
      x = jax.nn.softplus(x @ weight + bias[None])
    return x @ layers[-1][0] + layers[-1][1][None]

  def draw(key, n):
    signs = jnp.where(jax.random.bernoulli(key, 0.8, (n, 1)), 5.0, -5.0)
    return signs + jax.random.normal(jax.random.fold_in(key, 1), (n, 2))

  optimizer = optax.adam(1e-3)

  @jax.jit
  def train(layers):
    def step(carry, key):
      layers, state = carry
      x = draw(key, 128)
      loss = lambda p: sliced_score_matching(key, lambda x: score(p, x), x).mean()
      updates, state = optimizer.update(jax.grad(loss)(layers), state)
      return (optax.apply_updates(layers, updates), state), None

    keys = jax.random.split(jax.random.key(1), 2500)
    return jax.lax.scan(step, (layers, optimizer.init(layers)), keys)[0][0]

  layers = train(layers)
  error = lambda x: 2 * fisher_divergence(lambda x: score(layers, x), x, TOY.score)
  plane = jax.random.uniform(jax.random.key(2), (2000, 2), minval=-8, maxval=8)
  under_data = error(draw(jax.random.key(3), 2000)).mean()
  everywhere = np.asarray(error(plane))
  assert everywhere.mean() / under_data > 10
  ranks = [np.argsort(np.argsort(c)) for c in (everywhere, np.asarray(TOY.log_prob(plane)))]
  assert np.corrcoef(*ranks)[0, 1] < -0.5


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve"])
def test_the_score_of_the_kernel_is_the_noise_over_sigma(x64, name):
  """Row 23: grad log q(x_t | x_0) = -(x_t - alpha x_0) / sigma^2 = -noise / sigma, by autodiff."""
  sde, t = make_sde(name), 0.3
  alpha, sigma = (float(c) for c in marginal(sde, t))
  x0, noise = jnp.asarray([[0.4, -1.2]]), jnp.asarray([[0.7, 0.1]])
  log_kernel = lambda x: jnp.sum(-0.5 * ((x - alpha * x0) / sigma) ** 2)
  score = jax.grad(log_kernel)(perturb(sde, x0, noise, t))
  np.testing.assert_allclose(score_from_noise(sde, noise, t), score, rtol=1e-12)
