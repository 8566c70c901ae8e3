"""The digits, their batches and the transform."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import data
from errors import ConfigError

DIR = "runs/data"


@pytest.fixture(scope="module")
def digits():
  return data.load("digits", DIR)


def test_digits_are_those_of_scikit_learn_split_at_1500(digits):
  images = load_digits().images.astype(np.uint8)[..., None]
  train, test = digits.splits["train"], digits.splits["test"]
  both = np.concatenate([train["image"], test["image"]])
  assert (len(train["image"]), len(test["image"])) == (1500, 297)
  as_rows = lambda x: sorted(map(bytes, x))
  assert as_rows(train["image"]) == as_rows(images[:1500])
  assert as_rows(test["image"]) == as_rows(images[1500:])
  assert both.dtype == np.uint8 and both.min() == 0 and both.max() == 16
  assert digits.transform.levels == 17 and digits.num_classes == 10 and digits.shape == (8, 8, 1)
  assert (
    np.bincount(np.concatenate([train["label"], test["label"]])).tolist()
    == np.bincount(load_digits().target).tolist()
  )


def test_nothing_imports_tensorflow(digits):
  assert "tensorflow" not in sys.modules


def take(batches, n):
  return list(itertools.islice(batches, n))


def numbered(n):
  return {"image": np.arange(n), "label": np.zeros(n, int)}


def test_each_epoch_holds_every_example_once_in_a_new_order():
  drawn = np.concatenate([b["image"] for b in take(data.batches(numbered(12), 4, seed=0), 6)])
  first, second = drawn[:12], drawn[12:]
  assert sorted(first) == sorted(second) == list(range(12))
  assert first.tolist() != second.tolist()


def test_batches_resume_exactly():
  straight = take(data.batches(numbered(10), 4, seed=3), 9)
  resumed = take(data.batches(numbered(10), 4, seed=3, start=5), 4)
  for a, b in zip(straight[5:], resumed):
    np.testing.assert_array_equal(a["image"], b["image"])


def test_hosts_share_each_batch_without_overlap(monkeypatch):
  whole = take(data.batches(numbered(12), 4, seed=1), 6)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  parts = []
  for host in (0, 1):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    parts.append(take(data.batches(numbered(12), 4, seed=1), 6))
  for batch, a, b in zip(whole, *parts):
    assert set(batch["image"]) == set(a["image"]) | set(b["image"]) and len(a["image"]) == 2


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match=r"data.dir = .*file/below"):
    data.load("digits", str(tmp_path / "file" / "below"))


def test_an_unknown_data_set_lists_the_known_ones():
  with pytest.raises(ConfigError, match="'digits'"):
    data.load("mnist", DIR)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantized_values_return_to_their_level_even_for_the_largest_draw(monkeypatch, levels):
  transform, k = data.Transform(levels), jnp.arange(levels)[None]
  largest = lambda key, shape: jnp.full(shape, 1 - 2.0**-24)
  monkeypatch.setattr(jax.random, "uniform", largest)
  x = transform.dequantize(jax.random.key(0), k)
  np.testing.assert_array_equal(transform.inverse(x), k)
