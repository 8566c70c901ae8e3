"""The processes beyond VP, sub-VP and VE: closed forms, tables, and the figures of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import diagonal
from scipy.integrate import solve_ivp

import sampling
from sde_lib import SDES, coefficients, log_snr, make_sde, marginal, user

CONTINUOUS = {
  "cosine": {"t_min": 1e-3, "t_max": 0.99},
  "edm": {},
  "rectified": {"t_max": 0.99},
}
continuous = pytest.mark.parametrize("name", CONTINUOUS)


@continuous
def test_marginal_solves_the_moment_equations(x64, name):
  """m' = f m and P' = 2 f P + g^2 from t_min (CATALOGUE row 58)."""
  sde = make_sde(name, **CONTINUOUS[name])
  times = np.geomspace(sde.t_min, sde.t_max, 100)
  alpha, sigma = (np.asarray(c) for c in marginal(sde, jnp.asarray(times)))

  def slopes(t, moments):
    f, g_squared = map(float, coefficients(sde, t))
    return f * moments[0], 2 * f * moments[1] + g_squared

  start, ends = (alpha[0], sigma[0] ** 2), (times[0], times[-1])
  tight = {"rtol": 1e-11, "atol": 1e-14, "method": "DOP853"}
  solution = solve_ivp(slopes, ends, start, t_eval=times, **tight)
  np.testing.assert_allclose(solution.y[0], alpha, rtol=1e-8)
  np.testing.assert_allclose(solution.y[1], sigma**2, rtol=1e-8)


def test_cosine_is_that_of_the_paper(x64):
  t, s = np.linspace(1e-4, 0.999, 50), 0.008
  phi = lambda t: (t + s) / (1 + s) * np.pi / 2
  alpha, sigma = marginal(make_sde("cosine"), jnp.asarray(t))
  expected = np.cos(phi(t)) / np.cos(phi(0))
  np.testing.assert_allclose(alpha, expected, rtol=1e-12)
  np.testing.assert_allclose(sigma, np.sqrt(1 - expected**2), rtol=1e-9)


@pytest.mark.parametrize("name", sorted(SDES))
def test_float32_keeps_the_digits_of_every_process(name):
  """Against float64 at 200 times from t_min on: no cancellation (PITFALLS 2)."""
  sde = make_sde(name)
  times = np.linspace(sde.t_min, sde.t_max, 202)[1:-1] + 1e-4 * (sde.t_max - sde.t_min)
  times = np.concatenate([[sde.t_min], times[times < sde.t_max]]).astype(np.float32)
  read = lambda sde: (*marginal(sde, jnp.asarray(times)), *coefficients(sde, jnp.asarray(times)))
  low = [np.asarray(c) for c in read(sde)]
  with jax.enable_x64(True):
    exact = make_sde(name)
    high = [np.asarray(c) for c in read(exact)]
  for a, b in zip(low[:2], high[:2]):
    np.testing.assert_allclose(a, b, rtol=3e-5)
  if make_sde(name).times is None:  # the derivative of an interpolation jumps at its levels
    for a, b in zip(low[2:], high[2:]):
      np.testing.assert_allclose(a, b, rtol=3e-4)


def test_edm_has_sigma_equal_to_time(x64):
  sde = make_sde("edm")
  f, g_squared = coefficients(sde, jnp.array([0.5, 3.0]))
  np.testing.assert_allclose(f, 0.0)
  np.testing.assert_allclose(g_squared, [1.0, 6.0])


def test_rectified_velocity_is_noise_minus_data(x64):
  """The probability flow of N(m, v) under the straight path: dx/dt = E[noise - x_0 | x]."""
  from dynamics import probability_flow

  sde, law = make_sde("rectified"), diagonal([0.3, -1.0], [0.25, 1.5])
  x, t = jnp.array([[0.4, -0.7]]), jnp.asarray(0.37)
  alpha, sigma = marginal(sde, t)
  data = law.denoise(x, alpha, sigma)
  velocity = (x - alpha * data) / sigma - data
  np.testing.assert_allclose(
    probability_flow(sde, law.score_fn(sde))(t, x, None), velocity, rtol=1e-10
  )


def test_a_user_process_is_two_functions(x64):
  mine = user(lambda t: 1 - t, lambda t: t, t_min=1e-3, t_max=0.999, prior_std=1.0)
  t = jnp.linspace(0.01, 0.99, 20)
  for a, b in zip(coefficients(mine, t), coefficients(make_sde("rectified"), t)):
    np.testing.assert_allclose(a, b, rtol=1e-9)


# Discrete chains


def alpha_bar(sde):
  return np.asarray(marginal(sde, jnp.asarray(sde.times))[0], np.float64) ** 2


def test_ddpm_table_ends_at_the_published_alpha_bar(x64):
  """CATALOGUE rows 37 and 54."""
  table = alpha_bar(make_sde("ddpm"))
  np.testing.assert_allclose(table[-1], 4.035830e-05, rtol=1e-6)
  np.testing.assert_allclose(table[749], 3.35e-3, rtol=2e-3)
  assert (table < 0.01).mean() == pytest.approx(0.327, abs=5e-4)


def test_ddpm_table_keeps_its_digits_in_float32():
  """1 - alpha-bar at the first step is beta_1; a float32 product is off by 1.7e-4 (PITFALLS 3)."""
  sde = make_sde("ddpm")
  np.testing.assert_allclose(marginal(sde, jnp.asarray(sde.times))[1][0] ** 2, 1e-4, rtol=3e-6)


def test_iddpm_table_is_that_of_the_cosine_schedule(x64):
  """CATALOGUE row 55: alpha-bar 0.1443 at 75 %, 6.5 % of the steps below 0.01, one clipped."""
  table = alpha_bar(make_sde("iddpm", num_steps=1000))
  np.testing.assert_allclose(table[749], 0.1443, rtol=1e-3)
  assert (table < 0.01).mean() == pytest.approx(0.065, abs=1e-3)
  betas = 1 - table[1:] / table[:-1]
  assert betas.max() == pytest.approx(0.999, abs=1e-6) and (betas > 0.998).sum() == 1


def test_signal_to_noise_at_three_quarters(x64):
  """CATALOGUE row 56: 3.4e-3 for the linear schedule against 0.169 for the cosine one."""
  for name, expected in (("ddpm", 3.4e-3), ("iddpm", 0.169)):
    sde = make_sde(name, num_steps=1000)
    np.testing.assert_allclose(jnp.exp(log_snr(sde, 0.75)), expected, rtol=2e-2)


def test_ddpm_chain_tends_to_the_vp_process(x64):
  """CATALOGUE row 64: 4.0358e-5 against 4.3187e-5 at N = 1000; the difference is O(1 / N)."""
  vp = float(marginal(make_sde("vp"), 1.0)[0] ** 2)
  np.testing.assert_allclose(vp, 4.3187e-5, rtol=1e-4)
  gaps = []
  for n in (1000, 2000, 4000):
    chain = make_sde("ddpm", beta_min=0.1 / n, beta_max=20 / n, num_steps=n)
    gaps.append(abs(np.log(alpha_bar(chain)[-1] / vp)))
  np.testing.assert_allclose(np.log2(gaps[0] / gaps[1]), 1, atol=0.05)
  np.testing.assert_allclose(np.log2(gaps[1] / gaps[2]), 1, atol=0.05)


def test_ncsn_levels_are_geometric_with_exact_ends(x64):
  sde = make_sde("ncsn")
  sigmas = np.asarray(marginal(sde, jnp.arange(1, 11) / 10)[1])
  np.testing.assert_allclose(sigmas[[0, -1]], [0.01, 1.0], rtol=1e-12)
  np.testing.assert_allclose(sigmas[1:] / sigmas[:-1], 100 ** (1 / 9), rtol=1e-12)


def test_trained_grid_holds_levels_of_the_chain():
  sde = make_sde("ddpm", num_steps=100)
  full = sampling.time_grid(sde, 99, "trained")
  np.testing.assert_array_equal(full, np.float32(sde.times[::-1]))
  respaced = np.asarray(sampling.time_grid(sde, 9, "trained"))
  assert len(respaced) == 10 and np.isin(respaced, np.float32(sde.times)).all()
  assert respaced[0] == 1.0 and respaced[-1] == np.float32(0.01) and (np.diff(respaced) < 0).all()


@pytest.mark.parametrize(
  ("name", "fraction", "expected"),
  [
    ("ddpm", 0.2, 0.49981),
    ("iddpm", 0.2, 0.48735),
    ("ddpm", 0.4, 0.4967),
    ("iddpm", 0.4, 0.4428),
  ],
)
def test_skipping_the_first_part_biases_the_mean(x64, monkeypatch, name, fraction, expected):
  """CATALOGUE row 57: data N(0.5, 0.25), exact reverse chain; noise-free steps carry the mean."""
  monkeypatch.setattr(sampling, "normal", lambda key, shape: jnp.zeros(shape))
  sde, law = make_sde(name, num_steps=1000), diagonal([0.5], [0.25])
  times = sampling.time_grid(sde, 999, "trained")[int(1000 * fraction) :]
  run = {"step": sampling.ancestral(sde), "times": times, "denoise": "tweedie"}
  start = jnp.zeros((1, 1))
  x, nfe = sampling.sample(jax.random.key(0), sde, law.noise_fn(sde), (1, 1), init=start, **run)
  np.testing.assert_allclose(x[0, 0], expected, atol=5e-5)
  assert nfe == 1000 * (1 - fraction)
