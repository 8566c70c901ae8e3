"""The Fréchet distance: closed forms, matrix roots of scipy, moments of streams, its interval by
simulation, its limit of infinitely many samples.
"""

import functools
import itertools
import time

import numpy as np
import pytest
from scipy.linalg import sqrtm
from threadpoolctl import threadpool_limits

from errors import ConfigError
from evaluation.fid import (
  Moments,
  fid,
  fid_infinity,
  frechet_distance,
  merge,
  moments,
  needed_for_infinity,
  sample_frechet_distance,
)

D = 48
SCALES = 1 / np.sqrt(np.arange(1, D + 1))


@pytest.fixture(autouse=True)
def one_thread():
  """Threads on small matrices wait for each other wherever other processes run."""
  with threadpool_limits(1):
    yield


def draws(rng, n, shift=0.0, scale=1.0):
  """Gaussian vectors whose spectrum decays, as those of network features do."""
  return (shift + scale * rng.normal(size=(n, D))) * SCALES


def by_matrix_root(x, y):
  c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
  return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)


def figure(estimates):
  (estimate,) = estimates.values()
  return estimate


@pytest.mark.parametrize("n, m", [(200, 90), (90, 12), (9, 90), (9, 12)])
def test_full_and_low_rank_equal_the_matrix_root(n, m):
  rng = np.random.default_rng(n + m)
  x, y = draws(rng, n, 0.3, 1.4), draws(rng, m)
  expected = by_matrix_root(x, y)
  found = sample_frechet_distance(x, y), figure(fid(x, y)).value, figure(fid(x, moments(y))).value
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_allclose(found, found[0], rtol=1e-10)


def test_invariant_to_rotation_and_shift_square_in_scale():
  rng = np.random.default_rng(0)
  x, y = draws(rng, 100, 0.3, 1.4), draws(rng, 80)
  rotation, _ = np.linalg.qr(rng.normal(size=(D, D)))
  moved = [3 * (z @ rotation + 5) for z in (x, y)]
  np.testing.assert_allclose(
    sample_frechet_distance(*moved), 9 * sample_frechet_distance(x, y), rtol=1e-10
  )


def test_no_distance_to_itself():
  x = draws(np.random.default_rng(0), 100)
  for few in (x, x[:30]):
    assert abs(sample_frechet_distance(few, few[::-1])) < 1e-12


def test_moments_of_a_stream_do_not_depend_on_its_batches():
  rng = np.random.default_rng(0)
  x = (1e3 + draws(rng, 5000)).astype(np.float32)
  exact = x.astype(np.float64)
  for sizes in ((1, 4999), (1000,) * 5, (7,) * 714 + (2,)):
    batches = np.split(x, np.cumsum(sizes)[:-1])
    for order in (batches, batches[::-1]):
      found = functools.reduce(merge, map(moments, order))
      assert found.count == 5000
      np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
      np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), atol=1e-9)
  np.testing.assert_allclose(moments(x).covariance, found.covariance, atol=1e-9)


def test_standard_error_is_that_of_the_delete_one_jackknife():
  """To first order in 1/n the infinitesimal jackknife is the jackknife; both sets count."""
  rng = np.random.default_rng(0)
  x, y = draws(rng, 250, 0.5, 1.3), draws(rng, 200)
  variances = []
  for mine, other in ((x, y), (y, x)):
    left = [sample_frechet_distance(np.delete(mine, i, 0), other) for i in range(len(mine))]
    variances.append((len(mine) - 1) * np.var(left))
  assert figure(fid(x, y)).standard_error == pytest.approx(np.sqrt(sum(variances)), rel=0.05)
  given = figure(fid(x, moments(y))).standard_error
  assert given == pytest.approx(np.sqrt(variances[0]), rel=0.05)


CASES = [(36, 500), (120, 120), (120, 500), (480, 500)]
LAWS = [(0.0, 1.0), (0.1, 1.1), (0.5, 1.5)]


def check_coverage(n, m, law, repeats):
  """The jackknife's variance is too large rather than too small (Efron & Stein 1981): the interval
  covers the mean at least as often as it says; where the laws differ, not much more.
  """
  rng = np.random.default_rng(0)
  found = [figure(fid(draws(rng, n, *law), draws(rng, m))) for _ in range(repeats)]
  values = np.array([e.value for e in found])
  covered = np.mean([e.low <= values.mean() <= e.high for e in found])
  assert covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / repeats)
  errors = np.array([e.standard_error for e in found])
  assert 0.85 < errors.mean() / values.std() < (1.35 if law[0] == 0.5 else 1.8)


@pytest.mark.parametrize("n, m", CASES)
@pytest.mark.parametrize("law", LAWS[::2])
def test_interval_covers_the_expected_distance(n, m, law):
  check_coverage(n, m, law, 200)


@pytest.mark.exhaustive
@pytest.mark.parametrize("n, m", CASES)
@pytest.mark.parametrize("law", LAWS)
def test_interval_covers_the_expected_distance_at_length(n, m, law):
  check_coverage(n, m, law, 2000)


def limit(reference, shift, scale):
  return frechet_distance(shift * SCALES, np.diag((scale * SCALES) ** 2), *moments(reference)[1:])


@pytest.mark.parametrize("n", [108, 240, 480])
@pytest.mark.parametrize("law", LAWS)
def test_infinite_samples_have_the_distance_of_the_law(n, law):
  """`fid` is far above; the interval covers the limit at 2.25, 5 and 10 samples to a dimension."""
  rng = np.random.default_rng(1)
  reference = draws(rng, 300)
  true = limit(reference, *law)
  pairs = [
    (figure(fid_infinity(x, reference)), figure(fid(x, reference)))
    for x in (draws(rng, n, *law) for _ in range(100))
  ]
  bias, finite = (np.mean([pair[i].value for pair in pairs]) - true for i in (0, 1))
  spread = np.std([e.value for e, _ in pairs])
  assert abs(bias) < 0.12 * finite + 3 * spread / np.sqrt(100)
  covered = np.mean([e.low <= true <= e.high for e, _ in pairs])
  assert covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 100)


def test_bias_of_one_dimension():
  """E (m - mu)^2 + E (s - sigma)^2 = sigma^2 / n + sigma^2 / 2n."""
  rng = np.random.default_rng(0)
  given = Moments(1, np.zeros(1), np.full((1, 1), 4.0))
  gap = lambda x: figure(fid(x, given)).value - figure(fid_infinity(x, given)).value
  found = [gap(2 * rng.normal(size=(200, 1))) for _ in range(400)]
  assert abs(np.mean(found) - 1.5 * 4 / 200) < 3 * np.std(found) / np.sqrt(400) < 0.004


def test_too_few_samples_are_refused_with_the_number():
  x = draws(np.random.default_rng(0), 107)
  assert needed_for_infinity(D) == 108
  with pytest.raises(
    ConfigError, match=r"generated samples for fid_infinity = 107[^$]*at least 108"
  ):
    fid_infinity(x, x)
  with pytest.raises(ConfigError, match=r"at least 2"):
    fid(x[:1], x)


@pytest.mark.exhaustive
def test_features_of_inception_in_time():
  """2,048 dimensions in under 20 s on two cores; commuting covariances have a closed form."""
  rng = np.random.default_rng(0)
  rotation, _ = np.linalg.qr(rng.normal(size=(2048, 2048)))
  a, b = rng.exponential(size=(2, 2048)) ** 3
  covariances = [(rotation * c) @ rotation.T for c in (a, b)]
  begin = time.process_time()
  with threadpool_limits(2):
    distance = frechet_distance(np.zeros(2048), covariances[0], np.ones(2048), covariances[1])
  assert time.process_time() - begin < 2 * 20  # of both cores, whatever else runs
  np.testing.assert_allclose(distance, 2048 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rtol=1e-6)
  for mean, covariance in itertools.product((np.zeros(2048),), covariances):
    assert abs(frechet_distance(mean, covariance, mean, covariance)) < 1e-6
