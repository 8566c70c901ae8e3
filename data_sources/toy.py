"""Toy distributions: 50,000 examples to train on and 10,000 to test with, always the same."""

import numpy as np
from ml_collections import ConfigDict

from data_sources.spec import Spec, Split, stored_as_is
from errors import lookup

SIZES = {"train": 50_000, "test": 10_000}
AR1_LENGTH, AR1_COEFFICIENT = 64, 0.9


def _gmm(rng, n):
  """0.8 N((5, 5), I) + 0.2 N((-5, -5), I): Song & Ermon 2019, section 3.2.2."""
  label = (rng.random(n) >= 0.8).astype(np.int32)
  return 5.0 - 10.0 * label[:, None] + rng.standard_normal((n, 2)), label


def _moons(rng, n):
  """Two half circles of radius 1 that interlock, with noise of std 0.1."""
  label, angle = rng.integers(0, 2, n, np.int32), np.pi * rng.random(n)
  side = 1 - 2 * label
  centre = np.stack([label, 0.5 * label], 1)
  arc = np.stack([side * np.cos(angle), side * np.sin(angle)], 1)
  return centre + arc + 0.1 * rng.standard_normal((n, 2)), label


def _swiss_roll(rng, n):
  """r (cos r, sin r) / 5 for r uniform on [1.5 pi, 4.5 pi], with noise of std 0.1."""
  r = np.pi * (1.5 + 3 * rng.random(n))
  roll = r[:, None] * np.stack([np.cos(r), np.sin(r)], 1) / 5
  return roll + 0.1 * rng.standard_normal((n, 2)), None


def _checkerboard(rng, n):
  """Uniform on the black fields of a 4 x 4 board that covers [-4, 4]^2, each of side 2."""
  row, half = rng.integers(0, 4, n), rng.integers(0, 2, n)
  fields = np.stack([2 * half + row % 2, row], 1)
  return 2 * (fields + rng.random((n, 2))) - 4, None


def _gaussians25(rng, n):
  """25 Gaussians of std 0.05 on the grid {-2, -1, 0, 1, 2}^2."""
  label = rng.integers(0, 25, n, np.int32)
  return np.stack([label // 5, label % 5], 1) - 2 + 0.05 * rng.standard_normal((n, 2)), label


def _spiral(rng, n):
  """Two arms r = 3 sqrt(u), angle = 3 pi sqrt(u), u uniform, with noise of std 0.1."""
  root = np.sqrt(rng.random(n))
  side = 1 - 2 * rng.integers(0, 2, n)
  arm = (side * 3 * root)[:, None] * np.stack(
    [np.cos(3 * np.pi * root), np.sin(3 * np.pi * root)], 1
  )
  return arm + 0.1 * rng.standard_normal((n, 2)), None


def _ar1(rng, n):
  """Stationary sequences x_i = 0.9 x_(i-1) + noise of unit variance: covariance 0.9^|i - j|."""
  x = rng.standard_normal((n, AR1_LENGTH, 1))
  for i in range(1, AR1_LENGTH):
    x[:, i] = AR1_COEFFICIENT * x[:, i - 1] + np.sqrt(1 - AR1_COEFFICIENT**2) * x[:, i]
  return x, None


# name: (rng, n) -> (examples, classes or None), shape, number of classes
TOYS = {
  "gmm": (_gmm, (2,), 2),
  "moons": (_moons, (2,), 2),
  "swiss_roll": (_swiss_roll, (2,), 0),
  "checkerboard": (_checkerboard, (2,), 0),
  "gaussians25": (_gaussians25, (2,), 25),
  "spiral": (_spiral, (2,), 0),
  "ar1": (_ar1, (AR1_LENGTH, 1), 0),
}


def declared(settings: ConfigDict, name: str) -> Spec:
  """Shape and classes of toy:<name>."""
  names = {f"toy:{toy}": row for toy, row in TOYS.items()}
  _, shape, num_classes = lookup(names, f"toy:{name}", "data.name")
  return stored_as_is(Spec(shape, 0, num_classes), settings)


def read(settings: ConfigDict, name: str) -> tuple[Spec, dict[str, Split]]:
  """The examples of toy:<name>, float32."""
  spec, splits = declared(settings, name), {}
  for seed, (split, n) in enumerate(SIZES.items()):
    x, label = TOYS[name][0](np.random.default_rng(seed), n)
    splits[split] = {"image": x.astype(np.float32)} | ({} if label is None else {"label": label})
  return spec, splits
