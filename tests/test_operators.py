"""Linear operators: the identities of Moore and Penrose by explicit matrices, masks, what a user is
told whose operator or mask is wrong.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import operators
from errors import ConfigError
from operators import colour_basis, make_operator, read_mask

IMAGE, COLOUR = (4, 6, 1), (4, 6, 3)
CASES = [
  (IMAGE, "inpainting", {"mask": "lower_half"}),
  (COLOUR, "inpainting", {"mask": "box:1,2,2,3"}),
  ((5,), "inpainting", {"mask": "box:1,2"}),
  ((6, 2), "inpainting", {"mask": "random:0.5:3"}),
  ((2, 3, 4, 1), "inpainting", {"mask": "box:0,0,0,1,2,3"}),
  (COLOUR, "colorization", {}),
  (COLOUR, "super_resolution", {"factor": 2}),
  ((6,), "super_resolution", {"factor": 3}),
  ((6, 2), "super_resolution", {"factor": 2}),
  ((2, 4, 2, 2), "super_resolution", {"factor": 2}),
  (COLOUR, "deblurring", {"blur_std": 1.0}),
  ((5, 7, 1), "deblurring", {"blur_std": 0.4}),
  ((7,), "deblurring", {"blur_std": 2.0}),
  ((8, 2), "deblurring", {"blur_std": 1.0}),
  ((2, 3, 4, 1), "deblurring", {"blur_std": 0.5}),
]
IDS = [f"{name}-{'x'.join(map(str, shape))}" for shape, name, _ in CASES]


def matrix(function, shape):
  """The matrix [m, d] of a linear function of examples."""
  size = int(np.prod(shape))
  columns = function(jnp.eye(size).reshape(size, *shape))
  return np.asarray(columns).reshape(size, -1).T


def matrices(shape, name, options):
  operator = make_operator(name, shape, **options)
  measured = jax.eval_shape(operator.forward, jnp.zeros((1, *shape))).shape[1:]
  return matrix(operator.forward, shape), matrix(operator.pseudo_inverse, measured)


@pytest.mark.parametrize(("shape", "name", "options"), CASES, ids=IDS)
def test_the_inverse_is_that_of_moore_and_penrose(x64, shape, name, options):
  """Both by the four identities and as numpy computes it from the singular values."""
  a, inverse = matrices(shape, name, options)
  np.testing.assert_allclose(a @ inverse @ a, a, atol=1e-12)
  np.testing.assert_allclose(inverse @ a @ inverse, inverse, atol=1e-10)
  np.testing.assert_allclose(a @ inverse, (a @ inverse).T, atol=1e-12)
  np.testing.assert_allclose(inverse @ a, (inverse @ a).T, atol=1e-12)
  np.testing.assert_allclose(inverse, np.linalg.pinv(a, rcond=1e-6), atol=1e-9)
  assert 0 < np.linalg.matrix_rank(a, tol=1e-6) < a.shape[1] or name == "deblurring"


@pytest.mark.parametrize(("shape", "name", "options"), CASES[1::3], ids=IDS[1::3])
def test_functions_are_linear_under_jit_gradient_and_transpose(shape, name, options):
  """In float32: A(a x + b z) = a A x + b A z, and the gradient of ||A x||^2 / 2 is A^T A x."""
  operator = make_operator(name, shape, **options)
  x, z = np.random.default_rng(0).standard_normal((2, 3, *shape)).astype(np.float32)
  forward = jax.jit(operator.forward)
  y = forward(x)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(forward(2 * x - 3 * z), 2 * y - 3 * forward(z), atol=1e-5)
  transposed = jax.jit(lambda y: jax.linear_transpose(operator.forward, x)(y)[0])(y)
  gradient = jax.grad(lambda x: 0.5 * (operator.forward(x) ** 2).sum())(x)
  np.testing.assert_allclose(gradient, transposed, atol=1e-5)
  np.testing.assert_allclose((transposed * z).sum(), (y * forward(z)).sum(), rtol=2e-4, atol=1e-4)
  inverse = jax.jit(operator.pseudo_inverse)
  np.testing.assert_allclose(forward(inverse(y)), y, atol=1e-5)
  assert inverse(y).shape == x.shape


@pytest.mark.parametrize("mask", ["lower_half", "box:1,1,3,3", "random:0.3"])
def test_known_pixels_are_bit_equal_and_missing_ones_untouched(mask):
  operator = make_operator("inpainting", (8, 8, 3), mask=mask)
  rng = np.random.default_rng(1)
  given, x = (rng.standard_normal((2, 5, 8, 8, 3)) * 10.0 ** rng.integers(-6, 6)).astype("f4")

  @jax.jit
  def merged(y, x):
    return operator.pseudo_inverse(y) + (x - operator.pseudo_inverse(operator.forward(x)))

  found = np.asarray(merged(operator.forward(given), x))
  known = np.broadcast_to(read_mask(mask, (8, 8, 3)), (5, 8, 8, 3))
  np.testing.assert_array_equal(found[known], given[known])
  np.testing.assert_array_equal(found[~known], x[~known])


def test_missing_values_do_not_reach_the_measurement():
  """Not even as NaN, which a product with zero would keep."""
  operator = make_operator("inpainting", (4, 4, 1), mask="lower_half")
  x = np.ones((1, 4, 4, 1), np.float32)
  x[:, 2:] = np.nan
  np.testing.assert_array_equal(operator.forward(x)[0, :, :, 0], [[1] * 4] * 2 + [[0] * 4] * 2)


def test_the_colour_basis_is_orthonormal_and_begins_with_grey():
  basis = colour_basis()
  assert basis.dtype == np.float64
  np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=4 * np.finfo(float).eps)
  np.testing.assert_allclose(basis[:, 0], np.full(3, 3**-0.5), rtol=1e-15)


def test_grey_pictures_survive_colorization():
  """A grey picture is measured whole; of a coloured one the grey channel stays to 1e-6."""
  operator = make_operator("colorization", (5, 5, 3))
  rng = np.random.default_rng(2)
  grey = rng.uniform(-1, 1, (2, 5, 5, 1)).astype(np.float32).repeat(3, -1)
  y = operator.forward(grey)
  np.testing.assert_allclose(y, np.sqrt(3) * grey[..., :1], atol=1e-6)
  np.testing.assert_allclose(operator.pseudo_inverse(y), grey, atol=1e-6)
  x = rng.uniform(-1, 1, grey.shape).astype(np.float32)
  merged = operator.pseudo_inverse(y) + (x - operator.pseudo_inverse(operator.forward(x)))
  np.testing.assert_allclose(merged.mean(-1), grey[..., 0], atol=1e-6)
  assert abs(merged - grey).max() > 0.1  # the colours are those of x


def test_super_resolution_averages_blocks():
  operator = make_operator("super_resolution", (2, 4, 1), factor=2)
  x = jnp.arange(8.0).reshape(1, 2, 4, 1)
  y = operator.forward(x)
  np.testing.assert_allclose(y[0, ..., 0], [[2.5, 4.5]])
  np.testing.assert_allclose(operator.pseudo_inverse(y)[0, ..., 0], [[2.5, 2.5, 4.5, 4.5]] * 2)


def test_deblurring_is_a_wrapped_gaussian_but_for_what_is_lost(x64):
  """The answer to one point has the spectrum of the density, of gains above the least one."""
  std, n, least = 1.2, 16, operators.LEAST_GAIN
  operator = make_operator("deblurring", (n, n, 1), blur_std=std)
  point = jnp.zeros((1, n, n, 1)).at[0, 3, 5, 0].set(1.0)
  distance = lambda at: np.arange(n)[:, None] - at + n * np.arange(-3, 4)
  density = lambda at: (np.exp(-0.5 * (distance(at) / std) ** 2) / np.sqrt(2 * np.pi) / std).sum(1)
  expected = np.fft.fft2(np.outer(density(3), density(5)))
  expected[abs(expected) < least] = 0
  found = np.fft.fft2(operator.forward(point)[0, ..., 0])
  np.testing.assert_allclose(found, expected, atol=1e-4)  # sampling folds what lies above Nyquist
  assert 0 < (expected == 0).sum() < n * n

  a, inverse = matrices((n,), "deblurring", {"blur_std": std})
  gains = np.linalg.svd(a, compute_uv=False)
  assert gains[gains > 1e-9].min() >= least and np.linalg.norm(inverse, 2) <= 1 / least


SHOWN = {
  "upper_half": ["....", "....", "####"],
  "lower_half": ["####", "....", "...."],
  "left_half": ["..##", "..##", "..##"],
  "right_half": ["##..", "##..", "##.."],
  "box:1,0,2,3": ["####", "...#", "...#"],
}


@pytest.mark.parametrize("mask", SHOWN)
def test_a_mask_is_named_by_what_is_missing(mask):
  """Halves of four rows: the middle row of three belongs to the lower half."""
  rows = SHOWN[mask]
  if mask == "upper_half":
    rows = ["....", "####", "####"]
  known = read_mask(mask, (3, 4, 2))
  assert known.shape == (3, 4, 1) and known.dtype == bool
  np.testing.assert_array_equal(known[..., 0], [[c == "#" for c in row] for row in rows])


def test_random_masks_have_their_share_and_depend_on_the_seed_alone():
  first, other = read_mask("random:0.75", (8, 8, 3)), read_mask("random:0.75:1", (8, 8, 3))
  assert first.shape == (8, 8, 1)
  assert (~first).sum() == (~other).sum() == 48
  np.testing.assert_array_equal(first, read_mask("random:0.75:0", (8, 8, 3)))
  assert (first != other).any()
  assert read_mask("random:0.5", (6,)).shape == (6,)
  assert read_mask("random:0.5", (6, 2)).shape == (6, 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_picture_of_any_mode_is_a_mask(tmp_path, mode):
  """White known, black missing, greys by the nearer one."""
  levels = np.array(
    [[0, 255, 255], [255, 0, 255]] if mode == "1" else [[0, 128, 255], [200, 127, 255]]
  )
  if mode == "I;16":
    image = Image.fromarray((levels * 257).astype(np.uint16))
  else:
    image = Image.fromarray(levels.astype(np.uint8)).convert(mode)
  assert image.mode == mode
  image.save(tmp_path / "mask.png")
  known = read_mask(str(tmp_path / "mask.png"), (2, 3, 1))
  np.testing.assert_array_equal(known[..., 0], [[0, 1, 1], [1, 0, 1]])


def test_transparent_is_missing(tmp_path):
  pixels = np.full((2, 2, 4), 255, np.uint8)
  pixels[0, 1, 3] = 0
  Image.fromarray(pixels).save(tmp_path / "mask.png")
  known = read_mask(str(tmp_path / "mask.png"), (2, 2, 3))
  np.testing.assert_array_equal(known[..., 0], [[1, 0], [1, 1]])


def told(function, *args, **options):
  """The message of the `ConfigError` that this raises."""
  with pytest.raises(ConfigError) as error:
    function(*args, **options)
  return str(error.value)


@pytest.mark.parametrize(
  ("mask", "shape", "said"),
  [
    ("lower_half", (6,), "halves are those of images"),
    ("lower_half:2", IMAGE, "'lower_half' alone"),
    ("box:1,2,2", IMAGE, "box:top,left,height,width, 4 whole numbers"),
    ("box", IMAGE, "box:top,left,height,width"),
    ("box:a,0,1,1", IMAGE, "4 whole numbers"),
    ("box:3,0,2,2", IMAGE, "within the (4, 6) positions"),
    ("box:-1,0,2,2", IMAGE, "within the (4, 6) positions"),
    ("box:0,0,0,2", IMAGE, "within the (4, 6) positions"),
    ("box:0,0,1,1", (6,), "2 whole numbers of a box within the (6,) positions"),
    ("box:0,0,4,6", IMAGE, "all are missing"),
    ("random:0", IMAGE, "a share between 0 and 1"),
    ("random:1.5", IMAGE, "a share between 0 and 1"),
    ("random:nan", IMAGE, "a share between 0 and 1"),
    ("random", IMAGE, "random:share:seed"),
    ("random:0.5:x", IMAGE, "random:share:seed"),
    ("random:0.5:-1", IMAGE, "random:share:seed"),
    ("random:0.001", IMAGE, "all are known"),
    ("random:0.999", IMAGE, "all are missing"),
    ("upper half", IMAGE, "or the path of a PNG; no such file"),
  ],
)
def test_a_mask_that_is_none_is_told(mask, shape, said):
  message = told(make_operator, "inpainting", shape, mask=mask)
  assert said in message and repr(mask) in message
  assert "guidance.operators.inpainting.mask" in message


def test_a_file_that_is_no_mask_is_told(tmp_path):
  path = tmp_path / "mask.png"
  path.write_bytes(b"no picture")
  assert "an image file that can be read" in told(read_mask, str(path), IMAGE)
  Image.new("L", (8, 5), 255).save(path)
  message = told(read_mask, str(path), IMAGE)
  assert "6x4 pixels; it has 8x5" in message and "resize it to 6x4" in message
  Image.new("L", (6, 4), 255).save(path)
  assert "all are known" in told(read_mask, str(path), IMAGE)
  assert "for images only" in told(read_mask, str(path), (6,))


@pytest.mark.parametrize(
  ("name", "shape", "options", "said"),
  [
    ("blur", IMAGE, {}, "'deblurring', 'inpainting', 'super_resolution', or 'module:function'"),
    ("colorization", IMAGE, {}, "3 channels: colorization needs them; these examples have shape"),
    ("colorization", (3,), {}, "3 channels"),
    ("colorization", COLOUR, {"factor": 2}, "guidance.operators.colorization.factor is not an"),
    ("inpainting", IMAGE, {}, "guidance.operators.inpainting.mask is missing"),
    ("inpainting", IMAGE, {"mask": "lower_half", "box": 1}, "legal: mask"),
    ("super_resolution", (12, 12, 1), {"factor": 5}, "the nearest are 4 and 6"),
    ("super_resolution", (12, 12, 1), {"factor": 1}, "the nearest are 2"),
    ("super_resolution", (12, 7, 1), {"factor": 2}, "there is none"),
    ("super_resolution", (12, 12, 1), {"factor": -3}, "the nearest are 2"),
    ("deblurring", IMAGE, {"blur_std": 0.0}, "a number of positions above 0"),
    ("deblurring", IMAGE, {"blur_std": float("nan")}, "a number of positions above 0"),
  ],
)
def test_an_operator_that_cannot_be_is_told(name, shape, options, said):
  assert said in told(make_operator, name, shape, **options)


USERS = """
import jax, jax.numpy as jnp
import numpy as np

def flipped_half(shape):
  n = shape[0] // 2
  return lambda x: x[:, :n][:, ::-1], lambda y: jnp.concatenate([y[:, ::-1], 0 * y], 1)

same = lambda x: x
half = lambda shape: np.r_[np.ones(shape[0] // 2), np.zeros(shape[0] - shape[0] // 2)][None]
not_a_function = 3
one = lambda shape: same
affine = lambda shape: (lambda x: x + 1, lambda y: y - 1)
absolute = lambda shape: (abs, same)
wrong_scale = lambda shape: (lambda x: 2 * x, same)
mixes = lambda shape: (lambda x: x - x.mean(0, keepdims=True), same)
wide = lambda shape: (lambda x: x, lambda y: y[:, :1])
sums = lambda shape: (lambda x: x.sum(), same)
host = lambda shape: (lambda x: np.fft.fft(x).real, same)
nans = lambda shape: (lambda x: x * float("nan"), same)
tall = lambda shape: (lambda x: x.astype(jnp.float16), same)
leaves = lambda shape: (lambda x: jnp.asarray(half(shape), "f4") * x, same)
oblique = lambda shape: (lambda x: x[:, :1], lambda y: jnp.concatenate([y] * shape[0], 1))
skewed = lambda shape: (
  lambda x: jnp.concatenate([x[:, :1]] * 2, 1),
  lambda y: jnp.concatenate([y[:, :1]] + [0 * y[:, :1]] * (shape[0] - 1), 1),
)
bent = lambda shape: (lambda x: x[:, :1], lambda y: jnp.pad(jnp.maximum(y, 0), ((0, 0), (0, 3))))

@jax.custom_vjp
def once(x):
  return 2 * x

once.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
no_transpose = lambda shape: (once, lambda y: y / 2)
"""
WRONG = {
  "missing": "has no attribute 'missing'",
  "one": "two functions; it returns",
  "affine": "forward is linear",
  "absolute": "forward is linear",
  "wrong_scale": "A A^+ A = A",
  "mixes": "forward treats each example alone",
  "wide": "pseudo_inverse: [b, *(4,)] -> [b, *(4,)]; it returns [b, *(1,)]",
  "sums": "forward returns",
  "host": "jax can trace; forward fails: TracerArrayConversionError",
  "nans": "forward is linear",
  "tall": "one of float32",
  "leaves": "A^+ A A^+ = A^+",
  "oblique": "A^+ A is symmetric",
  "skewed": "A A^+ is symmetric",
  "bent": "pseudo_inverse is linear",
  "no_transpose": "jax.linear_transpose of forward",
}


@pytest.fixture
def users(tmp_path, monkeypatch):
  (tmp_path / "users_operators.py").write_text(USERS)
  monkeypatch.syspath_prepend(tmp_path)
  return lambda name, shape=(4,), **options: make_operator(
    f"users_operators:{name}", shape, **options
  )


def test_a_users_operator_is_two_functions(users):
  operator = users("flipped_half", (6, 2))
  x = jnp.arange(12.0).reshape(1, 6, 2)
  np.testing.assert_array_equal(operator.forward(x)[0], x[0, 2::-1])
  np.testing.assert_array_equal(operator.pseudo_inverse(operator.forward(x))[0, :3], x[0, :3])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_users_operator_is_told(users, name):
  assert WRONG[name] in told(users, name)


def test_a_users_operator_that_cannot_be_had_is_told(users):
  assert "No module named" in told(make_operator, "no_such_module:f", IMAGE)
  assert "none: what a user's operator needs" in told(users, "flipped_half", factor=2)


def test_a_box_misses_exactly_itself():
  """Every box within 3x3 positions misses exactly its own."""
  for top, left, height, width in itertools.product(range(3), range(3), range(1, 4), range(1, 4)):
    inside = top + height <= 3 and left + width <= 3 and height * width < 9
    if inside:
      missing = ~read_mask(f"box:{top},{left},{height},{width}", (3, 3, 1))[..., 0]
      assert missing.sum() == height * width
      assert missing[top : top + height, left : left + width].all()
