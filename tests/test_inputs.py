"""Inputs of conditional sampling: splits, image files and arrays become the same model units; what
cannot be read is told. The picture of the results.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data import DataSet, Transform
from data_sources.spec import Spec
from errors import ConfigError
from evaluation import figures, inputs

DIGITS, COLOUR = Spec((4, 6, 1), 17, 10), Spec((4, 6, 3), 256)
PLANE = Spec((2,), 0)


def values_of(spec, n=5, seed=0):
  rng = np.random.default_rng(seed)
  if not spec.levels:
    return rng.standard_normal((n, *spec.shape)).astype(np.float32)
  return rng.integers(0, spec.levels, (n, *spec.shape)).astype(spec.dtype)


def unused():
  raise AssertionError("the data set was read")


def read(name, spec, n=5, dataset_of=unused, **options):
  return inputs.read(str(name), n, spec, Transform(spec.levels), dataset_of, **options)


def told(name, spec, **options):
  with pytest.raises(ConfigError) as error:
    read(name, spec, **options)
  assert f"guidance.inputs = {str(name)!r}" in str(error.value)
  return str(error.value)


def save(path, values, mode=None):
  """One example as an image file of 256 levels."""
  image = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
  (image.convert(mode) if mode else image).save(path)


def to_bytes(values, levels):
  return np.round(values * (255 / (levels - 1))).astype(np.uint8)


@pytest.mark.parametrize("spec", [DIGITS, COLOUR, PLANE])
def test_examples_of_a_split_are_evenly_spread(spec):
  values = values_of(spec, 9)
  dataset = DataSet("own", {"test": {"image": values}}, Transform(spec.levels), 0)
  x = read("test", spec, 3, lambda: dataset)
  assert x.dtype == np.float32
  np.testing.assert_array_equal(x, dataset.transform.forward(jnp.asarray(values[[0, 3, 6]])))
  assert len(read("test", spec, 20, lambda: dataset)) == 9


@pytest.mark.parametrize("mode", [None, "L", "RGB", "RGBA"])
def test_an_image_file_has_the_levels_of_the_data(tmp_path, mode):
  """All 17 of them, through 256, from any mode that shows the same grey."""
  values = np.arange(24).reshape(4, 6, 1) % 17
  save(tmp_path / "digit.png", to_bytes(values, 17), mode)
  x = read(tmp_path / "digit.png", DIGITS)
  np.testing.assert_array_equal(x, -1 + (values[None].astype(np.float32) + 0.5) * (2 / 17))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
  values = values_of(COLOUR, 4)
  for name, image in zip(("b.png", "c.PNG", "a/z.png", "d.png"), values[[1, 2, 0, 3]]):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    save(tmp_path / name, image)
  (tmp_path / "notes.txt").write_text("no image")
  expected = -1 + (values.astype(np.float32) + 0.5) * np.float32(2 / 256)
  np.testing.assert_array_equal(read(tmp_path, COLOUR), expected)
  np.testing.assert_array_equal(read(tmp_path, COLOUR, 2), expected[[0, 2]])


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize("spec", [DIGITS, COLOUR, PLANE])
def test_arrays_hold_the_values_of_the_data(tmp_path, kind, spec):
  values, path = values_of(spec), tmp_path / f"inputs.{kind}"
  np.save(path, values) if kind == "npy" else np.savez(path, image=values, label=np.arange(5))
  expected = Transform(spec.levels).forward(jnp.asarray(values))
  np.testing.assert_array_equal(read(path, spec), expected)
  if spec is DIGITS:  # grey images need no axis of channels, as in data_sources.arrays
    np.save(tmp_path / "flat.npy", values[..., 0])
    np.testing.assert_array_equal(read(tmp_path / "flat.npy", spec), expected)


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_grey_is_for_colorization_only(tmp_path, kind):
  values, path = values_of(COLOUR, 1)[..., :1], tmp_path / f"grey.{kind}"
  save(path, values[0]) if kind == "png" else np.save(path, values)
  x = read(path, COLOUR, grey=True)
  expected = -1 + (values.astype(np.float32) + 0.5) * np.float32(2 / 256)
  np.testing.assert_array_equal(x, expected.repeat(3, -1))
  message = told(path, COLOUR)
  assert "grey, (4, 6, 1)" in message and "for the operator colorization" in message


def test_a_folder_may_mix_grey_and_colours(tmp_path):
  grey, colours = values_of(COLOUR, 2)
  save(tmp_path / "a.png", grey[..., :1])
  save(tmp_path / "b.png", colours)
  x = read(tmp_path, COLOUR, grey=True)
  assert (x[0] == x[0, ..., :1]).all() and (x[1] != x[1, ..., :1]).any()


def test_images_that_do_not_fit_are_told(tmp_path):
  path = tmp_path / "image.png"
  save(path, np.zeros((5, 8, 1), np.uint8))
  message = told(path, DIGITS)
  assert "(4, 6, 1); these have (5, 8, 1)" in message and "resize to 6x4 pixels" in message
  save(path, values_of(COLOUR, 1)[0])
  assert "a grey image, as the data are" in told(path, DIGITS)
  clear = np.zeros((4, 6, 4), np.uint8)
  save(path, clear)
  assert "an image without transparency" in told(path, COLOUR)
  Image.fromarray(np.zeros((4, 6), np.uint16)).save(path)
  assert "8 bits" in told(path, DIGITS) and "I;16" in told(path, DIGITS)
  path.write_bytes(b"no image")
  assert "an image file that can be read" in told(path, DIGITS)
  assert "of shape (2,) and 0 levels are no image files" in told(path, PLANE)


@pytest.mark.parametrize(
  ("spec", "values", "said"),
  [
    (DIGITS, np.full((2, 4, 6, 1), 17), "integers 0 .. 16; these are 17 .. 17"),
    (DIGITS, np.full((2, 4, 6, 1), -1), "integers 0 .. 16; these are -1 .. -1"),
    (DIGITS, np.zeros((2, 4, 6, 1)), "integers 0 .. 16; these are float64"),
    (DIGITS, np.zeros((2, 6, 4, 1), int), "(4, 6, 1); these have (6, 4, 1)"),
    (DIGITS, np.zeros((0, 4, 6, 1), int), "an array of examples"),
    (DIGITS, np.array(3), "an array of examples"),
    (PLANE, np.full((2, 2), np.nan), "finite numbers"),
    (PLANE, np.full((2, 2), "a"), "finite numbers; these are <U1"),
    (PLANE, np.zeros((2, 3)), "(2,); these have (3,)"),
  ],
)
def test_arrays_that_do_not_fit_are_told(tmp_path, spec, values, said):
  np.save(tmp_path / "inputs.npy", values)
  assert said in told(tmp_path / "inputs.npy", spec)


def test_what_is_not_there_is_told(tmp_path):
  message = told("tset", DIGITS)
  assert "one of the splits train, test, or the path" in message and "no such file" in message
  assert "a folder with images (.bmp" in told(tmp_path, DIGITS)
  (tmp_path / "inputs.npy").write_bytes(b"no array")
  assert "a file that numpy.load reads" in told(tmp_path / "inputs.npy", DIGITS)
  np.savez(tmp_path / "inputs.npz", x=values_of(DIGITS))
  assert "with the array 'image'; it has x" in told(tmp_path / "inputs.npz", DIGITS)


def columns_of(spec, n=3, k=4):
  x = np.asarray(Transform(spec.levels).forward(jnp.asarray(values_of(spec, n))))
  results = np.random.default_rng(1).normal(x[:, None], 0.2, (n, k, *spec.shape))
  return {
    "input": x,
    "results": results,
    "mean": results.mean(1),
    "standard deviation": results.std(1),
  }


@pytest.mark.parametrize(
  "spec", [DIGITS, COLOUR, PLANE, Spec((9,), 0), Spec((8, 2), 0), Spec((4, 6, 1), 0)]
)
def test_the_picture_is_drawn_of_any_data(tmp_path, spec):
  path = tmp_path / "samples" / "conditional.png"
  figures.save_conditional(path, columns_of(spec), Transform(spec.levels))
  assert np.asarray(Image.open(path)).std() > 10


def test_the_picture_has_a_row_for_each_input_and_a_title_for_each_column(tmp_path, monkeypatch):
  """Which of the images are dark; the standard deviation is white where it is greatest."""
  columns = {"input": np.ones((3, 60, 60, 1)), "results": np.ones((3, 2, 60, 60, 1))}
  columns["input"][0], columns["results"][1, 1] = -1, -1
  columns["standard deviation"] = 0.5 * columns["input"] + 0.5
  columns["standard deviation"][1] = 0.5
  titles, text = [], figures.plt.Axes.text
  write = lambda *args, **options: titles.append(args[3]) or text(*args, **options)
  monkeypatch.setattr(figures.plt.Axes, "text", write)
  figures.save_conditional(tmp_path / "grid.png", columns, Transform(256))
  assert [" ".join(title.split()) for title in titles] == [
    "input",
    "results",
    "standard deviation (white: 1)",
  ]
  image = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
  side, gap = 120, 24  # pixels of an enlarged image and between columns; borders have 4
  right = image.shape[1] - 4 - side
  lefts = [right - 8 - gap - 3 * side - 12 - gap, right - 8 - gap - 2 * side - 4]
  lefts += [lefts[1] + side + 4, right]
  tops = [image.shape[0] - (side + 4) * rows for rows in (3, 2, 1)]
  centre = slice(10, side - 10)
  shown = [[image[t:, x:][centre, centre].mean() for x in lefts] for t in tops]
  white, grey = 255, 127
  expected = [[0, white, white, 0], [white, white, 0, grey], [white, white, white, white]]
  np.testing.assert_allclose(shown, expected, atol=3)


def test_a_grid_of_continuous_images_is_not_inverted(tmp_path):
  """Without levels -1 is black and 1 is white."""
  x = np.stack([np.full((8, 8, 1), value, np.float32) for value in (-1, 1)])
  figures.save_grid(tmp_path / "grid.png", x, Transform(0), columns=2)
  picture = np.asarray(Image.open(tmp_path / "grid.png"))
  left, right = np.array_split(picture, 2, axis=1)
  middle = picture.shape[0] // 2
  assert left[middle, left.shape[1] // 2].max() == 0
  assert right[middle, right.shape[1] // 2].min() == 255
