"""Tests of equal laws: the statistic by hand, p-values uniform where the laws are equal, small
where they are not. (More in test_evaluation.py.)
"""

import numpy as np
from scipy.spatial.distance import cdist

from evaluation.two_sample import classifier_test, energy_test, mmd


def test_energy_distance_by_hand():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(6, 3)), rng.normal(size=(9, 3))
  pairs = lambda z: cdist(z, z).sum() / (len(z) * (len(z) - 1))
  expected = 2 * cdist(x, y).mean() - pairs(x) - pairs(y)
  np.testing.assert_allclose(energy_test(x, y)[0], expected, rtol=1e-12)


def p_values(test, rng, n, repeats):
  found = [test(*rng.normal(size=(2, n, 3))) for _ in range(repeats)]
  return {name: np.array([one[name].p_value for one in found]) for name in found[0]}


def test_p_values_of_equal_laws_are_uniform():
  """The permutation test is exact but for its number; the binomial ones are discrete: never above
  their level.
  """
  rng = np.random.default_rng(0)
  (p,) = p_values(mmd, rng, 20, 300).values()
  for level in (0.1, 0.5, 0.9):
    assert abs((p <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 300)
  for p in p_values(classifier_test, rng, 40, 100).values():
    for level in (0.1, 0.5):
      assert (p <= level).mean() < level + 3 * np.sqrt(level * (1 - level) / 100)


def test_the_smallest_p_value_counts_the_observed_split():
  x, y = np.random.default_rng(0).normal(size=(2, 30, 2))
  assert mmd(x, 50 + y)["mmd_squared"].p_value == 1 / 1000


def test_laws_of_equal_moments_are_told_apart():
  """A sign times a shell against a Gaussian of the same mean and covariance: no moment up to the
  second differs.
  """
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 400, 2))
  x *= np.sqrt(2) / np.linalg.norm(x, axis=1, keepdims=True)
  assert mmd(x, y)["mmd_squared"].p_value < 0.05
  found = classifier_test(x, y)
  assert found["classifier_neighbours"].p_value < 1e-6 < 1e-3 > found["classifier_network"].p_value
  assert found["classifier_neighbours"].value > 0.6
