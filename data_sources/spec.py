"""What a data set declares, and the share of it that is held out."""

from typing import NamedTuple

import numpy as np

from errors import check

Split = dict[str, np.ndarray]  # "image" [n, *d] and, where there are classes, "label" [n]


class Spec(NamedTuple):
  """What a data set declares. `shape` is any rank: vectors, sequences, images, of which a height
  and width of 0 are unknown; `levels` 0 are continuous values.
  """

  shape: tuple[int, ...]
  levels: int = 256
  num_classes: int = 0
  splits: tuple[str, ...] = ("train", "test")

  @classmethod
  def of_json(cls, fields: dict) -> "Spec":
    """From `_asdict()` as JSON gives it back."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

  @property
  def dtype(self) -> np.dtype:
    """How examples are stored: float32, or the smallest unsigned integers."""
    return np.dtype(np.float32) if not self.levels else np.min_scalar_type(self.levels - 1)


def with_held_out(splits: tuple[str, ...], share: float) -> tuple[str, ...]:
  """A source that has only "train" gets the split "test" where `share` of it is held out."""
  check(0 <= share < 1, "data.held_out", share, "a share in [0, 1)")
  return ("train", "test") if splits == ("train",) and share else splits


def held_out(num_examples: int, share: float) -> np.ndarray:
  """Which examples [n] of a source without a test split are its test split: at least one, drawn by
  a permutation that depends on their number alone.
  """
  chosen = np.zeros(num_examples, bool)
  # unlike that of a Generator, this stream is frozen in every version of numpy
  order = np.random.RandomState(0).permutation(num_examples)
  chosen[order[: max(1, round(num_examples * share))]] = True
  return chosen


def stored_as_is(spec: Spec, settings) -> Spec:
  """`spec`, after checking that no resizing is asked of data that are no image files."""
  legal = f"0: the examples of {settings.name!r} are used as they are stored"
  size = spec.shape[0]
  check(settings.image_size in (0, size), "data.image_size", settings.image_size, legal)
  check(not settings.crop, "data.crop", settings.crop, legal)
  check(settings.levels in (0, spec.levels), "data.levels", settings.levels, f"0 or {spec.levels}")
  return spec
