"""What an example is compared by: the table of feature extractors, and features of a whole set."""

import functools
import hashlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Num

import devices
from data_sources.cache import data_dir
from errors import check, lookup, users_function
from evaluation import feature_classifier, inception, inception_weights
from evaluation.batches import parts
from experiment import Experiment
from models.layers.conv import Conv

FIELD = "evaluation.features"
INSTEAD = "take classifier, random_conv or pixels"
WIDTHS = (16, 32, 64)  # of the random convolutions


class Outputs(NamedTuple):
  """`features` [b, d], float32; `probabilities` [b, k] of classes, of networks that have any;
  `labels` [b], of what was asked for or is known to be there.
  """

  features: Float[np.ndarray, "b d"]
  probabilities: Float[np.ndarray, "b k"] | None = None
  labels: Int[np.ndarray, " b"] | None = None


class Extractor(NamedTuple):
  """`function` takes stored values [b, *d] of the data set to their `Outputs`, on every host the
  whole of them; `identity` changes with all that the features depend on but the data set.
  """

  name: str
  identity: str
  function: Callable[[Num[np.ndarray, "b *d"]], Outputs]


def extract(extractor: Extractor, values: Num[np.ndarray, "n *d"], batch_size: int) -> Outputs:
  """The outputs of all examples, in their order, in batches of one size (at least `batch_size`, a
  multiple of the devices) of which the last is filled up.
  """
  size = -(-batch_size // jax.device_count()) * jax.device_count()
  batches = []
  for rows, valid in parts(len(values), size, extractor.name):
    outputs = extractor.function(values[rows])
    batches.append(jax.tree.map(lambda x, valid=valid: np.asarray(x[:valid], np.float32), outputs))
  return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def make_extractor(experiment: Experiment, name: str) -> Extractor:
  """One of `FEATURES`, or a user's network "module:function", which takes uint8 images [b, h, w, c]
  to features [b, d]. Whatever it needs (weights, labels) is here afterwards, or a `ConfigError`
  says what is missing.
  """
  if ":" in name:
    return _users(experiment, name)
  return lookup(FEATURES, name, FIELD)(experiment)


def _of_network(
  experiment: Experiment, name, identity, apply, variables, prepare=None
) -> Extractor:
  """`apply(variables, values) -> Outputs`, each device with its part of a batch."""
  mapped = experiment.over_devices(apply, 1)
  prepare = prepare or (lambda values: np.asarray(values, experiment.spec.dtype))
  function = lambda values: devices.to_host(mapped(variables, prepare(values)))
  return Extractor(name, identity, function)


def _to_bytes(experiment: Experiment, name: str) -> Callable[[np.ndarray], np.ndarray]:
  """Stored values of images to uint8 0 .. 255, as a picture of them has; 256 levels stay."""
  shape, levels = experiment.spec.shape, experiment.spec.levels
  legal = f"for images of integers; these examples have shape {shape}, {levels} levels"
  check(len(shape) == 3 and levels > 1, FIELD, name, legal, INSTEAD)
  table = np.round(np.linspace(0, 255, levels)).astype(np.uint8)
  return lambda values: table[values]


def _inception(experiment: Experiment, name: str, resize: Callable) -> Extractor:
  """Pool features and class probabilities (of logits without bias) of the FID network."""
  prepare, channels = _to_bytes(experiment, name), experiment.spec.shape[-1]
  legal = f"for images of 1 or 3 channels; these have {channels}"
  check(channels in (1, 3), FIELD, name, legal, INSTEAD)
  if channels == 1:
    text = f"{name}: grey images are repeated to three channels; the network has seen photographs"
    warnings.warn(text, stacklevel=3)
  weights = inception_weights.load(_folder(experiment))

  def apply(variables, x):
    x = inception.scaled(resize(jnp.broadcast_to(x, (*x.shape[:3], 3))))
    features, logits = inception.Inception().apply(variables, x)
    return Outputs(features, jax.nn.softmax(logits))

  identity = f"{name} {weights.digest}"
  return _of_network(experiment, name, identity, apply, weights.params, prepare)


def _folder(experiment: Experiment) -> Path:
  """Where weights lie."""
  return data_dir(experiment.config.data) / "features"


def _classifier(experiment: Experiment) -> Extractor:
  """Penultimate layer and class probabilities of a classifier of the training split."""
  classifier = feature_classifier.load(experiment.dataset, _folder(experiment))

  def apply(variables, values):
    features, logits = classifier.network.apply(variables, experiment.transform.forward(values))
    return Outputs(features, jax.nn.softmax(logits))

  identity = f"classifier {classifier.digest}"
  return _of_network(experiment, "classifier", identity, apply, classifier.variables)


def _pixels(experiment: Experiment) -> Extractor:
  """The values themselves, in model units."""

  def apply(_, values):
    return Outputs(experiment.transform.forward(values).reshape(len(values), -1))

  return _of_network(experiment, "pixels", f"pixels {experiment.transform}", apply, {})


class RandomConvolutions(nn.Module):
  """Convolutions that nobody has trained, each of half the size of the one before, with ReLU: mean
  and standard deviation over the positions of every channel of every layer.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "b *hw c"]) -> Float[Array, "b 224"]:
    """[b, *size, c] -> [b, 224]."""
    rank, statistics = x.ndim - 2, []
    axes, init = tuple(range(1, x.ndim - 1)), nn.initializers
    options = {"kernel_init": init.he_normal(), "bias_init": init.normal(0.5)}
    for i, width in enumerate(WIDTHS):
      x = nn.relu(Conv(width, (3,) * rank, (1 + (i > 0),) * rank, **options)(x))
      statistics += [x.mean(axes), x.std(axes)]
    return jnp.concatenate(statistics, axis=-1)


def _random_conv(experiment: Experiment) -> Extractor:
  """`RandomConvolutions`, always the same ones; of vectors the values themselves."""
  shape = experiment.spec.shape
  if len(shape) < 2:
    return _pixels(experiment)
  network = RandomConvolutions()
  variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *shape)))

  def apply(variables, values):
    return Outputs(network.apply(variables, experiment.transform.forward(values)))

  identity = f"random_conv {WIDTHS} {experiment.transform}"
  return _of_network(experiment, "random_conv", identity, apply, variables)


def _users(experiment: Experiment, name: str) -> Extractor:
  """A function that the user wrote, called on the host."""
  function, module = users_function(name, FIELD), name.partition(":")[0]
  source = Path(importlib.util.find_spec(module).origin or "")
  content = source.read_bytes() if source.is_file() else b""
  prepare = _to_bytes(experiment, name)

  def outputs(values):
    features = np.asarray(function(prepare(values)), np.float32)
    legal = f"a function to features [{len(values)}, d]; it returns {features.shape}"
    check(features.ndim == 2 and len(features) == len(values), FIELD, name, legal)
    return Outputs(features)

  return Extractor(name, f"{name} {hashlib.sha256(content).hexdigest()[:16]}", outputs)


FEATURES: dict[str, Callable[[Experiment], Extractor]] = {
  "inception": functools.partial(_inception, name="inception", resize=inception.resize_published),
  "inception_clean": functools.partial(
    _inception, name="inception_clean", resize=inception.resize_clean
  ),
  "classifier": _classifier,
  "random_conv": _random_conv,
  "pixels": _pixels,
}
