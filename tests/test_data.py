"""The digits, their batches and the transform."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from tiny import tiny_config

import data
from errors import ConfigError


def chosen(name, **changes):
  """`config.data` for the data set `name`."""
  return tiny_config(data__name=name, **{f"data__{k}": v for k, v in changes.items()}).data


@pytest.fixture(scope="module")
def digits():
  return data.load(chosen("digits"))


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
    data.load(chosen("digits", dir=str(tmp_path / "file" / "below")))


def test_an_unknown_data_set_lists_the_known_ones():
  with pytest.raises(ConfigError, match=r"'digits'.*'tfds:cifar10'"):
    data.load(chosen("mnist"))


def test_a_data_set_without_a_builder_says_which_can_be_loaded():
  with pytest.raises(
    ConfigError, match=r"'tfds:cifar10' is not usable.\n  legal: 'digits': .*only"
  ):
    data.load(chosen("tfds:cifar10"))


def test_what_is_declared_is_what_is_loaded(digits):
  spec = data.declared(chosen("digits"))
  assert (spec.shape, spec.num_classes, set(spec.splits)) == (
    digits.shape,
    digits.num_classes,
    set(digits.splits),
  )
  assert data.transform_of("digits") == digits.transform == data.Transform(17)


@pytest.mark.parametrize(
  "name, size, shape",
  [
    ("tfds:cifar10", 0, (32, 32, 3)),
    ("tfds:cifar10", 32, (32, 32, 3)),
    ("tfds:cifar10", 16, None),
    ("digits", 16, None),
    ("tfds:celeb_a", 64, (64, 64, 3)),
    ("tfds:celeb_a", 0, None),
  ],
)
def test_images_have_the_declared_size_unless_they_are_resized(name, size, shape):
  if shape:
    assert data.declared(chosen(name, image_size=size)).shape == shape
    return
  with pytest.raises(ConfigError, match=f"data.image_size = {size}"):
    data.declared(chosen(name, image_size=size))


def test_data_that_are_not_centered_are_in_0_to_1():
  transform = data.load(chosen("digits", centered=False)).transform
  x = transform.forward(jnp.arange(17)[None])
  np.testing.assert_allclose(x, (jnp.arange(17) + 0.5)[None] / 17)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantized_values_return_to_their_level_even_for_the_largest_draw(monkeypatch, levels):
  transform, k = data.Transform(levels), jnp.arange(levels)[None]
  largest = lambda key, shape: jnp.full(shape, 1 - 2.0**-24)
  monkeypatch.setattr(jax.random, "uniform", largest)
  x = transform.dequantize(jax.random.key(0), k)
  np.testing.assert_array_equal(transform.inverse(x), k)
