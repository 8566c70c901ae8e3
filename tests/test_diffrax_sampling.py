"""Reverse SDE and probability flow by diffrax: strong order on one Brownian path, adaptive steps,
the exponential form, where a solve starts and how it fails.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import Mixture, diagonal

from errors import ConfigError
from sampling import SDE_SOLVERS, sample_ode, sample_sde
from sde_lib import SDE, example_keys, fold_in, make_sde, marginal, sample_prior

LAW = diagonal([0.3, -0.2], [0.25, 1.5])
KEY = jax.random.key(0)
VP = {"t_min": 0.05, "beta_max": 5.0}


def draw(sde, shape=(8, 2), key=KEY, law=LAW, sampler=sample_sde, **options):
  run = jax.jit(lambda key: sampler(key, sde, law.score_fn(sde), shape, **options))
  x, nfe = run(key)
  return np.asarray(x), int(nfe)


@pytest.fixture(scope="module")
def on_one_path():
  """(solver, steps) -> samples of a mixture on the Brownian path of KEY, each computed once."""
  law = Mixture(np.array([[0.5, 0.5]]), np.array([[1.0], [-1.0]]), 0.25)

  @functools.cache
  def run(solver, num_steps):
    with jax.enable_x64(True):
      options = {"solver": solver, "num_steps": num_steps, "refinable": True}
      return draw(make_sde("vp", **VP), (256, 1), law=law, **options)[0]

  return run


MORE_ORDERS = ("heun", 1), ("sea", 1), ("sra1", 1.5), ("shark", 1.5)


@pytest.mark.parametrize(
  ("solver", "order"),
  [
    ("euler", 1),
    *(pytest.param(*row, marks=pytest.mark.exhaustive) for row in MORE_ORDERS),
  ],
)
def test_strong_order_on_one_brownian_path(on_one_path, solver, order):
  """Root mean square distance to a fine solution on the same path, against the step."""
  error = lambda n: np.sqrt(np.mean((on_one_path(solver, n) - on_one_path("shark", 2048)) ** 2))
  assert np.log2(error(32) / error(256)) / 3 == pytest.approx(order, abs=0.1)


def test_adaptive_steps_refine_the_same_path(x64):
  """As the tolerance falls the samples converge, and not to those of another key."""
  sde, score_fn = make_sde("vp", **VP), LAW.score_fn(make_sde("vp", **VP))
  solve = lambda key, tol: sample_sde(
    key, sde, score_fn, (8, 2), solver="shark", rtol=tol, atol=tol
  )
  run = jax.jit(solve)
  (coarse, few), (middle, more), (fine, most) = (run(KEY, tol) for tol in (1e-2, 1e-3, 1e-4))
  distance = lambda x: np.sqrt(np.mean((x - fine) ** 2))
  assert few < more < most
  assert distance(middle) < 0.5 * distance(coarse) < 0.05
  assert distance(run(jax.random.key(1), 1e-3)[0]) > 0.3


def test_adaptive_steps_are_of_each_example_its_own():
  """Alone, an example takes its own steps; together it draws the same."""
  sde = make_sde("vp", **VP)
  solve = lambda first, n: sample_sde(KEY, sde, LAW.score_fn(sde), (n, 2), first_index=first)
  run = jax.jit(solve, static_argnums=1)
  together, nfe = run(0, 4)
  alone = [run(i, 1) for i in range(4)]
  np.testing.assert_allclose(together, np.concatenate([x for x, _ in alone]), rtol=1e-4, atol=1e-5)
  assert nfe == max(n for _, n in alone) > min(n for _, n in alone)


@pytest.mark.exhaustive
def test_adaptive_steps_draw_the_data():
  """Moments of 4,000 draws within 4 standard errors, the law's std within 1 % beside them."""
  sde, n = make_sde("vp", t_min=1e-3), 4000
  x, _ = draw(sde, (n, 1), law=diagonal([1.5], [0.3]), solver="shark", rtol=1e-2, atol=1e-2)
  alpha, sigma = marginal(sde, sde.t_min)
  std = float(np.sqrt(alpha**2 * 0.3 + sigma**2))
  assert x.mean() == pytest.approx(1.5 * float(alpha), abs=4 * std / np.sqrt(n))
  assert x.std() == pytest.approx(std, rel=0.01 + 4 / np.sqrt(2 * n))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("solver", "spacing"), [("euler", "log_snr"), ("shark", "time")])
def test_exponential_form_is_the_process_of_x_over_alpha(x64, solver, spacing):
  """The same steps and noise on the process with alpha = 1 and sigma = r, up to the scale."""
  vp, law = make_sde("vp", **VP), diagonal([0.3, -0.2], [0.25, 1.5])
  log_r = lambda t: vp.log_sigma(t) - vp.log_alpha(t)
  prior_std = float(1 / marginal(vp, 1.0)[0])
  flat = SDE(jnp.zeros_like, log_r, vp.t_min, vp.t_max, prior_std)
  options = {"solver": solver, "num_steps": 12, "spacing": spacing, "law": law}
  x, nfe = draw(vp, exponential=True, **options)
  y, nfe_flat = draw(flat, **options)
  np.testing.assert_allclose(x, y * marginal(vp, vp.t_min)[0], rtol=1e-9)
  assert nfe == nfe_flat == 12 * SDE_SOLVERS[solver][1]
  plain, _ = draw(vp, **options)
  assert np.abs(x - plain).max() > 1e-3


@pytest.mark.parametrize("name", ["vp", "ve", "rectified"])
def test_exponential_flow_is_the_closed_form_flow(x64, name):
  sde = make_sde(name, **({"t_min": 1e-2} if name != "ve" else {}))
  start = sample_prior(KEY, sde, (4, 2))
  options = {"sampler": sample_ode, "init": start, "exponential": True, "solver": "dopri8"}
  x, _ = draw(sde, (4, 2), rtol=1e-9, atol=1e-9, **options)
  np.testing.assert_allclose(x, LAW.flow(sde, start, sde.t_max, sde.t_min), rtol=0, atol=1e-6)


def test_flow_starts_where_and_as_warm_as_it_is_told(x64):
  """A later start scales a named draw by sigma(t) / sigma(t_max), the temperature any start."""
  sde, t = make_sde("ve", sigma_max=20.0), 0.4
  prior = sample_prior(fold_in(example_keys(KEY, 3), 0), sde, (3, 2))
  start = 0.5 * prior * marginal(sde, t)[1] / sde.prior_std
  options = {"sampler": sample_ode, "solver": "dopri8", "rtol": 1e-9, "atol": 1e-9, "t_start": t}
  x, _ = draw(sde, (3, 2), temperature=0.5, **options)
  np.testing.assert_allclose(x, LAW.flow(sde, start, t, sde.t_min), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"solver": "euler"}, ["solver = 'euler'", "heun, sra1, shark", "num_steps"]),
    ({"solver": "sea"}, ["solver = 'sea'", "shark"]),
    ({"solver": "heun", "init": "data"}, ["init = 'data'", "'prior', 'uniform', 'unit_uniform'"]),
    ({"solver": "heun", "num_steps": 3, "spacing": "even"}, ["spacing = 'even'", "'log_snr'"]),
  ],
)
def test_unusable_options_are_named(options, words):
  with pytest.raises(ConfigError) as error:
    draw(make_sde("vp"), **options)
  assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
  "options",
  [
    {"max_steps": 5},
    pytest.param(
      {"rtol": 1e-12, "atol": 1e-12, "max_steps": 100_000}, marks=pytest.mark.exhaustive
    ),
  ],
)
def test_a_solve_that_fails_is_nan_and_no_truncated_sample(options):
  """Too few steps; steps shorter than the path knows."""
  x, _ = draw(make_sde("vp"), (2, 2), solver="shark", **options)
  assert np.isnan(x).all()
