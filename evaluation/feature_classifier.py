"""A classifier of clean examples, trained on the labelled training split of a data set and cached:
features where no published network fits, and a judge that guided generation has not seen.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree
from tqdm import tqdm

import augment
import devices
from data import Batch, DataSet
from errors import check
from evaluation import files
from evaluation.batches import parts, spread
from models.layers.conv import Conv

VERSION = 1  # of the training: a change trains all classifiers anew
NUM_FEATURES = 64
WIDTHS = (32, 64, 128)
SMALLEST, LARGEST = 4, 64  # pixels of a side: where halving ends, above which images are reduced
BATCH_SIZE = 64
EPOCHS, LEAST_STEPS, MOST_STEPS = 10, 800, 5000
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-2
ROTATION = 0.2  # radians
CHUNK = 100  # steps of one call
SEEN = 10_000  # examples whose values decide which file belongs to a data set


class Network(nn.Module):
  """3x3 convolutions, the first of them at every pixel, then averages of 2x2 pixels until a side
  has 4, and a dense layer of features; vectors have another one instead of convolutions.
  """

  num_classes: int

  @nn.compact
  def __call__(self, x: Float[Array, "b *d"]) -> tuple[Float[Array, "b 64"], Float[Array, "b k"]]:
    """(features [b, 64], logits [b, num_classes]) of x in model units."""
    x = _reduced(x)
    size = x.shape[1:-1]
    if size:
      x = _conv(WIDTHS[0])(x)
      for i in range(math.ceil(math.log2(max(size) / SMALLEST))):
        x = _conv(WIDTHS[min(i + 1, len(WIDTHS) - 1)])(x)
        x = nn.avg_pool(x, (2,) * len(size), (2,) * len(size), padding="SAME")
    else:
      x = nn.relu(nn.Dense(2 * NUM_FEATURES)(x))
    features = nn.relu(nn.Dense(NUM_FEATURES)(x.reshape(len(x), -1)))
    return features, nn.Dense(self.num_classes)(features)


def _reduced(x):
  """At most 64 values along each axis but the channels."""
  shape = (len(x), *(min(n, LARGEST) for n in x.shape[1:-1]), x.shape[-1])
  return x if shape == x.shape else jax.image.resize(x, shape, "linear")


def _conv(width):
  def apply(x):
    conv = Conv(width, (3,) * (x.ndim - 2), kernel_init=nn.initializers.he_normal())
    return nn.relu(conv(x))

  return apply


class Classifier(NamedTuple):
  """A trained `Network`; `digest` is of what it was trained on, and how; `accuracy` is that on the
  test split, nan without one.
  """

  network: Network
  variables: PyTree
  digest: str
  accuracy: float


def load(dataset: DataSet, folder: Path) -> Classifier:
  """The classifier of a data set, trained once (seconds for digits) and kept in `folder`."""
  train, network = dataset.splits["train"], Network(dataset.num_classes)
  legal = "data with class labels"
  mend = "take --config.evaluation.features=random_conv or pixels"
  check("label" in train and dataset.num_classes > 1, "data.name", dataset.name, legal, mend)
  digest = _digest(dataset)
  path = folder / f"classifier-{digest}.npz"
  if not path.is_file():
    variables = _train(network, dataset)
    accuracy = _accuracy(network, variables, dataset)
    share = f"{accuracy:.1%} of the test split right"
    print(f"trained a classifier of {dataset.name} for features: {share}", flush=True)
    arrays = flatten_dict(jax.device_get(variables), sep="/")
    files.write_arrays(path, {"accuracy": accuracy, **arrays})
  arrays = files.read_arrays(path)
  accuracy = float(arrays.pop("accuracy"))
  return Classifier(network, unflatten_dict(arrays, sep="/"), digest, accuracy)


def _digest(dataset: DataSet) -> str:
  """Of the data's declaration, of values and labels spread over the training split, and of how it
  is trained.
  """
  train = dataset.splits["train"]
  rows = spread(len(train["label"]), SEEN)
  about = (VERSION, dataset.spec, dataset.transform, len(train["label"]))
  content = hashlib.sha256(repr(about).encode())
  for name in ("image", "label"):
    content.update(np.ascontiguousarray(train[name][rows]).tobytes())
  return content.hexdigest()[:16]


def _moved(key, x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
  """Images a little turned, enlarged, and shifted by up to 1/8 of their sides; other data as they
  are.
  """
  if x.ndim != 4:
    return x
  rows, columns = (max(1, n // 4) for n in x.shape[1:3])  # reflected strokes would be other digits
  wide = jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)), "edge")
  turn, scale, right, down = jax.random.uniform(key, (4, len(x)), minval=-1)
  none, angle, shifts = jnp.zeros(len(x)), ROTATION * turn, [2 / 3 * right, 2 / 3 * down]
  conditions = [none, none, scale, jnp.cos(angle) - 1, jnp.sin(angle), none, none, *shifts]
  moved = augment.transform(wide, jnp.stack(conditions, 1))
  return moved[:, rows:-rows, columns:-columns]


def _steps(network: Network, optimizer, dataset: DataSet):
  """(state, (values, labels) of several batches, their numbers) -> the state after them."""

  def loss(variables, key, x, labels):
    logits = network.apply(variables, _moved(key, _reduced(x)))[1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  def step(state, batch):
    (variables, moments), (values, labels, index) = state, batch
    key = jax.random.fold_in(jax.random.key(1), index)
    gradients = jax.grad(loss)(variables, key, dataset.transform.forward(values), labels)
    updates, moments = optimizer.update(gradients, moments, variables)
    return (optax.apply_updates(variables, updates), moments), None

  return jax.jit(lambda state, batches: jax.lax.scan(step, state, batches)[0], donate_argnums=0)


def _train(network: Network, dataset: DataSet) -> PyTree:
  """AdamW, its rate decaying by a cosine, over shuffled epochs; the same for the same data."""
  train = dataset.splits["train"]
  n = len(train["label"])
  num_steps = min(max(EPOCHS * n // BATCH_SIZE, LEAST_STEPS), MOST_STEPS) // CHUNK * CHUNK
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(LEARNING_RATE, num_steps), weight_decay=WEIGHT_DECAY
  )
  variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *dataset.shape)))
  state, steps = (variables, optimizer.init(variables)), _steps(network, optimizer, dataset)
  for first, rows in zip(range(0, num_steps, CHUNK), _rows(n, num_steps)):
    values, labels = (train[name][rows] for name in ("image", "label"))
    state = steps(state, (values, labels, first + np.arange(CHUNK)))
  return state[0]


def _rows(n: int, num_steps: int) -> Iterator[np.ndarray]:
  """The examples [CHUNK, BATCH_SIZE] of every call."""
  rng = np.random.RandomState(0)  # its stream is frozen in every version of numpy
  epochs = -(-num_steps * BATCH_SIZE // n)
  order = np.concatenate([rng.permutation(n) for _ in range(epochs)])
  batches = order[: num_steps * BATCH_SIZE].reshape(-1, CHUNK, BATCH_SIZE)
  yield from tqdm(batches, desc="classifier", unit=f"{CHUNK} steps", disable=devices.no_bar())


def _accuracy(network: Network, variables: PyTree, dataset: DataSet) -> float:
  """Share of the test split that is classified right."""
  test: Batch = dataset.splits.get("test", {"label": np.zeros(0)})
  forward = jax.jit(lambda variables, x: network.apply(variables, x)[1].argmax(1))
  hits = []
  for rows, valid in parts(len(test["label"]), 256, "testing"):
    x = dataset.transform.forward(jnp.asarray(test["image"][rows]))
    hits.append((np.asarray(forward(variables, x)) == test["label"][rows])[:valid])
  return float(np.concatenate(hits).mean()) if hits else math.nan
