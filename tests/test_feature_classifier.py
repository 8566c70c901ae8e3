"""The classifier whose features stand in for a published network: it classifies, it is the same
each time, it is trained once, it sees what it is given.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
from errors import ConfigError
from evaluation import feature_classifier as fc
from settings import load_config_file


@pytest.fixture(scope="module")
def digits():
  settings = load_config_file("configs/digits.py").data
  settings.dir = "runs/data"
  return data.load(settings)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
  """(classifier, its folder, seconds)."""
  folder, begin = tmp_path_factory.mktemp("classifier"), time.perf_counter()
  return fc.load(digits, folder), folder, time.perf_counter() - begin


def test_digits_are_told_apart(digits, trained):
  classifier, _, seconds = trained
  test = digits.splits["test"]
  x = digits.transform.forward(jnp.asarray(test["image"]))
  features, logits = classifier.network.apply(classifier.variables, x)
  assert features.shape == (297, fc.NUM_FEATURES) and logits.shape == (297, 10)
  accuracy = float(np.mean(np.asarray(logits.argmax(1)) == test["label"]))
  assert accuracy == pytest.approx(classifier.accuracy) and accuracy >= 0.97, seconds
  # the features separate the classes: nearer to the mean of their class than to any other's
  means = np.stack([np.asarray(features)[test["label"] == k].mean(0) for k in range(10)])
  distances = np.linalg.norm(np.asarray(features)[:, None] - means[None], axis=-1)
  assert (distances.argmin(1) == test["label"]).mean() > 0.95


def test_the_file_is_used(digits, trained, monkeypatch):
  classifier, folder, _ = trained
  monkeypatch.setattr(fc, "_train", None)
  again = fc.load(digits, folder)
  assert again.digest == classifier.digest and again.accuracy == classifier.accuracy
  jax.tree.map(np.testing.assert_array_equal, again.variables, classifier.variables)


def small(shape, n=200, classes=3, levels=0, seed=0):
  """A data set whose classes have other means."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, classes, n).astype(np.int32)
  image = rng.normal(label.reshape(-1, *[1] * len(shape)), 0.3, (n, *shape)).astype(np.float32)
  splits = {"train": {"image": image, "label": label}}
  return data.DataSet("small", splits, data.Transform(levels), classes)


@pytest.fixture
def short(monkeypatch):
  monkeypatch.setattr(fc, "LEAST_STEPS", 20)
  monkeypatch.setattr(fc, "CHUNK", 10)


@pytest.mark.parametrize("shape", [(12, 2), (3, 7, 2)])
def test_any_shape_is_learned_and_training_repeats(tmp_path, short, shape):
  dataset = small(shape)
  dataset.splits["test"] = small(shape, seed=1).splits["train"]
  first = fc.load(dataset, tmp_path / "a")
  again = fc.load(dataset, tmp_path / "b")
  jax.tree.map(np.testing.assert_array_equal, first.variables, again.variables)
  assert first.accuracy > 0.6  # of three classes, after twenty steps


def test_every_value_and_label_decides_the_file(short):
  dataset = small((2, 2, 1))
  digests = [fc._digest(dataset)]
  for name in ("image", "label"):
    other = small((2, 2, 1))
    other.splits["train"][name][7] += 1
    digests.append(fc._digest(other))
  digests.append(fc._digest(dataclasses.replace(dataset, transform=data.Transform(9))))
  digests.append(fc._digest(dataclasses.replace(dataset, num_classes=4)))
  assert len(set(digests)) == 5


def test_without_a_test_split_there_is_no_accuracy(tmp_path, short):
  assert np.isnan(fc.load(small((4,)), tmp_path).accuracy)


def test_training_images_are_moved_a_little():
  x = jnp.zeros((64, 12, 12, 1)).at[:, 6, 6].set(1.0)
  moved = np.asarray(jax.jit(fc._moved)(jax.random.key(0), x))
  assert moved.shape == x.shape and len(np.unique(moved[..., 0], axis=0)) == 64
  centres = np.stack(np.unravel_index(moved.reshape(64, -1).argmax(1), (12, 12)), 1)
  assert np.abs(centres - 6).max() <= 12 / 8 + 1 and np.ptp(centres) >= 2
  vectors = jnp.ones((3, 5))
  np.testing.assert_array_equal(fc._moved(jax.random.key(0), vectors), vectors)


def test_large_images_are_reduced():
  network = fc.Network(2)
  shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 200, 64, 3)))
  same = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, same)


def test_data_without_labels_are_refused(tmp_path):
  dataset = small((4,))
  del dataset.splits["train"]["label"]
  with pytest.raises(ConfigError, match=r"(?s)labels.*random_conv or pixels"):
    fc.load(dataset, tmp_path)
