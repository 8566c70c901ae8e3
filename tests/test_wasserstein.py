"""Wasserstein distances: closed forms on a line and of shifts, enumeration, duality, intervals."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import norm

from errors import ConfigError
from evaluation.fid import sample_frechet_distance
from evaluation.wasserstein import (
  _potentials,
  sliced_wasserstein,
  squared_on_lines,
  wasserstein,
  weighted_wasserstein,
)


def exact(x, y):
  return wasserstein(x, y)["wasserstein"]


def test_assignment_by_enumeration():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 6, 3))
  costs = [((x - y[list(order)]) ** 2).sum(1).mean() for order in itertools.permutations(range(6))]
  np.testing.assert_allclose(exact(x, y).value, np.sqrt(min(costs)))


def test_gaussians_on_the_line():
  """Quantiles of N(m, s^2) against those of N(0, 1): (m^2 + (s - 1)^2)^1/2."""
  levels = (np.arange(500) + 0.5) / 500
  z = norm.ppf(levels)[:, None]
  np.testing.assert_allclose(exact(0.7 + 1.5 * z, z).value, np.hypot(0.7, 0.5), rtol=1e-2)


def test_affine_image_is_at_the_distance_of_gaussians():
  """A positive affine map is optimal, so exact W2 equals the Fréchet distance of the moments, whose
  covariances are here taken with divisor n.
  """
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, 3))
  root = rng.normal(size=(3, 3))
  y = x @ (root @ root.T) + 1
  shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
  spread = (sample_frechet_distance(x, y) - shift) * 299 / 300
  np.testing.assert_allclose(exact(x, y).value, np.sqrt(shift + spread), rtol=1e-10)


@pytest.mark.parametrize("n, m", [(5, 5), (4, 6), (7, 3)])
def test_lines_of_any_sizes_equal_the_linear_programme(n, m):
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(n, 1)), rng.normal(size=(m, 1))
  programme = weighted_wasserstein(x, np.ones(n), y, np.ones(m))
  np.testing.assert_allclose(squared_on_lines(x, y), programme**2, rtol=1e-9)


def test_weights_are_repeated_points():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(3, 2)), rng.normal(size=(6, 2))
  repeated = exact(x[[0, 0, 0, 1, 1, 2]], y).value
  np.testing.assert_allclose(
    weighted_wasserstein(x, np.array([3.0, 2.0, 1.0]), y, np.ones(6)), repeated
  )


def test_potentials_solve_the_dual():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 40, 2))
  cost = cdist(x, y, "sqeuclidean")
  _, match = linear_sum_assignment(cost)
  u, v = _potentials(cost, match)
  assert (u[:, None] + v <= cost[:, match] + 1e-12).all()
  np.testing.assert_allclose(u.mean() + v.mean(), exact(x, y).value ** 2)


@pytest.mark.parametrize("d, shift", [(2, 0.0), (8, 0.0), (8, 1.0)])
def test_interval_covers_the_expected_distance(d, shift):
  rng = np.random.default_rng(0)
  found = [exact(shift + rng.normal(size=(60, d)), rng.normal(size=(60, d))) for _ in range(200)]
  mean = np.mean([e.value for e in found])
  covered = np.mean([e.low <= mean <= e.high for e in found])
  assert covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 200)


def test_sliced_distance_of_a_shift():
  """E (theta . a)^2 = |a|^2 / d; the Monte-Carlo interval covers it."""
  rng = np.random.default_rng(0)
  x, a = rng.normal(size=(50, 6)), rng.normal(size=6)
  true, covered = np.linalg.norm(a) / np.sqrt(6), 0
  for seed in range(100):
    found = sliced_wasserstein(x, x + a, num_projections=200, seed=seed)["sliced_wasserstein"]
    covered += found.low <= true <= found.high
  assert abs(covered / 100 - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 100)
  assert sliced_wasserstein(x, x[::-1])["sliced_wasserstein"].value == 0


def test_large_programmes_are_refused():
  x = np.zeros((600, 1))
  with pytest.raises(ConfigError, match="360000"):
    weighted_wasserstein(x, np.ones(600), x, np.ones(600))
