"""The forward process: closed forms of Song et al. 2021, its own moment equations, conditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PAPER
from scipy.integrate import quad, solve_ivp
from scipy.stats import norm

import sde_lib
from errors import ConfigError

names = pytest.mark.parametrize("name", PAPER)

FUNCTIONS = "marginal", "coefficients", "log_snr", "log_snr_rate"


def grid(sde, n=101):
  return jnp.linspace(sde.t_min, sde.t_max, n)


def close_to_paper(name, rtol):
  sde, paper = sde_lib.make_sde(name), PAPER[name]
  t = grid(sde)
  t64 = np.asarray(t, np.float64)
  alpha_sigma, f_g_squared, log_snr, rate = jax.jit(
    lambda t: [getattr(sde_lib, function)(sde, t) for function in FUNCTIONS]
  )(t)
  for value, closed_form in zip(
    (*alpha_sigma, *f_g_squared), (paper.alpha, paper.sigma, paper.f, paper.g_squared)
  ):
    np.testing.assert_allclose(value, closed_form(t64), rtol)
  np.testing.assert_allclose(log_snr, paper.log_snr(t64), rtol, atol=rtol)
  np.testing.assert_allclose(rate, paper.g_squared(t64) / paper.sigma(t64) ** 2, rtol)


@names
def test_closed_forms_in_float64(x64, name):
  close_to_paper(name, 1e-10)


@names
def test_closed_forms_in_float32(name):
  close_to_paper(name, 1e-5)


@names
def test_marginal_solves_the_moment_equations(x64, name):
  sde = sde_lib.make_sde(name)
  coefficients = jax.jit(lambda t: sde_lib.coefficients(sde, t))
  t = grid(sde)
  alpha, sigma = map(np.asarray, sde_lib.marginal(sde, t))

  def moments(t, y):
    f, g_squared = map(float, coefficients(t))
    return [f * y[0], 2 * f * y[1] + g_squared]

  start = [alpha[0], alpha[0] ** 2 * 0.3 + sigma[0] ** 2]
  ends = sde.t_min, sde.t_max
  solution = solve_ivp(moments, ends, start, "DOP853", t_eval=t, rtol=1e-11, atol=1e-16)
  np.testing.assert_allclose(solution.y, [alpha, alpha**2 * 0.3 + sigma**2], rtol=1e-8)


@names
def test_sigma_keeps_its_digits_near_the_data(name):
  t = jnp.array([1e-5, 1e-4])
  sigma = sde_lib.marginal(sde_lib.make_sde(name), t)[1]
  np.testing.assert_allclose(sigma, PAPER[name].sigma(np.asarray(t, np.float64)), rtol=1e-6)


@names
def test_log_snr_decreases(name):
  sde = sde_lib.make_sde(name)
  assert (jnp.diff(sde_lib.log_snr(sde, grid(sde))) < 0).all()


@names
def test_time_of_log_snr_inverts_log_snr_in_float64(x64, name):
  sde = sde_lib.make_sde(name)
  t = grid(sde)
  np.testing.assert_allclose(
    sde_lib.time_of_log_snr(sde, sde_lib.log_snr(sde, t)), t, rtol=0, atol=1e-14
  )


@names
def test_time_of_log_snr_inverts_log_snr_in_float32(name):
  sde = sde_lib.make_sde(name)
  t = grid(sde)
  np.testing.assert_allclose(
    sde_lib.time_of_log_snr(sde, sde_lib.log_snr(sde, t)), t, rtol=0, atol=2e-6
  )


@names
def test_time_of_log_snr_clamps(name):
  sde = sde_lib.make_sde(name)
  ends = sde_lib.time_of_log_snr(sde, jnp.array([1e3, -1e3]))
  np.testing.assert_allclose(ends, np.float32([sde.t_min, sde.t_max]), rtol=0, atol=1e-20)


@names
def test_posterior_conditions_the_joint_law(x64, name):
  """(x_s, x_t) given x_0 is Gaussian with covariance [[s_s^2, k s_s^2], [k s_s^2, s_t^2]]."""
  sde, paper = sde_lib.make_sde(name), PAPER[name]
  s, t = np.array([0.05, 0.3, 0.5, 0.2]), np.array([0.1, 0.4, 0.9, 1.0])
  x0, x_t = np.random.default_rng(0).normal(size=(2, 4, 1, 3))
  k = paper.alpha(t) / paper.alpha(s)
  gain = k * paper.sigma(s) ** 2 / paper.sigma(t) ** 2
  at = lambda c: c[:, None, None]
  mean = at(paper.alpha(s)) * x0 + at(gain) * (x_t - at(paper.alpha(t)) * x0)
  std = np.sqrt(paper.sigma(s) ** 2 * (1 - gain * k))
  ours = sde_lib.posterior(sde, *map(jnp.asarray, (x_t, x0, t, s)))
  np.testing.assert_allclose(ours[0], mean, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(ours[1], std, rtol=1e-12)


@names
@pytest.mark.parametrize("t", [0.3, [0.1, 0.9]])
def test_perturb_draws_from_the_marginal(name, t):
  x0, noise = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
  paper, t = PAPER[name], np.asarray(t)
  alpha, sigma = (np.reshape(c(t), (-1, 1, 1)) for c in (paper.alpha, paper.sigma))
  x_t = sde_lib.perturb(
    sde_lib.make_sde(name), *(jnp.asarray(a, jnp.float32) for a in (x0, noise, t))
  )
  np.testing.assert_allclose(x_t, alpha * x0 + sigma * noise, rtol=1e-5, atol=1e-6)


@names
def test_prior_log_prob_is_that_of_the_prior(x64, name):
  sde = sde_lib.make_sde(name)
  z = np.random.default_rng(0).normal(size=(2, 3, 4))
  expected = norm.logpdf(z, scale=sde.prior_std).sum((1, 2))
  np.testing.assert_allclose(sde_lib.prior_log_prob(sde, jnp.asarray(z)), expected, rtol=1e-12)


@names
def test_prior_draws_have_the_std_of_the_end(name):
  """For these processes prior_std is sigma(t_max) up to the mean's remains, 5e-5."""
  sde, n = sde_lib.make_sde(name), 20_000
  z = sde_lib.sample_prior(jax.random.key(0), sde, (n, 1)) / PAPER[name].sigma(np.array(1.0))
  assert abs((z**2).mean() - 1) < 4 * np.sqrt(2 / n)
  assert abs(z.mean()) < 4 / np.sqrt(n)
  np.testing.assert_allclose(sde.prior_std, PAPER[name].sigma(np.array(1.0)), rtol=1e-4)


def test_unknown_process_lists_the_legal_ones():
  with pytest.raises(ConfigError, match=r"sde\.name = 'vpp'") as error:
    sde_lib.make_sde("vpp")
  assert all(repr(name) in str(error.value) for name in sde_lib.SDES)


@names
def test_unknown_argument_lists_the_legal_ones(name):
  arguments = {"vp": ("beta_min", "beta_max"), "ve": ("sigma_min", "sigma_max")}
  with pytest.raises(ConfigError, match=r"sde\.args\.beta is not") as error:
    sde_lib.make_sde(name, beta=1.0)
  assert all(a in str(error.value) for a in (*arguments[name.removeprefix("sub_")], "t_min"))


def test_arguments_reach_the_schedule(x64):
  sde = sde_lib.make_sde("ve", sigma_min=0.5, sigma_max=8.0, t_min=1e-3)
  np.testing.assert_allclose(sde_lib.marginal(sde, jnp.array([0.0, 1.0]))[1], [0.5, 8.0], 1e-14)
  assert (sde.t_min, sde.prior_std) == (1e-3, 8.0)
  sde = sde_lib.make_sde("sub_vp", beta_min=2.0, beta_max=6.0)
  np.testing.assert_allclose(sde_lib.coefficients(sde, 0.5)[0], -2.0, rtol=1e-14)


def test_sub_vp_has_less_variance_than_vp():
  vp, sub_vp = sde_lib.make_sde("vp"), sde_lib.make_sde("sub_vp")
  t = grid(vp)
  assert (sde_lib.marginal(sub_vp, t)[1] <= sde_lib.marginal(vp, t)[1]).all()


def test_ve_starts_with_sigma_min(x64):
  """The integral of g^2 is sigma(t)^2 - sigma_min^2: data at t = 0 carry sigma_min noise."""
  sde = sde_lib.make_sde("ve")
  g_squared = jax.jit(lambda t: sde_lib.coefficients(sde, t)[1])
  integral = quad(lambda t: float(g_squared(t)), 0.0, 0.7, epsabs=0, epsrel=1e-11)[0]
  sigma = float(sde_lib.marginal(sde, 0.7)[1])
  np.testing.assert_allclose(integral, sigma**2 - 0.01**2, rtol=1e-10)


def test_example_keys_depend_on_the_global_index_only():
  key = jax.random.key(0)
  whole = sde_lib.normal(key, (7, 2))
  np.testing.assert_array_equal(sde_lib.normal(key, (3, 2)), whole[:3])
  np.testing.assert_array_equal(sde_lib.normal(sde_lib.example_keys(key, 4, 3), (4, 2)), whole[3:])
  assert len(np.unique(whole)) == whole.size


def test_fold_in_folds_each_key():
  key = jax.random.key(0)
  keys = sde_lib.fold_in(sde_lib.example_keys(key, 3), 5)
  assert keys[1] == jax.random.fold_in(jax.random.fold_in(key, 1), 5)
  assert sde_lib.fold_in(key, 5) == jax.random.fold_in(key, 5)
