"""The vector fields on Gaussian data, the trace estimators, and what `solve` reports."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PAPER, diagonal, rotated

from dynamics import (
  SOLVERS,
  in_noise_time,
  noise_time,
  probability_flow,
  reverse_sde,
  solve,
  with_log_density,
)
from errors import ConfigError
from sde_lib import make_sde

names = pytest.mark.parametrize("name", PAPER)
solvers = pytest.mark.parametrize("solver", SOLVERS)
LAW = rotated([1.0, -2.0, 0.5], [0.1, 1.0, 2.0])
LINE = diagonal([1.5], [0.3])
TIGHT = {"solver": "dopri8", "rtol": 1e-9, "atol": 1e-9, "max_steps": 2000}
LOOSE = {"rtol": 1e-3, "atol": 1e-3, "max_steps": 500}


@names
def test_probability_flow_is_the_derivative_of_the_closed_form_flow(x64, name):
  sde = make_sde(name)
  start = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
  flow = jax.jit(lambda t: jax.jvp(lambda t: LAW.flow(sde, start, sde.t_max, t), (t,), (1.0,)))
  field = jax.jit(probability_flow(sde, LAW.score_fn(sde)))
  for t in (0.01, 0.2, 0.5, 0.9):
    x, velocity = flow(t)
    np.testing.assert_allclose(field(t, x, None), velocity, rtol=1e-10, atol=1e-10)


@names
def test_solve_follows_the_closed_form_flow(x64, name):
  """Towards the prior; `sample_ode` is tested the other way."""
  sde = make_sde(name)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
  field = probability_flow(sde, LAW.score_fn(sde))
  solution = solve(field, x, sde.t_min, sde.t_max, **TIGHT)
  expected = LAW.flow(sde, x, sde.t_min, sde.t_max)
  np.testing.assert_allclose(solution.state, expected, rtol=0, atol=1e-6 * sde.prior_std)


@names
def test_noise_time_follows_the_same_flow(x64, name):
  """There and back; and every process takes the same time u for the same noise level."""
  sde = make_sde(name)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
  field = in_noise_time(sde, probability_flow(sde, LAW.score_fn(sde)))
  ends = noise_time(sde, sde.t_min), noise_time(sde, sde.t_max)
  there = solve(field, x, *ends, **TIGHT)
  expected = LAW.flow(sde, x, sde.t_min, sde.t_max)
  np.testing.assert_allclose(there.state, expected, rtol=0, atol=1e-6 * sde.prior_std)
  back = solve(field, there.state, *ends[::-1], **TIGHT)
  np.testing.assert_allclose(back.state, x, rtol=0, atol=1e-6)
  paper = PAPER[name]
  ratio = paper.sigma(np.array([0.2, 0.7])) / paper.alpha(np.array([0.2, 0.7]))
  np.testing.assert_allclose(0.3 * np.sinh(noise_time(sde, np.array([0.2, 0.7]))), ratio, rtol=1e-9)


def test_labels_reach_the_score():
  sde = make_sde("vp")
  field = probability_flow(sde, lambda x, t, labels: jnp.full_like(x, 1.0) * labels[:, None])
  f, g_squared = PAPER["vp"].f(0.5), PAPER["vp"].g_squared(0.5)
  velocity = field(0.5, jnp.ones((2, 1)), jnp.array([0, 3]))
  np.testing.assert_allclose(velocity[:, 0], [f, f - 1.5 * g_squared], rtol=1e-6)


@names
def test_reverse_sde_terms(x64, name):
  """Drift g^2 score - f x and diffusion g, at time t = t_max - s."""
  sde, paper, s = make_sde(name), PAPER[name], 0.3
  terms = reverse_sde(sde, LAW.score_fn(sde), jax.random.key(0), (2, 3)).terms
  x, t = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3))), np.array(sde.t_max - s)
  score = LAW.score(x, paper.alpha(t), paper.sigma(t))
  drift = paper.g_squared(t) * score - paper.f(t) * x
  np.testing.assert_allclose(terms[0].vector_field(s, x, None), drift, rtol=1e-10)
  diffusion = terms[1].vector_field(s, x, None)
  np.testing.assert_allclose(diffusion.mv(x), np.sqrt(paper.g_squared(t)) * x, rtol=1e-10)


@names
@pytest.mark.parametrize("s", [0.01, 0.5, 0.99])
def test_reverse_sde_retraces_the_forward_moments(x64, s, name):
  """Drift A x + b gives m' = A m + b = -f m and P' = 2 A P + g^2 = -(2 f P + g^2) along s."""
  sde, paper, t = make_sde(name), PAPER[name], np.array(1 - s)
  drift, noise = reverse_sde(sde, LINE.score_fn(sde), jax.random.key(0), (3, 1)).terms
  mean, variance = paper.alpha(t) * 1.5, paper.variance(t, 0.3)
  x = jnp.array([[0.0], [1.0], [mean]])
  zero, one, at_mean = drift.vector_field(s, x, None)[:, 0]
  g = noise.vector_field(s, x, None).mv(jnp.ones((3, 1)))[0, 0]
  d_mean, d_variance = paper.f(t) * mean, 2 * paper.f(t) * variance + paper.g_squared(t)
  np.testing.assert_allclose(at_mean, -d_mean, rtol=1e-10, atol=1e-10)
  np.testing.assert_allclose(2 * (one - zero) * variance + g**2, -d_variance, rtol=1e-10)


def nonlinear(shape, seed=0):
  """A field on `shape` with a dense Jacobian that is neither symmetric nor constant."""
  size = int(np.prod(shape))
  w = jnp.asarray(np.random.default_rng(seed).normal(size=(size, size)))
  return lambda t, x, args: (jnp.tanh(w @ x.reshape(-1) + t) * jnp.cos(x.reshape(-1))).reshape(
    shape
  )


def jacobian(field, x):
  flat = lambda y: field(0.3, y.reshape(x.shape), None).reshape(-1)
  return jax.jit(jax.jacrev(flat))(x.reshape(-1))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_exact_trace_is_that_of_the_jacobian(x64, shape):
  field, x = nonlinear(shape), jnp.asarray(np.random.default_rng(1).normal(size=shape))
  drift, change = jax.jit(with_log_density(field, None))(0.3, (x, jnp.zeros(())), None)
  np.testing.assert_allclose(drift, field(0.3, x, None), rtol=1e-14)
  np.testing.assert_allclose(change, -jnp.trace(jacobian(field, x)), rtol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_rademacher_probes_are_unbiased(x64, shape):
  """The mean over all 2^D probes is the exact trace, though single probes are far from it."""
  field, x = nonlinear(shape), jnp.asarray(np.random.default_rng(1).normal(size=shape))
  probes = np.array(list(itertools.product((-1.0, 1.0), repeat=x.size)))
  trace = lambda probe: -with_log_density(field, probe)(0.3, (x, jnp.zeros(())), None)[1]
  each = jax.jit(jax.vmap(lambda p: trace(p.reshape(1, *shape))))(probes)
  matrix = np.asarray(jacobian(field, x))
  np.testing.assert_allclose(each, np.einsum("pi,ij,pj->p", probes, matrix, probes), atol=1e-12)
  assert each.std() > 0.1
  mean = jax.jit(trace)(probes.reshape(-1, *shape))
  np.testing.assert_allclose([each.mean(), mean], np.trace(matrix), rtol=0, atol=1e-10)


def test_each_estimate_has_its_own_log_density(x64):
  """A state of m log-densities keeps the estimates apart; a number takes their mean."""
  field, x = nonlinear((3,)), jnp.array([0.3, -1.0, 0.5])
  probes = jnp.asarray(np.random.default_rng(2).choice([-1.0, 1.0], size=(4, 3)))
  flow = jax.jit(lambda start: with_log_density(field, probes)(0.3, start, None)[1])
  matrix = np.asarray(jacobian(field, x))
  each = -np.einsum("pi,ij,pj->p", probes, matrix, probes)
  np.testing.assert_allclose(flow((x, jnp.zeros(4))), each, rtol=1e-10)
  np.testing.assert_allclose(flow((x, jnp.zeros(()))), each.mean(), rtol=1e-10)


@pytest.mark.parametrize("count", [1, 5, None])
def test_the_network_runs_once_for_all_probes(executions, count):
  """Its primal pass is not repeated: not for probes, not for the chunks of the exact trace
  (PITFALLS, row 28).
  """
  probe = count and jnp.ones((count, 70))
  flow = with_log_density(lambda t, x, args: jnp.tanh(executions.mark(x)), probe)
  jax.jit(lambda x: flow(0.1, (x, jnp.zeros(count or 1)), None))(jnp.ones(70))
  assert executions.count() == 1


def test_density_of_a_linear_flow(x64):
  """x' = -x from 0 to 1 shrinks volumes by e^-D: log p grows by D."""
  field = with_log_density(lambda t, x, args: -x, None)
  (x, change), _, ok = solve(field, (jnp.ones((2, 2)), jnp.zeros(())), 0.0, 1.0, **TIGHT)
  np.testing.assert_allclose(x, np.exp(-1), rtol=1e-8)
  np.testing.assert_allclose(change, 4.0, rtol=1e-8)
  assert ok


@solvers
def test_nfe_counts_executed_evaluations(executions, solver):
  field = lambda t, x, args: -jnp.sin(executions.mark(x)) * (1 + 20 * t)
  solution = solve(field, jnp.ones(3), 1.0, 0.0, solver=solver, **LOOSE)
  assert solution.ok and solution.nfe == executions.count() > 10


@pytest.mark.parametrize("solver", ["heun", "tsit5", "bosh3"])
def test_nfe_counts_a_rejected_first_step(executions, solver):
  field = lambda t, x, args: -1e5 * jnp.exp(-1e4 * t) * executions.mark(x)
  solution = solve(field, jnp.ones(3), 0.0, 1.0, solver=solver, **LOOSE)
  assert solution.ok and solution.nfe == executions.count() > 10


def test_solution_is_not_ok_at_max_steps():
  options = {"solver": "tsit5", "rtol": 1e-5, "atol": 1e-5, "max_steps": 3}
  assert not solve(lambda t, x, args: -x, jnp.ones(3), 0.0, 9.0, **options).ok


def test_solution_is_not_ok_where_the_field_is_not_finite():
  """args carries the value the field takes after t = 0.5."""
  field = lambda t, x, args: jnp.where(t > 0.5, args, -x)
  run = jax.jit(
    lambda late: solve(field, jnp.ones(3), 0.0, 1.0, solver="tsit5", args=late, **LOOSE).ok
  )
  assert [bool(run(late)) for late in (0.0, jnp.nan, jnp.inf)] == [True, False, False]


def test_solution_is_not_ok_where_the_state_is_not_finite():
  """The solver itself succeeds: an infinite state has an infinite tolerance."""
  still = lambda t, x, args: jnp.zeros_like(x)
  assert not solve(still, jnp.array([1.0, jnp.inf]), 0.0, 1.0, solver="heun", **LOOSE).ok


def test_unknown_solver_lists_the_legal_ones():
  with pytest.raises(ConfigError, match="solver = 'rk45'") as error:
    solve(lambda t, x, args: x, jnp.ones(1), 0.0, 1.0, solver="rk45", **LOOSE)
  assert all(repr(name) in str(error.value) for name in SOLVERS)
