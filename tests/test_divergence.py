"""Laws of probes and trace estimates by enumeration and moments, the control variate on Gaussian
data, the standard error by simulation.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PAPER, Mixture, rotated

import divergence
from divergence import (
  DIVERGENCES,
  GaussianControl,
  Sketched,
  fit_control,
  linear_part,
  num_estimates,
  standard_error,
  traces,
)
from dynamics import probability_flow, with_log_density
from errors import ConfigError
from likelihood import log_likelihood
from sde_lib import example_keys, make_sde

SHAPE, D = (2, 3), 6
MATRIX = np.random.default_rng(0).normal(size=(D, D))
X = np.zeros(SHAPE)
laws = pytest.mark.parametrize("name", DIVERGENCES)
vectors = pytest.mark.parametrize(
  "name", [n for n in DIVERGENCES if n not in ("exact", "hutch_pp")]
)


def push(v):
  return (jnp.asarray(MATRIX) @ v.reshape(-1)).reshape(SHAPE)


def all_signs(d=D):
  return np.array(list(itertools.product((-1.0, 1.0), repeat=d)))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_exact_trace_in_chunks(x64, monkeypatch, chunk):
  monkeypatch.setattr(divergence, "CHUNK", chunk)
  estimates = traces(push, None, jnp.asarray(X))
  np.testing.assert_allclose(estimates, [np.trace(MATRIX)], rtol=1e-12)


def test_exact_trace_bounds_its_memory():
  """The largest value inside is CHUNK columns, not D."""
  size = 1024
  big = lambda v: 2.0 * v
  compiled = jax.jit(lambda x: traces(big, None, x)).lower(jnp.zeros(size)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * size * size / 4


@vectors
def test_probes_have_identity_covariance(name):
  """E v v^T = I makes every quadratic form unbiased for its trace; all within six errors."""
  draw = lambda key: DIVERGENCES[name](key, jnp.asarray(X, jnp.float32), 3)
  probes = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 20_000))
  assert probes.shape == (20_000, 3, *SHAPE)
  v = np.asarray(probes, np.float64).reshape(-1, D)
  moments = np.einsum("ni,nj->nij", v, v)
  error = moments.std(0) / np.sqrt(len(v) / 3)  # at worst the three of a draw are one
  assert (np.abs(moments.mean(0) - np.eye(D)) < 6 * error + 1e-5).all()
  assert num_estimates(probes[0]) == 3


def test_sphere_and_frame():
  sphere = DIVERGENCES["sphere"](jax.random.key(0), jnp.ones(SHAPE), 5).reshape(5, D)
  np.testing.assert_allclose((sphere**2).sum(1), np.full(5, D), rtol=1e-5)
  frame = DIVERGENCES["orthogonal"](jax.random.key(0), jnp.ones(SHAPE), 4).reshape(4, D)
  np.testing.assert_allclose(frame @ frame.T, D * np.eye(4), atol=1e-5)


def test_a_whole_frame_is_exact(x64):
  probes = DIVERGENCES["orthogonal"](jax.random.key(0), jnp.asarray(X), D)
  estimates = traces(push, probes, jnp.asarray(X))
  np.testing.assert_allclose(estimates.mean(), np.trace(MATRIX), rtol=1e-12)
  assert estimates.std() > 0.1
  np.testing.assert_allclose(standard_error(estimates[None], "orthogonal", D), [0.0], atol=1e-12)


def test_hutch_pp_is_unbiased(x64):
  """Over all 2^D probes, for a sketch that stays; single estimates differ."""
  sketch = jnp.asarray(all_signs()[[3, 17]].reshape(2, *SHAPE))
  probe = jnp.asarray(all_signs().reshape(-1, *SHAPE))
  estimates = traces(push, Sketched(sketch, probe), jnp.asarray(X))
  np.testing.assert_allclose(estimates.mean(), np.trace(MATRIX), rtol=1e-12)
  assert estimates.std() > 0.1


def test_hutch_pp_is_exact_for_low_rank(x64):
  """A map of rank 2 is seen whole by a sketch of 2; so is 0, whose sketch has no span."""
  low = MATRIX[:, :2] @ MATRIX[:2]
  map_ = lambda scale: lambda v: (scale * jnp.asarray(low) @ v.reshape(-1)).reshape(SHAPE)
  probe = DIVERGENCES["hutch_pp"](jax.random.key(1), jnp.asarray(X), 8)
  assert len(probe.sketch) == 2 and num_estimates(probe) == 4
  for scale in (1.0, 0.0):
    estimates = traces(map_(scale), probe, jnp.asarray(X))
    np.testing.assert_allclose(estimates, np.full(4, scale * np.trace(low)), atol=1e-12)


def test_hutch_pp_has_less_variance_on_a_decaying_spectrum(x64):
  """At the same number of products; Hutchinson's is known."""
  basis = np.linalg.qr(np.random.default_rng(1).normal(size=(32, 32)))[0]
  matrix = (basis * 2.0 ** -np.arange(32)) @ basis.T
  x, run = jnp.zeros(32), lambda v: jnp.asarray(matrix) @ v
  spread = {}
  for name in ("rademacher", "hutch_pp"):
    one = lambda key, name=name: traces(run, DIVERGENCES[name](key, x, 12), x).mean()
    spread[name] = np.std(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 400)))
  off = matrix - np.diag(np.diag(matrix))
  np.testing.assert_allclose(spread["rademacher"], np.sqrt(2 * (off**2).sum() / 12), rtol=0.15)
  assert spread["hutch_pp"] < 0.3 * spread["rademacher"]


@pytest.mark.parametrize(
  "name, k", [("orthogonal", D + 1), ("hutch_pp", 2), ("hutch_pp", 3 * D + 3)]
)
def test_a_number_of_probes_that_the_law_has_not(name, k):
  with pytest.raises(ConfigError, match="num_probes"):
    DIVERGENCES[name](jax.random.key(0), jnp.ones(SHAPE), k)


def test_signs_do_not_depend_on_the_precision():
  single = DIVERGENCES["rademacher"](jax.random.key(3), jnp.zeros(SHAPE, jnp.float32), 9)
  with jax.enable_x64(True):
    double = DIVERGENCES["rademacher"](jax.random.key(3), jnp.zeros(SHAPE, jnp.float64), 9)
  assert double.dtype == jnp.float64
  np.testing.assert_array_equal(single, double)


LAW = rotated([0.5, -0.2, 0.1, 0.0, 1.0, -1.0, 0.3, 0.2], [0.1, 1.0, 2.0, 0.5, 0.3, 3.0, 0.2, 0.7])


def control_of(law):
  return GaussianControl(law.mean[0], law.basis, law.variances[0])


@pytest.mark.parametrize("process", PAPER)
def test_linear_part_is_the_flow_of_the_gaussian(x64, process):
  sde, x = make_sde(process), jnp.arange(8.0)
  score = lambda x, t, _: LAW.score_fn(sde)(x[None], t)[0]
  field = lambda y: probability_flow(sde, score)(0.3, y, None)
  velocity, trace = linear_part(sde, control_of(LAW))(0.3, x)
  np.testing.assert_allclose(velocity, field(x), rtol=1e-10)
  np.testing.assert_allclose(trace, jnp.trace(jax.jacfwd(field)(x)), rtol=1e-10)
  velocity, trace = linear_part(sde, None)(0.3, x)
  f = PAPER[process].f(0.3)
  np.testing.assert_allclose([*velocity, trace], [*(f * np.arange(8)), 8 * f], atol=1e-12)


@laws
def test_control_removes_all_variance_on_gaussian_data(x64, name):
  """Every estimate of every law is the exact trace."""
  sde, x, k = make_sde("vp"), jnp.arange(8.0), 6
  score = lambda x, t, _: LAW.score_fn(sde)(x[None], t)[0]
  field = probability_flow(sde, score)
  probe = DIVERGENCES[name](jax.random.key(0), x, k)
  start = x, jnp.zeros(num_estimates(probe))
  run = lambda linear: jax.jit(
    lambda start: with_log_density(field, probe, linear)(0.2, start, None)
  )(start)
  drift, change = run(linear_part(sde, control_of(LAW)))
  exact = -jax.jit(lambda y: jnp.trace(jax.jacfwd(lambda y: field(0.2, y, None))(y)))(x)
  np.testing.assert_allclose(drift, field(0.2, x, None), rtol=1e-12)
  np.testing.assert_allclose(change, np.full(len(change), exact), rtol=1e-10)
  if name != "exact":
    assert run(None)[1].std() > 0.1


def test_any_control_is_unbiased(x64):
  """Over all signs the mean is the exact trace, for a control that has nothing to do with the data;
  and the known drift is not estimated: Gaussian probes see a scaled identity without error.
  """
  pair = Mixture(np.array([[0.4, 0.6]]), np.array([[1.0, 0.5, 0.0], [-1.0, 0.2, 0.4]]), 0.3)
  wrong = control_of(rotated([3.0, 1.0, 2.0], [0.2, 1.0, 5.0], seed=4))
  sde, x = make_sde("vp"), jnp.array([0.3, -0.4, 1.0])
  field = probability_flow(sde, lambda x, t, _: pair.score_fn(sde)(x[None], t)[0])
  exact = -jax.jit(lambda y: jnp.trace(jax.jacfwd(lambda y: field(0.2, y, None))(y)))(x)
  flow = with_log_density(field, jnp.asarray(all_signs(3)), linear_part(sde, wrong))
  mean = jax.jit(lambda x: flow(0.2, (x, jnp.zeros(())), None)[1])(x)
  np.testing.assert_allclose(mean, exact, rtol=1e-10)
  probe = DIVERGENCES["gaussian"](jax.random.key(0), x, 5)
  still = probability_flow(sde, lambda x, t, _: jnp.zeros_like(x))
  flow = with_log_density(still, probe, linear_part(sde, None))
  _, change = jax.jit(lambda x: flow(0.2, (x, jnp.zeros(5)), None))(x)
  np.testing.assert_allclose(change, np.full(5, -3 * PAPER["vp"].f(0.2)), rtol=1e-10)


def test_fit_control_diagonalises_the_moments():
  x = np.random.default_rng(0).normal(size=(50, *SHAPE)) * np.arange(1.0, 4.0)
  mean, vectors, values = (np.asarray(a, np.float64) for a in fit_control(x))
  flat = x.reshape(50, D)
  np.testing.assert_allclose(mean, flat.mean(0), atol=1e-6)
  np.testing.assert_allclose((vectors * values) @ vectors.T, np.cov(flat.T), atol=1e-5)
  assert (np.asarray(fit_control(x[:3]).eigenvalues) >= 0).all()
  with pytest.raises(ConfigError, match="control"):
    fit_control(np.full((3, 2), np.nan))


@pytest.mark.parametrize("name, k", [("rademacher", 24), ("gaussian", 24), ("orthogonal", 12)])
def test_interval_of_the_standard_error_covers_at_its_level(name, k):
  """4,000 estimates of one trace, and the 95 % interval of Student's law with k - 1 degrees."""
  matrix = jnp.asarray(np.random.default_rng(2).normal(size=(24, 24)), jnp.float32)
  x = jnp.zeros(24)
  one = lambda key: traces(lambda v: matrix @ v, DIVERGENCES[name](key, x, k), x)
  estimates = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
  error = np.asarray(standard_error(estimates, name, 24))
  away = np.abs(np.asarray(estimates.mean(1)) - float(jnp.trace(matrix)))
  quantile = {24: 2.069, 12: 2.201}[k]
  assert 0.93 < (away < quantile * error).mean() < 0.97
  np.testing.assert_allclose((error**2).mean(), (away**2).mean(), rtol=0.12)


@pytest.mark.exhaustive
def test_reported_interval_of_the_likelihood_covers():
  """The same for log p along the path, against the exact trace at the same point (PITFALLS, row
  29).
  """
  sde, n = make_sde("vp"), 1500
  x = jnp.tile(LAW.sample(jax.random.key(5), 1), (n, 1))
  loose = {"rtol": 1e-3, "atol": 1e-3}
  run = lambda keys, x, **how: log_likelihood(keys, sde, LAW.score_fn(sde), x, **how, **loose)
  keys = example_keys(jax.random.key(0), n)
  result = jax.jit(lambda keys, x: run(keys, x, num_probes=24))(keys, x)
  exact = jax.jit(lambda keys, x: run(keys, x, divergence="exact"))(keys[:1], x[:1])
  assert exact.standard_error[0] == 0
  away = np.abs(result.log_prob - exact.log_prob)
  assert 0.93 < (away < 2.069 * result.standard_error).mean() < 0.97


def test_one_estimate_has_no_standard_error():
  assert np.isnan(standard_error(jnp.ones((3, 1)), "rademacher", 4)).all()
