"""Folders, arrays, toy distributions, tensorflow-datasets and published archives."""

import gzip
import io
import json
import os
import shutil
import struct
import sys
import tarfile
import threading
import time
import types
import zipfile

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy import stats
from tiny import tiny_config

import data
from data_sources import cache, folder, images, spec, tfds_source, toy
from errors import ConfigError

RNG = np.random.default_rng(0)


@pytest.fixture
def chosen(tmp_path):
  """(name, **fields) -> `config.data` with a data.dir of its own."""

  def settings(name, **changes):
    changes = {"dir": str(tmp_path / "data")} | changes
    return tiny_config(data__name=name, **{f"data__{k}": v for k, v in changes.items()}).data

  return settings


def bytes_of(*shape):
  return RNG.integers(0, 256, shape, np.uint8)


def save(path, array, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path, **options)
  return array


def rows_of(split):
  return sorted(map(bytes, split["image"]))


# toy distributions


def test_the_mixture_of_ncsn_has_its_weights_means_and_variances(chosen):
  gmm = data.load(chosen("toy:gmm"))
  x, label = gmm.splits["train"]["image"], gmm.splits["train"]["label"]
  assert gmm.spec == data.Spec((2,), 0, 2) and x.dtype == np.float32
  assert abs(label.mean() - 0.2) < 4 * 0.4 / np.sqrt(len(label))
  for k, centre in enumerate((5, -5)):
    z = (x[label == k] - centre).ravel()
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_ar1_sequences_have_geometric_covariance(chosen):
  x = data.load(chosen("toy:ar1")).splits["test"]["image"][..., 0]
  i = np.arange(64)
  expected = 0.9 ** np.abs(i[:, None] - i)
  np.testing.assert_allclose(np.cov(x.T), expected, atol=5 * np.sqrt(2 / len(x)))


def test_the_checkerboard_fills_the_black_fields_evenly(chosen):
  x = data.load(chosen("toy:checkerboard")).splits["train"]["image"]
  fields, counts = np.unique(np.floor((x + 4) / 2), axis=0, return_counts=True)
  assert len(fields) == 8 and (fields.sum(1) % 2 == 0).all() and np.abs(x).max() <= 4
  assert stats.chisquare(counts).pvalue > 1e-3


def test_the_25_gaussians_are_told_by_their_labels(chosen):
  train = data.load(chosen("toy:gaussians25")).splits["train"]
  near = np.round(train["image"]).astype(int) + 2
  np.testing.assert_array_equal(5 * near[:, 0] + near[:, 1], train["label"])
  assert set(train["label"]) == set(range(25))


def test_curves_lie_where_their_equations_say(chosen):
  train = {
    name: data.load(chosen(f"toy:{name}")).splits["train"]
    for name in ("moons", "swiss_roll", "spiral")
  }
  label = train["moons"]["label"]
  around = train["moons"]["image"] - np.stack([label, 0.5 * label], 1)
  assert abs(np.linalg.norm(around, axis=1).mean() - 1.005) < 0.005  # 1 + 0.1^2 / 2
  assert np.median(around[label == 0, 1]) > 0.5 and np.median(around[label == 1, 1]) < -0.5
  # E r^2: of r uniform on [0.3 pi, 0.9 pi], of 3 sqrt(u)
  curves = ("swiss_roll", 5.0, 1, 0.39 * np.pi**2), ("spiral", np.pi, 2, 4.5)
  for name, turns, arms, second_moment in curves:
    x = train[name]["image"]
    np.testing.assert_allclose((x**2).sum(1).mean(), second_moment + 2 * 0.1**2, rtol=0.015)
    radius, angle = np.linalg.norm(x, axis=1), np.arctan2(x[:, 1], x[:, 0])
    off = np.cos(arms * (angle - turns * radius))[radius > 1]
    # the noise turns by turns * 0.1 along the radius and by 0.1 / radius across it
    variance = (0.1 * arms) ** 2 * (turns**2 + radius[radius > 1] ** -2.0)
    np.testing.assert_allclose(off.mean(), np.exp(-variance / 2).mean(), atol=0.03)


@pytest.mark.parametrize("field, value", [("levels", 5), ("image_size", -1), ("resize", "box")])
def test_settings_that_images_cannot_have_are_named(chosen, field, value):
  for name in ("tfds:cifar10", "ffhq"):
    with pytest.raises(ConfigError, match=f"data.{field} = {value!r}"):
      data.declared(chosen(name, **{field: value}))


@pytest.mark.parametrize("name", toy.TOYS)
def test_toys_are_what_they_declare_the_same_each_time_and_new_in_the_test_split(chosen, name):
  settings = chosen(f"toy:{name}")
  first, again = data.load(settings), data.load(settings)
  train, test = first.splits["train"]["image"], first.splits["test"]["image"]
  assert first.spec == data.declared(settings) and (len(train), len(test)) == (50_000, 10_000)
  np.testing.assert_array_equal(train, again.splits["train"]["image"])
  assert not {bytes(x) for x in test} & {bytes(x) for x in train}


def test_an_unknown_toy_lists_the_known_ones(chosen):
  with pytest.raises(ConfigError, match=r"'toy:checkerboard', .*'toy:swiss_roll'"):
    data.declared(chosen("toy:rings"))


@pytest.mark.parametrize("field", ["image_size", "crop", "levels"])
def test_toys_are_not_resized(chosen, field):
  with pytest.raises(ConfigError, match=f"data.{field} = 16"):
    data.declared(chosen("toy:gmm", **{field: 16}))


# arrays


@pytest.mark.parametrize(
  "array, shape, levels",
  [
    (bytes_of(20, 24, 40, 2), (24, 40, 2), 256),
    (bytes_of(20, 6, 5), (6, 5, 1), 256),
    (bytes_of(20, 4, 3, 2, 5), (4, 3, 2, 5), 256),
    (np.arange(20)[:, None] % 11, (1,), 11),
    (np.arange(20) % 2 == 0, (1,), 2),
    (np.arange(600)[:, None].repeat(3, 1), (3,), 600),
    (RNG.normal(size=(20, 7)), (7,), 0),
    (RNG.normal(size=(20, 9, 2)).astype(np.float16), (9, 2), 0),
  ],
  ids=["image", "grey", "rank 4", "levels", "bool", "wide", "vector", "sequence"],
)
def test_shape_and_levels_of_arrays_are_inferred(chosen, tmp_path, array, shape, levels):
  np.save(tmp_path / "x.npy", array)
  settings = chosen(f"npy:{tmp_path}/x.npy")
  loaded = data.load(settings)
  assert loaded.spec == data.declared(settings) == data.Spec(shape, levels, 0)
  parts = [loaded.splits[name]["image"] for name in ("train", "test")]
  stored = parts[0].dtype
  assert stored == (np.float32 if not levels else np.uint8 if levels <= 256 else np.uint16)
  assert all(isinstance(part, np.memmap) for part in parts)
  assert len(parts[1]) == round(0.1 * len(array))
  flat = array.reshape(len(array), *shape).astype(stored)
  np.testing.assert_array_equal(
    np.sort(np.concatenate(parts).reshape(len(array), -1), axis=0),
    np.sort(flat.reshape(len(array), -1), axis=0),
  )


def test_what_is_held_out_depends_on_the_number_of_examples_alone(chosen, tmp_path):
  drawn = []
  for name, array in (("a", np.arange(5000.0)), ("b", -np.arange(5000.0))):
    np.save(tmp_path / f"{name}.npy", array)
    drawn.append(
      np.asarray(data.load(chosen(f"npy:{tmp_path}/{name}.npy")).splits["test"]["image"])
    )
  np.testing.assert_array_equal(drawn[0], -drawn[1])
  np.testing.assert_array_equal(np.flatnonzero(spec.held_out(20, 0.1)), [18, 1][::-1])
  whole = data.load(chosen(f"npy:{tmp_path}/a.npy", held_out=0.0))
  assert whole.spec.splits == ("train",) and len(whole.splits["train"]["image"]) == 5000


@pytest.mark.parametrize("names", [("image", "label"), ("x", "y"), ("arr_0", "label")])
def test_an_archive_has_labels_and_may_have_splits(chosen, tmp_path, names):
  x, y = bytes_of(30, 4, 4, 3), np.arange(30) % 7
  np.savez(tmp_path / "x.npz", **dict(zip(names, (x, y))))
  loaded = data.load(chosen(f"npz:{tmp_path}/x.npz"))
  assert loaded.spec == data.Spec((4, 4, 3), 256, 7)
  by_image = {bytes(image): label for image, label in zip(x, y)}
  for split in loaded.splits.values():
    assert all(by_image[bytes(i)] == k for i, k in zip(split["image"], split["label"]))


@pytest.mark.parametrize("pattern", ["{split}_{kind}", "{kind}_{split}"])
def test_an_archive_may_have_splits(chosen, tmp_path, pattern):
  sizes = {"train": 8, "test": 3}
  arrays = {s: {"x": np.full((n, 5), n), "y": np.full(n, n % 4)} for s, n in sizes.items()}
  flat = {pattern.format(split=s, kind=k): v for s, a in arrays.items() for k, v in a.items()}
  np.savez(tmp_path / "x.npz", **flat)
  loaded = data.load(chosen(f"npz:{tmp_path}/x.npz"))
  assert loaded.spec == data.Spec((5,), 9, 4)
  for name, split in loaded.splits.items():
    np.testing.assert_array_equal(split["image"], arrays[name]["x"])
    np.testing.assert_array_equal(split["label"], arrays[name]["y"])


def with_value(array, index, value):
  array = array.copy()
  array[index] = value
  return array


@pytest.mark.parametrize(
  "array, levels, message",
  [
    (with_value(np.zeros((5000, 3)), (4500, 2), np.nan), 0, r"index \(4500, 2\) is nan"),
    (with_value(np.zeros((9, 3)), (4, 1), 1e39), 0, r"index \(4, 1\) is 1e\+39"),
    (with_value(np.zeros((9, 3), int), (8, 0), -1), 0, r"0 .. 1; .*index \(8, 0\) is -1"),
    (with_value(np.zeros((9, 3), int), (7, 2), 4), 4, r"0 .. 3; .*index \(7, 2\) is 4"),
    (np.zeros((9, 3), complex), 0, "integers, booleans or floats"),
    (np.array([{}]), 0, "numpy.load"),
    (np.zeros((0, 3)), 0, "integers, booleans or floats"),
    (np.zeros((1, 3)), 0, "'train' is empty"),
  ],
  ids=["nan", "overflow", "negative", "levels", "complex", "objects", "empty", "one"],
)
def test_bad_arrays_are_named_with_the_index(chosen, tmp_path, array, levels, message):
  np.save(tmp_path / "x.npy", array)
  with pytest.raises(ConfigError, match=message):
    data.load(chosen(f"npy:{tmp_path}/x.npy", levels=levels))
  assert not list((tmp_path / "data" / "cache").glob("*"))


def test_levels_of_an_array_can_be_set(chosen, tmp_path):
  np.save(tmp_path / "x.npy", bytes_of(20, 3) % 5)
  assert data.load(chosen(f"npy:{tmp_path}/x.npy", levels=256)).transform.levels == 256


@pytest.mark.parametrize(
  "arrays, message",
  [
    ({"a": np.zeros(3), "b": np.zeros(3)}, r"has \['a', 'b'\]"),
    ({"x": np.zeros((5, 2)), "y": np.arange(4)}, "one label for each of the 5 examples"),
    ({"x": np.zeros((5, 2)), "y": np.arange(5) - 1}, "one label for each of the 5 examples"),
    ({"train_x": np.zeros((5, 2)), "train_y": np.arange(5), "test_x": np.zeros((5, 2))}, "'test'"),
    ({"train_x": np.zeros((5, 2)), "test_x": np.zeros((5, 3))}, "one shape, not"),
  ],
  ids=["names", "number", "negative", "missing", "shapes"],
)
def test_bad_archives_are_named(chosen, tmp_path, arrays, message):
  np.savez(tmp_path / "x.npz", **arrays)
  with pytest.raises(ConfigError, match=message):
    data.load(chosen(f"npz:{tmp_path}/x.npz"))


def test_a_missing_file_is_named(chosen):
  with pytest.raises(ConfigError, match=r"/nowhere.npy is none"):
    data.declared(chosen("npy:/nowhere.npy"))


# folders


def test_a_flat_folder_has_no_classes_and_every_suffix_is_read(chosen, tmp_path):
  root = tmp_path / "images"
  for i, suffix in enumerate(["png", "bmp", "tif", "tiff", "PNG", "webp"]):
    save(root / f"{i}.{suffix}", bytes_of(6, 10, 3), **({"lossless": True} if i == 5 else {}))
  save(root / "6.gif", np.full((6, 10, 3), 7, np.uint8))
  save(root / "7.jpeg", np.full((6, 10, 3), 9, np.uint8))
  (root / "notes.txt").write_text("not an image")
  settings = chosen(f"folder:{root}")
  loaded = data.load(settings)
  assert loaded.spec == data.declared(settings) == data.Spec((6, 10, 3))
  stored = {bytes(image) for split in loaded.splits.values() for image in split["image"]}
  originals = {np.asarray(Image.open(p).convert("RGB")).tobytes() for p in root.glob("[0-9]*")}
  assert stored == originals and len(stored) == 8 and "label" not in loaded.splits["train"]


def test_sub_folders_are_classes_in_the_order_of_their_names(chosen, tmp_path):
  root, label_of = tmp_path / "images", {}
  for label, name in enumerate(["ant", "bee", "cat"]):
    for i in range(4):
      place = root / name / ("deep" if i % 2 else "")
      label_of[save(place / f"{i}.png", bytes_of(5, 4)).tobytes()] = label
  loaded = data.load(chosen(f"folder:{root}"))
  assert loaded.spec == data.Spec((5, 4, 1), 256, 3)
  for split in loaded.splits.values():
    assert all(label_of[bytes(i)] == k for i, k in zip(split["image"], split["label"]))
  about = json.loads(
    next((tmp_path / "data" / "cache").glob("folder-images-*/spec.json")).read_text()
  )
  assert about["classes"] == ["ant", "bee", "cat"]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folders_called_train_and_test_are_splits(chosen, tmp_path, held_out):
  root, name = tmp_path / "images", {"test": "test", "val": "validation"}[held_out]
  made = {split: [] for split in ("train", held_out)}
  for split, label, i in [(s, k, i) for s in made for k in "ab" for i in range(3)]:
    made[split].append(save(root / split / label / f"{i}.png", bytes_of(4, 4, 4)).tobytes())
  loaded = data.load(chosen(f"folder:{root}"))
  assert loaded.spec == data.Spec((4, 4, 4), 256, 2, ("train", name))
  for split, folder_name in (("train", "train"), (name, held_out)):
    assert rows_of(loaded.splits[split]) == sorted(made[folder_name])
    assert sorted(loaded.splits[split]["label"]) == [0, 0, 0, 1, 1, 1]


def test_rejects_are_counted_listed_and_left_out(chosen, tmp_path, capsys):
  root = tmp_path / "images"
  good = [save(root / f"good{i:02d}.png", bytes_of(8, 8, 3)).tobytes() for i in range(30)]
  save(root / "sixteen.png", RNG.integers(0, 60_000, (8, 8)).astype(np.uint16))
  save(root / "wide.png", bytes_of(8, 9, 3))
  save(root / "alpha.png", bytes_of(8, 8, 4))
  good.append(np.repeat(save(root / "grey.png", bytes_of(8, 8))[..., None], 3, -1).tobytes())
  (root / "text.jpg").write_text("not an image")
  (root / "dangling.png").symlink_to(root / "nothing")
  whole = io.BytesIO()
  Image.fromarray(bytes_of(8, 8, 3)).save(whole, "jpeg")
  (root / "cut.jpg").write_bytes(whole.getvalue()[:-40])  # its header is good
  loaded = data.load(chosen(f"folder:{root}", held_out=0.0))
  assert rows_of(loaded.splits["train"]) == sorted(good)
  printed = capsys.readouterr().out
  assert printed.index("5 left out") < printed.index("1 left out\n  cut.jpg")
  rejects = next((tmp_path / "data" / "cache").glob("*/rejects.txt")).read_text()
  reasons = {
    "sixteen.png": "mode I;16 is not supported",
    "wide.png": "9x8 pixels, most are 8x8",
    "alpha.png": "mode RGBA, most are RGB",
    "text.jpg": "UnidentifiedImageError",
    "dangling.png": "FileNotFoundError",
    "cut.jpg": "truncated",
  }
  assert len(rejects.splitlines()) == len(reasons)
  for name, why in reasons.items():
    assert any(line.startswith(name) and why in line for line in rejects.splitlines()), name


def test_palettes_become_rgb_and_bilevel_becomes_grey(chosen, tmp_path):
  colours = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)
  for i in range(2):
    palette = Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE)
    save_to = tmp_path / "p" / f"{i}.png"
    save_to.parent.mkdir(exist_ok=True)
    palette.save(save_to)
    save(tmp_path / "one" / f"{i}.png", np.array([[True, False]]))
  np.testing.assert_array_equal(
    data.load(chosen(f"folder:{tmp_path}/p")).splits["train"]["image"][0], colours
  )
  grey = data.load(chosen(f"folder:{tmp_path}/one"))
  assert grey.splits["train"]["image"].ravel().tolist() == [255, 0] and grey.shape == (1, 2, 1)


def test_different_sizes_need_an_image_size(chosen, tmp_path):
  for i in range(6):
    save(tmp_path / "images" / f"{i}.png", bytes_of(10 + i // 4, 12, 3))
  with pytest.raises(ConfigError, match=r"data.image_size = 0 .*\n.*12x10 \(4\), 12x11 \(2\)"):
    data.declared(chosen(f"folder:{tmp_path}/images"))
  loaded = data.load(chosen(f"folder:{tmp_path}/images", image_size=8))
  assert loaded.shape == (8, 8, 3)


@pytest.mark.parametrize("text", [None, "not an image"])
def test_a_folder_without_a_usable_image_is_an_error(chosen, tmp_path, text):
  (tmp_path / "images").mkdir()
  if text:
    (tmp_path / "images" / "a.png").write_text(text)
  with pytest.raises(ConfigError, match="UnidentifiedImageError" if text else "has none"):
    data.declared(chosen(f"folder:{tmp_path}/images"))


def test_a_changed_folder_is_prepared_anew_and_an_unchanged_one_is_not(
  chosen, tmp_path, monkeypatch
):
  root = tmp_path / "images"
  for i in range(5):
    save(root / f"{i}.png", bytes_of(4, 4, 3))
  settings = chosen(f"folder:{root}")
  data.load(settings)
  monkeypatch.setattr(folder, "_contents", lambda *_: pytest.fail("scanned again"))
  data.load(settings)
  monkeypatch.undo()
  new = save(root / "5.png", bytes_of(4, 4, 3)).tobytes()
  loaded = data.load(settings)
  assert new in rows_of(loaded.splits["train"]) + rows_of(loaded.splits["test"])


def test_published_folders_have_no_classes(chosen, tmp_path):
  with pytest.raises(ConfigError, match=r"manual/ffhq\n.*github.com/NVlabs/ffhq-dataset"):
    data.load(chosen("ffhq", image_size=8))
  for i in range(4):
    save(tmp_path / "data" / "manual" / "ffhq" / f"{i}000" / "a.png", bytes_of(16, 16, 3))
  loaded = data.load(chosen("ffhq", image_size=8, held_out=0.0))
  assert loaded.spec == data.Spec((8, 8, 3), 256, 0, ("train",))


# crop and resize


def test_bilinear_follows_the_triangle_kernel_on_a_ramp():
  """Halving by an antialiased triangle keeps a ramp, away from the borders."""
  ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8), (60, 60)).T
  out = np.asarray(images.RESIZES["bilinear"](Image.fromarray(np.ascontiguousarray(ramp)), 30))
  np.testing.assert_array_equal(out[3:-3, 0], (np.arange(30) * 8 + 2)[3:-3])


def test_bilinear_and_bicubic_take_the_shorter_side_then_the_centre():
  image = np.zeros((8, 20), np.uint8)
  image[:, 6:14] = np.arange(8)[:, None] * 10  # the central square
  for name in ("bilinear", "bicubic"):
    out = np.asarray(images.RESIZES[name](Image.fromarray(image), 8))
    np.testing.assert_array_equal(out, image[:, 6:14])


def test_lanczos_sees_nothing_outside_the_central_square():
  inside = np.full((8, 8), 100, np.uint8)
  image = np.zeros((8, 20), np.uint8)
  image[:, 6:14] = inside
  lanczos, bicubic = (
    np.asarray(images.RESIZES[name](Image.fromarray(image), 4)) for name in ("lanczos", "bicubic")
  )
  assert (lanczos == 100).all() and not (bicubic == 100).all()


def test_adm_halves_by_the_mean_of_boxes_before_bicubic():
  image = bytes_of(16, 16)
  boxes = image.reshape(4, 4, 4, 4).astype(float)
  out = np.asarray(images.RESIZES["adm"](Image.fromarray(image), 4)).astype(float)
  np.testing.assert_allclose(out, boxes.mean((1, 3)), atol=2)  # rounded up at every pass


def test_the_crop_is_central_and_comes_before_the_resize(chosen, tmp_path):
  for i in range(2):
    image = np.zeros((218, 178, 3), np.uint8)
    image[39:179, 19:159] = 200  # the 140 pixels that score_sde keeps of CelebA
    save(tmp_path / "images" / f"{i}.png", image)
  for size in (0, 64):
    loaded = data.load(chosen(f"folder:{tmp_path}/images", crop=140, image_size=size))
    assert loaded.shape == ((size or 140), (size or 140), 3)
    assert (loaded.splits["train"]["image"] == 200).all()


def test_a_crop_larger_than_an_image_is_named(chosen, tmp_path):
  with pytest.raises(ConfigError, match=r"data.crop = 40 .*\n.*at most 32"):
    data.declared(chosen("tfds:cifar10", crop=40))
  save(tmp_path / "images" / "a.png", bytes_of(4, 4, 3))
  save(tmp_path / "images" / "b.png", bytes_of(9, 9, 3))
  save(tmp_path / "images" / "c.png", bytes_of(9, 9, 3))
  loaded = data.load(chosen(f"folder:{tmp_path}/images", crop=6, held_out=0.0))
  assert loaded.splits["train"]["image"].shape == (2, 6, 6, 3)


# the cache


def numbers(tmp_path, n=100):
  np.save(tmp_path / "x.npy", np.arange(n, dtype=np.float32))
  return f"npy:{tmp_path}/x.npy"


def test_what_a_failed_or_killed_preparation_leaves_is_not_taken_for_whole(
  chosen, tmp_path, monkeypatch
):
  settings = chosen(numbers(tmp_path))
  original = cache._finish
  monkeypatch.setattr(cache, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    data.load(settings)
  folders = tmp_path / "data" / "cache"
  assert not list(folders.iterdir())
  with monkeypatch.context() as killed:
    killed.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
      data.load(settings)
  (left,) = folders.iterdir()
  monkeypatch.setattr(cache, "_finish", original)
  assert len(data.load(settings).splits["train"]["image"]) == 90 and left.exists()
  shutil.rmtree(next(path for path in folders.iterdir() if path.suffix != ".tmp"))
  for path in [left, *left.iterdir()]:
    os.utime(path, (time.time() - 7200,) * 2)
  assert len(data.load(settings).splits["train"]["image"]) == 90 and not left.exists()


def test_two_preparations_at_once_give_one_whole_cache(chosen, tmp_path, monkeypatch):
  settings = chosen(numbers(tmp_path))
  together, original, loaded = threading.Barrier(2), cache._finish, []
  monkeypatch.setattr(cache, "_finish", lambda *a: (together.wait(30), original(*a)))
  threads = [threading.Thread(target=lambda: loaded.append(data.load(settings))) for _ in range(2)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  assert len(loaded) == 2 and len(list((tmp_path / "data" / "cache").iterdir())) == 1
  for each in loaded:
    both = np.concatenate([split["image"].ravel() for split in each.splits.values()])
    np.testing.assert_array_equal(np.sort(both), np.arange(100))


def test_other_hosts_wait_for_host_0(chosen, tmp_path, monkeypatch):
  settings, loaded = chosen(numbers(tmp_path)), []
  data.declared(settings)
  monkeypatch.setattr(cache, "_wait_for", lambda path, wait=cache._wait_for: wait(path, 0.05))
  monkeypatch.setattr(jax, "process_index", lambda: int(threading.current_thread().name == "host1"))
  other = threading.Thread(target=lambda: loaded.append(data.load(settings)), name="host1")
  other.start()
  time.sleep(0.3)
  assert not loaded and not (tmp_path / "data").exists()
  data.load(settings)
  other.join(30)
  assert len(loaded[0].splits["train"]["image"]) == 90


def test_a_full_disk_is_refused_before_anything_is_written(chosen, tmp_path, monkeypatch):
  usage = types.SimpleNamespace(free=100)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with pytest.raises(ConfigError, match=r"data.dir = .*\n.*8e-07 GB free; here 1e-07 GB are"):
    data.load(chosen(numbers(tmp_path)))
  assert not list((tmp_path / "data" / "cache").iterdir())


# tensorflow-datasets


class Shapes(tfds.core.GeneratorBasedBuilder):
  """Twelve PNG images of different sizes, three classes."""

  VERSION = tfds.core.Version("1.0.0")
  images = tuple(bytes_of(8 + i, 10, 3) for i in range(12))

  def _info(self):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(8, 12), "validation": self._generate_examples(0, 8)}

  def _generate_examples(self, start, stop):
    for i in range(start, stop):
      png = io.BytesIO()
      Image.fromarray(self.images[i]).save(png, "png")
      yield i, {"image": io.BytesIO(png.getvalue()), "label": i % 3}


class Sounds(tfds.core.GeneratorBasedBuilder):
  """A data set without images."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {"sound": tfds.features.Tensor(shape=(3,), dtype=np.uint8)}
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    yield 0, {"sound": np.zeros(3, np.uint8)}


def prepare(builder, tmp_path):
  tfds.disable_progress_bar()
  builder(data_dir=tmp_path / "data", file_format="array_record").download_and_prepare()


def test_any_prepared_image_data_set_is_read_and_resized(chosen, tmp_path):
  prepare(Shapes, tmp_path)
  settings = chosen("tfds:shapes", image_size=8, resize="lanczos")
  loaded = data.load(settings)
  assert (
    loaded.spec == data.declared(settings) == data.Spec((8, 8, 3), 256, 3, ("train", "validation"))
  )
  expected = {
    np.asarray(images.RESIZES["lanczos"](Image.fromarray(image), 8)).tobytes(): i
    for i, image in enumerate(Shapes.images)
  }
  for name, numbers in (("train", range(8, 12)), ("validation", range(8))):
    split = loaded.splits[name]
    found = [expected[bytes(image)] for image in split["image"]]
    assert sorted(found) == list(numbers) and [i % 3 for i in found] == split["label"].tolist()
  with pytest.raises(ConfigError, match="'tfds:shapes' differ in size"):
    data.declared(chosen("tfds:shapes"))
  assert "tensorflow" not in sys.modules


def test_a_data_set_without_images_lists_what_it_has(chosen, tmp_path):
  prepare(Sounds, tmp_path)
  with pytest.raises(ConfigError, match=r"feature 'image'.*sound"):
    data.load(chosen("tfds:sounds"))


def test_another_file_format_is_named(chosen, tmp_path):
  prepare(Shapes, tmp_path)
  info = tmp_path / "data" / "shapes" / "1.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  for shard in info.parent.glob("*array_record*"):
    shard.rename(str(shard).replace("array_record", "tfrecord"))
  with pytest.raises(
    ConfigError,
    match=r"'tfds:shapes' is prepared as tfrecord.*\n(.*\n)*.*data/array_record', file_format",
  ):
    data.load(chosen("tfds:shapes", image_size=8))


def test_a_data_set_that_is_not_there_says_how_to_get_it(chosen, tmp_path):
  for name, what in (
    ("cifar10", r"data/manual:\n +https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"),
    ("imagenet_resized/64x64", "Imagenet64_train_part2_npz.zip"),
    ("celeb_a", r"tfds.builder\('celeb_a', data_dir='.*data', file_format='array_record'\)"),
    ("oxford_flowers102", "pip install tensorflow-cpu"),
    ("nothing_of_this_name", "check the name"),
  ):
    with pytest.raises(ConfigError, match=what):
      data.load(chosen(f"tfds:{name}", image_size=64))


def test_an_unlisted_data_set_declares_what_its_builder_knows(chosen):
  assert data.declared(chosen("tfds:cifar100")) == data.Spec((32, 32, 3), 256, 100)


# published archives


def add(tar, name, content):
  member = tarfile.TarInfo(name)
  member.size = len(content)
  tar.addfile(member, io.BytesIO(content))


def png_of(image):
  stream = io.BytesIO()
  Image.fromarray(image).save(stream, "png")
  return stream.getvalue()


def write_cifar10(manual, x, y):
  planar = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
  rows = np.concatenate([y[:, None].astype(np.uint8), planar], 1)
  with tarfile.open(manual / "cifar-10-binary.tar.gz", "w:gz") as tar:
    add(tar, "cifar-10-batches-bin/data_batch_2.bin", rows[4:8].tobytes())
    add(tar, "cifar-10-batches-bin/data_batch_1.bin", rows[:4].tobytes())
    add(tar, "cifar-10-batches-bin/batches.meta.txt", b"names")
    add(tar, "cifar-10-batches-bin/test_batch.bin", rows[8:].tobytes())


def write_mnist(manual, x, y):
  for name, rows in (("train", slice(8)), ("t10k", slice(8, None))):
    pixels, labels = x[rows], y[rows].astype(np.uint8)
    images_head = struct.pack(">4i", 2051, len(pixels), 28, 28)
    labels_head = struct.pack(">2i", 2049, len(labels))
    for kind, content in (
      ("images-idx3", images_head + pixels.tobytes()),
      ("labels-idx1", labels_head + labels.tobytes()),
    ):
      (manual / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


def write_imagenet_resized(manual, x, y):
  files = {"train_part1_": {"1": slice(3), "2": slice(3, 6)}, "train_part2_": {"6": slice(6, 8)}}
  for part, batches in (files | {"val_": {"": slice(8, None)}}).items():
    with zipfile.ZipFile(
      manual / f"Imagenet64_{part}npz.zip", "w", zipfile.ZIP_DEFLATED
    ) as archive:
      for number, rows in batches.items():
        stream = io.BytesIO()
        planar = x[rows].transpose(0, 3, 1, 2).reshape(len(x[rows]), -1)
        np.savez(stream, data=planar, labels=y[rows] + 1, mean=np.zeros(3))
        archive.writestr(f"batch_{number}.npz", stream.getvalue())


def write_downsampled_imagenet(manual, x, y):
  for name, rows in (("train", slice(8)), ("valid", slice(8, None))):
    with tarfile.open(manual / f"{name}_32x32.tar", "w") as tar:
      folder_member = tarfile.TarInfo(f"{name}_32x32")
      folder_member.type = tarfile.DIRTYPE
      tar.addfile(folder_member)
      for i, image in enumerate(x[rows]):
        add(tar, f"{name}_32x32/{i:07d}.png", png_of(image))


@pytest.mark.parametrize(
  "name, shape, write",
  [
    ("cifar10", (32, 32, 3), write_cifar10),
    ("mnist", (28, 28, 1), write_mnist),
    ("imagenet_resized/64x64", (64, 64, 3), write_imagenet_resized),
    ("downsampled_imagenet/32x32", (32, 32, 3), write_downsampled_imagenet),
  ],
)
def test_published_archives_are_read_and_a_part_of_one_is_not(
  chosen, tmp_path, monkeypatch, name, shape, write
):
  x, y = bytes_of(11, *shape), np.arange(11) % 10
  manual = tmp_path / "data" / "manual"
  manual.mkdir(parents=True)
  write(manual, x, y)
  with pytest.raises(ConfigError, match="is a file missing"):
    data.load(chosen(f"tfds:{name}"))
  archive = tfds_source.ARCHIVES[name]
  sizes = dict(zip(archive.sizes, (8, 3)))
  monkeypatch.setitem(tfds_source.ARCHIVES, name, archive._replace(sizes=sizes))
  loaded = data.load(chosen(f"tfds:{name}"))
  assert loaded.spec == data.declared(chosen(f"tfds:{name}"))
  for split, rows in zip(loaded.spec.splits, (slice(8), slice(8, None))):
    np.testing.assert_array_equal(loaded.splits[split]["image"], x[rows])
    if loaded.num_classes:
      np.testing.assert_array_equal(loaded.splits[split]["label"], y[rows])
  small = data.load(chosen(f"tfds:{name}", image_size=8))
  assert small.shape == (8, 8, shape[2])
