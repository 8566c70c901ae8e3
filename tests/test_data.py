"""The digits, their batches and the transform."""

import itertools
import pickle
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from tiny import tiny_config

import data
from data_sources.rows import Gather
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


def parts_of(monkeypatch, num_hosts, split, batch_size, num_batches):
  """The batches of each of several hosts."""
  monkeypatch.setattr(jax, "process_count", lambda: num_hosts)
  parts = []
  for host in range(num_hosts):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    parts.append(take(data.batches(split, batch_size, seed=1), num_batches))
  return parts


def test_four_hosts_together_see_every_example_once_per_epoch(monkeypatch):
  n = 22  # hosts divide neither the examples nor an epoch's batches
  parts = parts_of(monkeypatch, 4, numbered(n), 8, 11)
  assert all(len(batch["image"]) == 2 for part in parts for batch in part)
  drawn = np.concatenate([part[k]["image"] for k in range(11) for part in parts])
  epochs = drawn.reshape(4, n)
  np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(n), (4, n)))


def test_hosts_must_divide_the_batch(monkeypatch):
  with pytest.raises(ConfigError, match=r"training.batch_size = 6 .*\n.*4 hosts"):
    parts_of(monkeypatch, 4, numbered(12), 6, 1)


def test_a_data_set_may_be_smaller_than_a_batch():
  drawn = np.concatenate([b["image"] for b in take(data.batches(numbered(3), 8, seed=0), 3)])
  assert all(sorted(epoch) == [0, 1, 2] for epoch in drawn.reshape(8, 3))


def test_late_batches_of_a_large_data_set_come_at_once():
  split = {"image": np.broadcast_to(np.zeros(1, np.uint8), (3_000_000, 4))}
  tracemalloc.start()
  begin = time.perf_counter()
  batch = next(data.batches(split, 128, seed=0, start=10**6))
  seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert batch["image"].shape == (128, 4) and seconds < 2 and peak < 1e6


def test_worker_processes_give_the_same_batches_and_resume_exactly(tmp_path):
  np.save(tmp_path / "image.npy", np.arange(10))
  split = {"image": np.load(tmp_path / "image.npy", mmap_mode="r"), "label": np.arange(10)}
  straight = take(data.batches(split, 4, seed=3), 12)
  resumed = take(data.batches(split, 4, seed=3, start=5, num_workers=2), 7)
  for a, b in zip(straight[5:], resumed):
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])


def test_a_memory_mapped_file_reaches_a_worker_as_its_name(tmp_path):
  np.save(tmp_path / "image.npy", np.arange(100_000))
  whole = np.load(tmp_path / "image.npy", mmap_mode="r")
  for array, is_small in ((whole, True), (whole[50_000:], False)):
    pickled = pickle.dumps(Gather({"image": array}))
    assert (len(pickled) < 1000) == is_small
    assert pickle.loads(pickled).rows(np.array([3]))["image"] == array[3]


def test_hosts_take_each_batch_in_turn(monkeypatch):
  whole = take(data.batches(numbered(12), 4, seed=1), 6)
  parts = parts_of(monkeypatch, 2, numbered(12), 4, 6)
  for batch, a, b in zip(whole, *parts):
    np.testing.assert_array_equal(np.concatenate([a["image"], b["image"]]), batch["image"])


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match=r"data.dir = .*file/below"):
    data.load(chosen("digits", dir=str(tmp_path / "file" / "below")))


@pytest.mark.parametrize("name", ["mnist", "toy", "webdataset:x"])
def test_an_unknown_source_lists_the_known_ones(name):
  with pytest.raises(ConfigError, match=r"data.name = .*\n.*'digits', .*'folder:', .*'tfds:'"):
    data.load(chosen(name))


def test_what_is_declared_is_what_is_loaded(digits):
  spec = data.declared(chosen("digits"))
  assert (spec.shape, spec.num_classes, set(spec.splits)) == (
    digits.shape,
    digits.num_classes,
    set(digits.splits),
  )
  assert spec == digits.spec
  assert data.transform_of(spec) == digits.transform == data.Transform(17)


@pytest.mark.parametrize(
  "name, size, shape",
  [
    ("tfds:cifar10", 0, (32, 32, 3)),
    ("tfds:cifar10", 32, (32, 32, 3)),
    ("tfds:cifar10", 16, (16, 16, 3)),
    ("digits", 16, None),
    ("tfds:celeb_a", 64, (64, 64, 3)),
    ("tfds:celeb_a", 0, (218, 178, 3)),
    ("tfds:lsun/bedroom", 0, None),
    ("ffhq", 256, (256, 256, 3)),
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


def test_continuous_values_have_no_bins_and_stay_as_they_are():
  transform = data.transform_of(data.Spec((2,), levels=0), centered=False)
  x = jnp.array([[-7.5, 1e6]])
  for y in (transform.forward(x), transform.dequantize(jax.random.key(0), x), transform.inverse(x)):
    assert y.dtype == jnp.float32 and (y == x).all()
  assert transform == data.Transform(0)
  with pytest.raises(ValueError, match="no bins"):
    _ = transform.bin_width
