"""Feature extractors: what each sees of an example, that batches and devices change nothing, and
what a user is told who asks for one that cannot be had.
"""

import dataclasses
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image
from tiny import tiny_config, toy_config

import devices
from data_sources.spec import Spec
from errors import ConfigError
from evaluation import feature_classifier, features, inception_weights
from evaluation.features import Outputs, extract, make_extractor
from experiment import build


@pytest.fixture(scope="module")
def digits():
  return build(tiny_config())


@pytest.fixture(scope="module")
def images(digits):
  return digits.dataset.splits["test"]["image"][:23]


class Stand(nn.Module):
  """In place of the FID network: shows what reaches it."""

  @nn.compact
  def __call__(self, x):
    assert x.shape[1:] == (299, 299, 3)
    return x[:, ::13, ::13].reshape(len(x), -1), x.mean((1, 2))


@pytest.fixture
def inception_stand(monkeypatch):
  weights = inception_weights.Weights({}, "0123")
  monkeypatch.setattr(features.inception_weights, "load", lambda folder: weights)
  monkeypatch.setattr(features.inception, "Inception", Stand)


@pytest.fixture
def quick_classifier(monkeypatch, digits, tmp_path):
  network = feature_classifier.Network(10)
  variables = jax.jit(network.init)(jax.random.key(3), jnp.zeros((1, 8, 8, 1)))
  classifier = feature_classifier.Classifier(network, variables, "4567", 0.5)
  monkeypatch.setattr(features.feature_classifier, "load", lambda *_: classifier)


def test_batches_devices_and_order_change_nothing(
  digits, images, quick_classifier, inception_stand
):
  one = dataclasses.replace(digits, mesh=devices.make_mesh(devices=jax.devices()[:1]))
  order = np.random.default_rng(0).permutation(len(images))
  for name in ("pixels", "random_conv", "classifier"):
    straight = extract(make_extractor(digits, name), images, 100)
    others = {
      "batches": extract(make_extractor(digits, name), images, 5),
      "one device": extract(make_extractor(one, name), images, 12),
      "dtype": extract(make_extractor(digits, name), images.astype(np.int32), 100),
    }
    shuffled = extract(make_extractor(digits, name), images[order], 8)
    assert len(straight.features) == 23 and straight.features.dtype == np.float32
    for what, other in others.items():
      same = lambda a, b, what=what: np.testing.assert_allclose(a, b, 1e-5, 1e-5, err_msg=what)
      jax.tree.map(same, straight, other)
    np.testing.assert_allclose(shuffled.features, straight.features[order], 1e-5, 1e-5)


def test_pixels_are_model_units(digits, images):
  found = extract(make_extractor(digits, "pixels"), images, 8)
  expected = -1 + (images.reshape(23, -1) + 0.5) * 2 / 17
  np.testing.assert_allclose(found.features, expected, atol=1e-6)
  assert found.probabilities is None


def test_classifier_gives_features_and_probabilities(digits, images, quick_classifier):
  extractor = make_extractor(digits, "classifier")
  found = extract(extractor, images, 8)
  assert found.features.shape == (23, feature_classifier.NUM_FEATURES)
  np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
  assert "4567" in extractor.identity


def test_random_convolutions_see_more_than_values(digits, images):
  extractor = make_extractor(digits, "random_conv")
  again = make_extractor(build(tiny_config()), "random_conv")
  found = extract(extractor, images, 8).features
  np.testing.assert_array_equal(found, extract(again, images, 8).features)
  assert extractor.identity == again.identity and found.shape == (23, 224)
  mixed = np.random.default_rng(0).permuted(images.reshape(23, -1), axis=1).reshape(images.shape)
  moved = np.roll(images, 1, axis=1)
  away = [np.linalg.norm(extract(extractor, z, 8).features - found) for z in (mixed, moved)]
  assert away[0] > 1.5 * away[1] > 0  # the same values elsewhere, and images that look the same


def test_random_convolutions_of_sequences_and_vectors(digits):
  sequences = dataclasses.replace(digits, spec=Spec((9, 2), levels=17))
  values = np.random.default_rng(0).integers(0, 17, (5, 9, 2)).astype(np.uint8)
  assert extract(make_extractor(sequences, "random_conv"), values, 4).features.shape == (5, 224)
  vectors = build(toy_config())
  points = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
  extractor = make_extractor(vectors, "random_conv")
  np.testing.assert_array_equal(extract(extractor, points, 4).features, points)
  assert extractor.identity.startswith("pixels")


def test_inception_sees_repeated_grey_bytes(digits, images, inception_stand):
  with pytest.warns(UserWarning, match="grey images are repeated to three channels") as caught:
    extractor = make_extractor(digits, "inception")
  found = extract(extractor, images, 8)
  assert len(caught) == 1
  table = np.round(np.arange(17) * 255 / 16)
  at = np.arange(0, 299, 13) * 8 / 299
  low, weight = at.astype(int), at - at.astype(int)
  value, high = table[images[..., 0]], np.minimum(low + 1, 7)
  along = lambda v: v[..., low] * (1 - weight) + v[..., high] * weight
  expected = along(along(value).swapaxes(1, 2)).swapaxes(1, 2)
  expected = (np.repeat(expected[..., None], 3, -1).reshape(23, -1) - 128) / 128
  np.testing.assert_allclose(found.features, expected, atol=1e-3)
  assert found.probabilities.shape == (23, 3)


def test_inception_clean_is_pillows(digits, images, inception_stand):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    plain, clean = (make_extractor(digits, name) for name in ("inception", "inception_clean"))
  found = extract(clean, images, 8).features.reshape(23, 23, 23, 3)
  byte = np.round(images[0, ..., 0] / 16 * 255).astype(np.float32)
  resized = np.asarray(Image.fromarray(byte).resize((299, 299), Image.Resampling.BICUBIC))
  np.testing.assert_allclose(found[0, ..., 1], (resized[::13, ::13] - 128) / 128, atol=1e-3)
  assert plain.identity != clean.identity


def test_256_levels_stay(digits, inception_stand):
  colours = dataclasses.replace(digits, spec=Spec((299, 299, 3)))
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # nothing is repeated
    extractor = make_extractor(colours, "inception")
  values = np.random.default_rng(0).integers(0, 256, (4, 299, 299, 3)).astype(np.uint8)
  expected = (values[:, ::13, ::13].reshape(4, -1) - 128.0) / 128
  np.testing.assert_array_equal(extract(extractor, values, 4).features, expected)


@pytest.mark.parametrize(
  "spec, told",
  [
    (Spec((5,), levels=17), "shape"),
    (Spec((8, 8, 3), levels=0), "0 levels"),
    (Spec((8, 8, 4)), "these have 4"),
  ],
)
def test_inception_refuses_what_is_no_picture(digits, inception_stand, spec, told):
  with pytest.raises(ConfigError, match=f"(?s)inception.*{told}.*random_conv"):
    make_extractor(dataclasses.replace(digits, spec=spec), "inception")


def test_inception_without_weights_is_refused_before_anything_is_drawn(
  digits, tmp_path, monkeypatch
):
  def offline(url, timeout):
    raise OSError("no network")

  monkeypatch.setattr(inception_weights.urllib.request, "urlopen", offline)
  monkeypatch.setattr(features, "_folder", lambda experiment: tmp_path)
  with warnings.catch_warnings(), pytest.raises(ConfigError, match="6726825d"):
    warnings.simplefilter("ignore")
    make_extractor(digits, "inception")


def test_unknown_names_list_the_legal_ones(digits):
  with pytest.raises(ConfigError, match=r"(?s)'classifier', 'inception', 'inception_clean'"):
    make_extractor(digits, "inceptoin")


@pytest.fixture
def module(tmp_path, monkeypatch):
  """(writes the module my_features of a text)."""
  monkeypatch.syspath_prepend(tmp_path)

  def write(text):
    sys.modules.pop("my_features", None)
    (tmp_path / "my_features.py").write_text(text)

  yield write
  sys.modules.pop("my_features", None)


def test_a_users_network(digits, images, module):
  module("def thumbnail(x):\n  assert x.dtype == 'uint8'\n  return x.reshape(len(x), -1)[:, :7]\n")
  extractor = make_extractor(digits, "my_features:thumbnail")
  found = extract(extractor, images, 8)
  expected = np.round(images.reshape(23, -1)[:, :7] / 16 * 255)
  np.testing.assert_array_equal(found.features, expected)
  module("def thumbnail(x):\n  return x.reshape(len(x), -1)\n")
  assert make_extractor(digits, "my_features:thumbnail").identity != extractor.identity


@pytest.mark.parametrize("name", ["no_such_module:f", "my_features:missing", ":f"])
def test_a_users_network_that_is_not_there(digits, module, name):
  module("")
  with pytest.raises(ConfigError, match="module:function"):
    make_extractor(digits, name)


def test_a_users_network_of_wrong_shape(digits, images, module):
  module("def features(x):\n  return x\n")
  extractor = make_extractor(digits, "my_features:features")
  with pytest.raises(ConfigError, match=r"\[8, d\].*\(8, 8, 8, 1\)"):
    extract(extractor, images, 8)


def test_outputs_are_joined_in_order():
  extractor = features.Extractor("count", "", lambda v: Outputs(v[:, None], v[:, None] / 2))
  found = extract(extractor, np.arange(11), 4)
  np.testing.assert_array_equal(found.features[:, 0], np.arange(11))
  np.testing.assert_array_equal(found.probabilities[:, 0], np.arange(11) / 2)
