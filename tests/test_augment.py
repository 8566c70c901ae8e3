"""Flips; the augmentation that the network is told; the network that is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from augment import affine, augment, draw_conditions, flip, transform
from models import adm, ddpm, ncsnpp, unet1d
from parameterization import make_noise_fn
from sde_lib import example_keys, make_sde

KEY = jax.random.key(0)
SIZE = (9, 14)  # height and width
IMAGES = np.random.default_rng(0).normal(size=(6, *SIZE, 2)).astype(np.float32)
NAMES = ("x_flip", "y_flip", "scale", "cos", "sin", "along", "tilted", "right", "down")
PROBABILITY = 0.3
run = jax.jit(transform)
augmented = jax.jit(augment)


def told(**changes):
  """The conditions [1, 9] that are zero but for `changes`; "cos" means cos - 1."""
  return jnp.array([[float(changes.get(name, 0)) for name in NAMES]])


def changed(image, **changes):
  return np.asarray(run(jnp.asarray(image)[None], told(**changes))[0])


def rotation(angle):
  return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def published(conditions, size=SIZE):
  """(A, d) of the map from the coordinates of the result to those of the image, composed of its
  parts in the order of the published code, float64.
  """
  x_flip, y_flip, scale, cos, sin, along, tilted, *shift = np.asarray(conditions, np.float64)
  w = np.hypot(along, tilted) * (-1 if along < 0 else 1)
  tilt = np.arctan(tilted / along) if along else 0.0
  linear = np.diag([1 - 2 * x_flip, 1 - 2 * y_flip]) / 2 ** (0.2 * scale)
  linear = linear @ rotation(np.arctan2(sin, 1 + cos))
  squeeze = np.diag([2 ** (-0.2 * w), 2 ** (0.2 * w)])
  linear = linear @ rotation(-tilt) @ squeeze @ rotation(tilt)
  return linear, -linear @ (np.array(size[::-1]) / 8 * shift)


def grid(height, width):
  """Coordinates [h, w, 2] to the right and down, from the centre."""
  y, x = np.mgrid[:height, :width]
  return np.stack([x - (width - 1) / 2, y - (height - 1) / 2], -1)


@functools.cache
def drawn(probability, n=40_000):
  """Conditions [n, 9] as the augmentation draws them."""
  draw = jax.vmap(lambda key: draw_conditions(key, probability))
  return np.asarray(jax.jit(draw)(example_keys(KEY, n)))


def within(found, expected, std, n):
  """Whether a mean of n draws is at its expectation, to five standard errors."""
  return abs(found - expected) < 5 * std / np.sqrt(n)


def test_a_flip_mirrors_or_keeps_each_image_by_a_fair_coin():
  x = jnp.arange(2000 * 2 * 3).reshape(2000, 2, 3, 1)
  out = np.asarray(flip(KEY, x))
  flipped = (out == x[:, :, ::-1]).all((1, 2, 3))
  assert out.dtype == x.dtype and ((out == x).all((1, 2, 3)) ^ flipped).all()
  assert within(flipped.mean(), 0.5, 0.5, 2000)
  np.testing.assert_array_equal(flip(KEY, flip(KEY, x)), x)
  np.testing.assert_array_equal(flip(example_keys(KEY, 2000)[7:9], x[7:9]), out[7:9])


def test_without_augmentation_nothing_happens():
  x, conditions = augmented(KEY, IMAGES, 0.0)
  np.testing.assert_array_equal(x, IMAGES)
  assert conditions.shape == (6, 9) and not np.asarray(conditions).any()


def test_images_whose_conditions_are_zero_are_returned_bit_for_bit():
  x = np.random.default_rng(1).normal(size=(200, *SIZE, 1)).astype(np.float32)
  out, conditions = augmented(KEY, x, 0.12)
  still = ~np.asarray(conditions).any(1)
  assert 0.1 < still.mean() < 0.5
  np.testing.assert_array_equal(np.asarray(out)[still], x[still])
  assert (np.asarray(out) != x)[~still].any((1, 2, 3)).all()


def test_an_image_is_changed_by_its_key_alone():
  keys = example_keys(KEY, 6)
  whole, conditions = augmented(KEY, IMAGES, 0.9)
  part, of_part = augmented(keys[2:5], IMAGES[2:5], 0.9)
  np.testing.assert_array_equal(of_part, conditions[2:5])
  np.testing.assert_allclose(part, whole[2:5], atol=1e-6)


@pytest.mark.parametrize(
  "changes, permute",
  [
    ({"x_flip": 1}, lambda x: x[:, ::-1]),
    ({"y_flip": 1}, lambda x: x[::-1]),
    ({"cos": -2}, lambda x: x[::-1, ::-1]),
    ({"x_flip": 1, "cos": -2}, lambda x: x[::-1]),
  ],
)
def test_flips_and_half_turns_are_exact(changes, permute):
  np.testing.assert_array_equal(changed(IMAGES[0], **changes), permute(IMAGES[0]))


@pytest.mark.parametrize("quarters", [1, -1])
def test_quarter_turns_are_exact_and_counter_clockwise(quarters):
  square = IMAGES[0][:9, :9]
  turned = np.rot90(square, quarters)
  np.testing.assert_array_equal(changed(square, cos=-1, sin=quarters), turned)
  mirrored_first = np.rot90(square[:, ::-1], quarters)
  np.testing.assert_array_equal(changed(square, x_flip=1, cos=-1, sin=quarters), mirrored_first)


def test_whole_pixels_are_shifted_exactly_and_reflected_at_the_border():
  image = IMAGES[0][:8, :8]
  padded = np.pad(image, ((0, 2), (3, 0), (0, 0)), mode="reflect")
  np.testing.assert_array_equal(changed(image, right=3, down=-2), padded[2:, :8])
  np.testing.assert_array_equal(changed(image, right=14), image)  # twice 8 - 1 pixels: a period


@pytest.mark.parametrize("size", [(9, 14), (1, 5)])
def test_a_constant_stays_constant(size):
  image, conditions = np.full((50, *size, 1), 0.7, np.float32), drawn(1.0)[:50]
  np.testing.assert_allclose(run(image, conditions), image, atol=1e-6)


def parabola(x):
  """[..., 2] -> [..., 1]."""
  return 0.2 + x @ [[0.3], [-0.2]] + x**2 @ [[0.02], [-0.01]] + 0.01 * x[..., :1] * x[..., 1:]


def inside(places, size):
  """Places whose neighbourhood of 4x4 pixels does not reach over the border."""
  return (np.abs(places) <= np.array([(n - 1) / 2 - 1 for n in size[::-1]])).all(-1)


@pytest.mark.parametrize("i", range(4))
def test_a_parabola_becomes_the_parabola_of_the_published_map(i):
  conditions = np.array(drawn(1.0)[i])
  conditions[2] = 3 + abs(conditions[2])  # enlarged: the filter is not widened, so exact
  size = (24, 30)
  linear, shift = published(conditions, size)
  places = grid(*size) @ linear.T + shift
  image = parabola(grid(*size)).astype(np.float32)
  out, seen = run(image[None], conditions[None])[0], inside(places, size)
  assert seen.sum() > 50
  np.testing.assert_allclose(out[seen], parabola(places)[seen], atol=2e-5)


def test_the_map_is_the_published_one():
  conditions = drawn(1.0)[:500]
  maps = jax.vmap(lambda c: affine(c, *SIZE))(conditions)
  for *ours, theirs in zip(*maps, map(published, conditions)):
    for a, b in zip(ours, theirs):
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_shrinking_is_that_of_antialiased_cubic_resizing():
  image = np.random.default_rng(2).normal(size=(32, 32, 1)).astype(np.float32)
  half = jax.image.resize(image, (16, 16, 1), "cubic", antialias=True)
  np.testing.assert_allclose(changed(image, scale=-5)[10:22, 10:22], half[2:-2, 2:-2], atol=1e-5)
  narrow = jax.image.resize(image, (32, 16, 1), "cubic", antialias=True)
  wide = jax.image.resize(image, (64, 16, 1), "cubic", antialias=True)[16:48]
  out = changed(image, along=-5)
  assert np.abs(out[4:28, 10:22] - narrow[4:28, 2:-2]).max() > 0.1
  np.testing.assert_allclose(out[4:28, 10:22], wide[4:28, 2:-2], atol=1e-5)


def test_each_transformation_happens_with_the_probability_and_law_given():
  n, conditions = 40_000, drawn(PROBABILITY)
  x_flip, y_flip, scale, cos, sin, along, tilted, right, down = conditions.T
  assert set(x_flip) == set(y_flip) == {0, 1}
  assert within(x_flip.mean(), 0.5, 0.5, n) and within(y_flip.mean(), PROBABILITY / 2, 0.5, n)
  np.testing.assert_array_equal(right != 0, down != 0)
  np.testing.assert_allclose((1 + cos) ** 2 + sin**2, 1, atol=1e-6)
  happens = np.stack([y_flip == 1, scale != 0, sin != 0, along != 0, right != 0])
  for event in happens[1:]:
    assert within(event.mean(), PROBABILITY, 0.5, n)
  chances = np.cov(happens)
  assert np.abs(chances - np.diag(np.diag(chances))).max() < 5 * 0.21 / np.sqrt(n)
  for w in (scale, right, down, np.hypot(along, tilted)):
    assert within((w[w != 0] ** 2).mean(), 1, np.sqrt(2), PROBABILITY * n)
  axis = np.arctan2(tilted, along)[along != 0] % np.pi
  assert within((tilted[along != 0] != 0).mean(), 0.5, 0.5, PROBABILITY * n)
  for angle in (np.arctan2(sin, 1 + cos)[sin != 0], 2 * axis[tilted[along != 0] != 0]):
    for k in (1, 2):
      assert within(np.cos(k * angle).mean(), 0, 0.7, len(angle))
      assert within(np.sin(k * angle).mean(), 0, 0.7, len(angle))


TINY = {"nf": 8, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": (), "dropout": 0.0}
NETWORKS = {
  "ncsnpp": ncsnpp.Model(**TINY, embedding_type="positional"),
  "adm": adm.Model(**TINY, learned_variance=False),
  "ddpm": ddpm.Model(**TINY),
  "unet1d": unet1d.Model(**TINY),
}
networks = pytest.mark.parametrize("name", NETWORKS)
FAST = {"xla_backend_optimization_level": "0"}


def data_of(name):
  """Examples [2, ...] and their conditions."""
  shape = (2, 8, 3) if name == "unet1d" else (2, 8, 8, 3)
  return jax.random.normal(KEY, shape), jnp.array([5.0, 700.0]), jnp.asarray(drawn(1.0)[:2])


def parameters(model, x, c_noise):
  """Abstract parameters by their paths, and random ones: the initial ones give zero."""
  abstract = jax.eval_shape(model.init, KEY, x, c_noise)["params"]
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
  return dict(jax.tree_util.tree_leaves_with_path(abstract)), jax.tree.map(draw, abstract)


@networks
def test_a_network_is_told_how_its_images_were_augmented(name):
  x, c_noise, conditions = data_of(name)
  model = NETWORKS[name].clone(augment_dim=9)
  leaves, params = parameters(model, x, c_noise)
  plain, _ = parameters(NETWORKS[name], x, c_noise)
  (extra,) = leaves.keys() - plain.keys()
  assert jax.tree_util.keystr(extra) == "['augmentation']['kernel']"
  assert leaves[extra].shape == (9, 8) and all(leaves[k] == plain[k] for k in plain)
  apply = lambda c: model.apply({"params": params}, x, c_noise, augmentation=c)
  outputs = lambda: (apply(None), apply(0 * conditions), apply(conditions))
  none, zero, some = jax.jit(outputs, compiler_options=FAST)()
  np.testing.assert_array_equal(none, zero)
  assert (np.abs(some - none).max(tuple(range(1, x.ndim))) > 1e-3).all()
  without = {k: v for k, v in params.items() if k != "augmentation"}
  bare = jax.jit(lambda: NETWORKS[name].apply({"params": without}, x, c_noise))
  np.testing.assert_allclose(bare(), none, atol=1e-5)


@networks
def test_conditions_for_a_network_that_takes_none(name):
  x, c_noise, conditions = data_of(name)
  for model in (NETWORKS[name], NETWORKS[name].clone(augment_dim=4)):
    with pytest.raises(ValueError, match=r"set model\.args\.augment_dim=9"):
      jax.eval_shape(functools.partial(model.init, augmentation=conditions), KEY, x, c_noise)
  if hasattr(model, "conditional"):
    blind = model.clone(conditional=False, augment_dim=9)
    with pytest.raises(ValueError, match=r"model\.args\.conditional=True"):
      jax.eval_shape(functools.partial(blind.init, augmentation=conditions), KEY, x, c_noise)


def test_conditions_join_the_network_where_its_classes_do():
  """Both are linear maps of vectors: of the conditions, and of sqrt(n) times the label's unit
  vector, with equal kernels here.
  """
  x, c_noise, _ = data_of("ncsnpp")
  model = NETWORKS["ncsnpp"].clone(augment_dim=9, num_classes=9, classes_first=True)
  _, params = parameters(model, x, c_noise)
  params["augmentation"] = {"kernel": params["classes"]["kernel"]}
  labels = jnp.array([3, 8])
  apply = lambda labels, c: model.apply({"params": params}, x, c_noise, labels, augmentation=c)
  outputs = lambda: (apply(labels, None), apply(None, 3 * jax.nn.one_hot(labels, 9)))
  by_label, by_condition = jax.jit(outputs, compiler_options=FAST)()
  np.testing.assert_allclose(by_label, by_condition, rtol=1e-4, atol=1e-4)


def test_the_noise_prediction_passes_the_conditions_on():
  x, t, conditions = data_of("ddpm")[0], jnp.array([0.2, 0.9]), jnp.asarray(drawn(1.0)[:2])
  model, sde = NETWORKS["ddpm"].clone(augment_dim=9), make_sde("vp")
  _, params = parameters(model, x, t)
  noise_fn = make_noise_fn(
    sde, model, params, output="noise", c_noise="t999", inputs={"augmentation": conditions}
  )
  direct = lambda: model.apply({"params": params}, x, 999 * t, augmentation=conditions)
  found, expected = jax.jit(lambda: (noise_fn(x, t), direct()), compiler_options=FAST)()
  np.testing.assert_array_equal(found, expected)
