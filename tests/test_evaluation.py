"""Measures against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import diagonal
from scipy.linalg import sqrtm

from evaluation.denoising import gaussian_predictor_loss, loss_per_level
from evaluation.fid import frechet_distance, sample_frechet_distance
from evaluation.mixture import mixture_log_prob
from evaluation.photographs import SIZE, crop
from evaluation.two_sample import energy_test, frechet_test
from evaluation.work_precision import energy_distance, mixture_noise_fn
from sde_lib import make_sde, marginal

RNG = np.random.default_rng(0)


def covariance(d):
  root = RNG.normal(size=(d, d))
  return root @ root.T


def test_frechet_distance_of_commuting_gaussians():
  a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 16.0])
  distance = frechet_distance(np.zeros(3), np.diag(a), np.ones(3), np.diag(b))
  np.testing.assert_allclose(distance, 3 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rtol=1e-12)


def test_frechet_distance_equals_the_matrix_root_of_scipy():
  m, c1, c2 = RNG.normal(size=20), covariance(20), covariance(20)
  expected = m @ m + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
  np.testing.assert_allclose(frechet_distance(m, c1, 0 * m, c2), expected, rtol=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero_in_any_order():
  x = RNG.normal(size=(200, 5))
  assert abs(sample_frechet_distance(x, x[::-1])) < 1e-9


both_tests = pytest.mark.parametrize("test", [energy_test, frechet_test])


@both_tests
def test_two_sample_tests_tell_laws_apart_and_accept_equal_ones(test):
  x, y = RNG.normal(size=(2, 150, 4))
  assert test(x, y)[1] > 0.05
  assert test(x, y + 0.5)[1] < 0.01


@both_tests
def test_two_sample_tests_reject_equal_laws_as_often_as_they_say(test):
  """40 tests at the level 0.2: 8 rejections, within 3 standard errors."""
  p = [test(*RNG.normal(size=(2, 30, 2)), num_permutations=50)[1] for _ in range(40)]
  assert abs(np.mean(np.array(p) <= 0.2) - 0.2) < 3 * np.sqrt(0.16 / 40)


def test_gaussian_predictor_loss_is_reached_by_the_exact_prediction():
  sde, law = make_sde("vp"), diagonal([0.3, -0.2], [0.25, 1.5])
  times = jnp.array([0.05, 0.3, 0.7])
  x0 = law.sample(jax.random.key(0), 20_000)
  losses = loss_per_level(jax.random.key(1), sde, law.noise_fn(sde), x0, times, 2)
  closed = gaussian_predictor_loss(sde, np.asarray(x0), times)
  alpha, sigma = (np.asarray(c)[:, None] for c in marginal(sde, times))
  signal = alpha**2 * np.array([0.25, 1.5])
  np.testing.assert_allclose(closed, (signal / (signal + sigma**2)).mean(1), rtol=3e-2)
  error = np.asarray(losses.std(1)) / np.sqrt(20_000)
  assert (np.abs(losses.mean(1) - closed) < 4 * error).all()


def test_predicting_nothing_costs_one():
  zero = lambda x, t, labels=None: jnp.zeros_like(x)
  x0 = jnp.zeros((5_000, 4))
  losses = loss_per_level(jax.random.key(0), make_sde("ve"), zero, x0, jnp.array([0.5]), 1)
  np.testing.assert_allclose(losses.mean(), 1.0, atol=4 * np.sqrt(2 / 20_000))


def test_mixture_baseline_finds_a_gaussian():
  x, y = RNG.normal(size=(4000, 2)), RNG.normal(size=(500, 2))
  exact = -0.5 * (y**2).sum(1) - np.log(2 * np.pi)
  fitted = mixture_log_prob(x, y, num_components=1)
  np.testing.assert_allclose(fitted.mean(), exact.mean(), atol=0.01)


def test_energy_distance_of_the_benchmark():
  """Of a point at zero 2 E|Y| - E|Y - Y'|; of draws of the law the stated floor on average."""
  sde, n = make_sde("vp", t_min=1e-6), 4000
  draw = lambda: np.where(RNG.random(n) < 0.7, 1.0, -1.0) + 0.1 * RNG.normal(size=n)
  distances = [energy_distance(sde, draw())[0] for _ in range(40)]
  floor = energy_distance(sde, np.zeros(n))[1]
  np.testing.assert_allclose(np.sqrt(np.mean(np.square(distances))), floor, rtol=0.25)
  y, z = draw(), draw()
  expected = 2 * np.abs(y).mean() - np.abs(y[:, None] - z[None]).mean()
  np.testing.assert_allclose(energy_distance(sde, np.zeros(n))[0] ** 2, expected, rtol=0.05)


def test_noise_of_the_benchmark_is_that_of_its_mixture():
  """E[x_0] = 0.4 at t_max, where x tells nothing: x - alpha E[x_0] = sigma E[noise | x]."""
  sde, x = make_sde("vp"), jnp.zeros((1, 1))
  alpha, sigma = marginal(sde, 1.0)
  noise = mixture_noise_fn(sde)(x, jnp.asarray(1.0))
  np.testing.assert_allclose(noise, -alpha / sigma * 0.4, rtol=1e-2)


@pytest.mark.parametrize(("left", "right", "level"), [(0, 512, 0), (512, 640, 255)])
def test_crops_for_training_and_tests_share_no_pixel(left, right, level):
  photograph = np.zeros((427, 640, 3), np.uint8)
  photograph[:, 512:] = 255
  for _ in range(300):
    image = np.asarray(crop(RNG, photograph, left, right))
    assert image.shape == (SIZE, SIZE, 3) and (image == level).all()
