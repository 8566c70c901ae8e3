"""What every metric of the table promises."""

import json

import numpy as np
import pytest

from errors import ConfigError
from evaluation.estimate import proportion, shuffled
from evaluation.metrics import METRICS

every = pytest.mark.parametrize("name", METRICS)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 5)).astype(np.float32)
Y = (0.2 + RNG.normal(size=(90, 5))).astype(np.float32)


@every
def test_order_changes_nothing_and_results_are_plain_numbers(name):
  found = METRICS[name].function(X, Y)
  again = METRICS[name].function(RNG.permutation(X), Y[::-1])
  for key, estimate in found.items():
    record = json.loads(json.dumps(estimate._asdict()))
    for field, value in again[key]._asdict().items():
      if isinstance(value, float):
        np.testing.assert_allclose(record[field], value, rtol=1e-9, atol=1e-10)
    assert estimate.what
    assert estimate.low is None or estimate.low <= estimate.value <= estimate.high


@every
def test_too_few_samples_are_refused_with_the_number(name):
  needed = METRICS[name].needed(5)
  METRICS[name].function(X[:needed], Y)
  with pytest.raises(ConfigError, match=rf"= {needed - 1} [^$]*at least {needed}\b"):
    METRICS[name].function(X[: needed - 1], Y)


def test_shuffled_rows_depend_on_their_values_alone():
  np.testing.assert_array_equal(shuffled(X), shuffled(X[::-1]))
  np.testing.assert_array_equal(np.sort(shuffled(X), axis=0), np.sort(X, axis=0))
  assert (shuffled(X) != X[np.lexsort(X.T)]).any()


def test_shuffled_halves_are_as_good_as_random():
  """On the line too the halves of 100 sets differ by what independent halves would."""
  rng = np.random.default_rng(0)
  halves = [np.split(shuffled(rng.normal(size=(100, 1))), 2) for _ in range(400)]
  gaps = np.array([a.mean() - b.mean() for a, b in halves])
  assert abs(gaps.mean()) < 3 * 0.2 / np.sqrt(400)
  np.testing.assert_allclose(gaps.std(), 0.2, rtol=0.15)


@pytest.mark.parametrize("p", [0.0, 0.02, 0.5, 0.97])
def test_interval_of_a_share(p):
  hits = np.random.default_rng(0).random((2000, 60)) < p
  covered = np.mean([e.low <= p <= e.high for e in (proportion(row, "") for row in hits)])
  assert covered > 0.92
