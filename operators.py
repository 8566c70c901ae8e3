"""Linear measurements y = A x_0 of examples, with A and its Moore-Penrose inverse A^+ as functions.

A^+ A projects on what is measured: A^+ y + (I - A^+ A) x agrees with the measurement y and keeps
the rest of x (Wang et al. 2023, "Zero-shot image restoration using denoising diffusion null-space
model"). All axes of an example but the last, its channels, are positions; a vector has one
axis of positions and no channels.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from errors import ConfigError, check, invalid, users_function

FIELD = "guidance.operator"
MASK = "guidance.operators.inpainting.mask"
TOLERANCE = 1e-4  # of the identities that a user's operator is tested by
LEAST_GAIN = 1e-2  # of a frequency that still counts as measured
Shape = tuple[int, ...]


class Operator(NamedTuple):
  """A linear measurement y = A x_0 of examples, of each of a batch the same.

  Args:
    forward: A, x [b, *d] -> y [b, *m].
    pseudo_inverse: A^+, y [b, *m] -> x [b, *d].
  """

  forward: Callable
  pseudo_inverse: Callable


def make_operator(name: str, shape: Shape, **options) -> Operator:
  """The operator `OPERATORS[name](shape, **options)` on examples of `shape`, or a user's own.

  A user's is "module:function", a function of the shape to the pair (forward, pseudo_inverse); it
  is tested on random examples. What is wrong with name, options or functions is a `ConfigError`.
  """
  if ":" in name:
    legal = "none: what a user's operator needs stands in its own module"
    check(not options, f"guidance.operators.{name}", options, legal)
    return _users(name, shape)
  legal = f"{', '.join(map(repr, sorted(OPERATORS)))}, or 'module:function' of your own"
  check(name in OPERATORS, FIELD, name, legal)
  _check_options(name, options)
  return OPERATORS[name](shape, **options)


def _check_options(name: str, options: dict) -> None:
  """Raises unless exactly the options of the operator are given."""
  wanted = list(inspect.signature(OPERATORS[name]).parameters)[1:]
  legal = f"\n  legal: {', '.join(wanted) or 'it has none'}"
  for option in sorted(options.keys() - set(wanted)):
    raise ConfigError(f"guidance.operators.{name}.{option} is not an option of {name!r}.{legal}")
  for option in wanted:
    if option not in options:
      raise ConfigError(f"guidance.operators.{name}.{option} is missing.{legal}")


def _positions(shape: Shape) -> Shape:
  """The axes of an example besides its channels."""
  return shape[:-1] or shape


def inpainting(shape: Shape, mask: str) -> Operator:
  """Known values stay, missing ones become 0: y [b, *d] (Song et al. 2021, appendix I.2). The mask
  is one that `read_mask` reads.
  """
  known = read_mask(mask, shape)[None]
  keep = lambda x: jnp.where(known, x, 0)  # unlike a product it keeps no NaN of what is missing
  return Operator(keep, keep)


def colour_basis() -> Float[np.ndarray, "3 3"]:
  """Orthonormal colours, the columns of a matrix: the first is grey, (1, 1, 1) / sqrt(3) (Song et
  al. 2021, appendix I.3), in float64.
  """
  q, r = np.linalg.qr(np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
  return q * np.sign(np.diag(r))


def colorization(shape: Shape) -> Operator:
  """The grey channel in `colour_basis`: x [b, h, w, 3] -> y [b, h, w, 1], sqrt(3) times the mean of
  red, green and blue (Song et al. 2021, appendix I.3).
  """
  legal = f"for images of 3 channels: colorization needs them; these examples have shape {shape}"
  check(len(shape) > 2 and shape[-1] == 3, FIELD, "colorization", legal)
  grey = colour_basis()[:, :1]
  product = functools.partial(jnp.matmul, precision="highest")
  return Operator(
    lambda x: product(x, jnp.asarray(grey, x.dtype)),
    lambda y: product(y, jnp.asarray(grey.T, y.dtype)),
  )


def super_resolution(shape: Shape, factor: int) -> Operator:
  """Means of blocks of `factor` positions along each axis; A^+ repeats them (Wang et al. 2023).
  Of images x [b, h, w, c] -> y [b, h / factor, w / factor, c].
  """
  sides = _positions(shape)
  _check_factor(factor, sides)
  split = [n for side in sides for n in (side // factor, factor)]
  within = tuple(range(2, 2 * len(sides) + 1, 2))

  def forward(x):
    return x.reshape(len(x), *split, *x.shape[len(sides) + 1 :]).mean(within)

  def pseudo_inverse(y):
    for axis in range(1, len(sides) + 1):
      y = jnp.repeat(y, factor, axis)
    return y

  return Operator(forward, pseudo_inverse)


def _check_factor(factor: int, sides: Shape) -> None:
  """Raises, with the nearest legal factors, unless the factor divides all sides."""
  good = [n for n in range(2, min(sides) + 1) if all(side % n == 0 for side in sides)]
  nearest = [*[n for n in good if n < factor][-1:], *[n for n in good if n > factor][:1]]
  near = f"the nearest are {' and '.join(map(str, nearest))}" if nearest else "there is none"
  legal = f"a whole number above 1 that divides the sides {sides} of the examples; {near}"
  check(factor in good, "guidance.operators.super_resolution.factor", factor, legal)


def deblurring(shape: Shape, blur_std: float) -> Operator:
  """Convolution with a Gaussian of `blur_std` positions, periodic at the borders: x [b, *d] -> y
  [b, *d], frequency f of gain exp(-2 pi^2 blur_std^2 |f|^2) (the Fourier transform of a Gaussian).

  Frequencies of a gain below `LEAST_GAIN` count as unmeasured: y lacks them, and A^+ never
  multiplies by more than 1 / LEAST_GAIN.
  """
  sides = _positions(shape)
  good = 0 < blur_std < float("inf")
  check(good, "guidance.operators.deblurring.blur_std", blur_std, "a number of positions above 0")
  frequencies = [*map(np.fft.fftfreq, sides[:-1]), np.fft.rfftfreq(sides[-1])]
  squared = sum(f**2 for f in np.meshgrid(*frequencies, indexing="ij", sparse=True))
  gain = np.exp(-2 * (np.pi * blur_std) ** 2 * squared)
  measured = gain >= LEAST_GAIN
  options = {"s": sides, "axes": tuple(range(1, len(sides) + 1))}

  def filtered(x, gain):
    channels = (1,) * (len(shape) - len(sides))
    gain = jnp.asarray(gain.reshape(1, *gain.shape, *channels), x.dtype)
    return jnp.fft.irfftn(gain * jnp.fft.rfftn(x, **options), **options)

  return Operator(
    functools.partial(filtered, gain=gain * measured),
    functools.partial(filtered, gain=measured / np.maximum(gain, LEAST_GAIN)),
  )


def read_mask(mask: str, shape: Shape) -> Bool[np.ndarray, "*m"]:
  """Which positions of an example of `shape` are known: [*positions, 1], of a vector [n].

  The name says what is missing: of images "lower_half", "upper_half", "left_half", "right_half"; of
  any examples "box:start,...,length,..." (of images "box:top,left,height,width"), and
  "random:share" or "random:share:seed", that share of the positions, of all channels the same. Any
  other text is the path of a PNG of the size of the images: white is known, black or transparent is
  missing, greys are rounded to the nearer of the two.
  """
  sides = _positions(shape)
  kind, colon, rest = mask.partition(":")
  if kind in MASKS:
    known = MASKS[kind](sides, mask, rest if colon else None)
  else:
    known = _from_file(sides, mask)
  legal = "a mask with known and missing positions"
  check(True in known, MASK, mask, f"{legal}; with this one all are missing")
  check(False in known, MASK, mask, f"{legal}; with this one all are known")
  return known.reshape(shape if len(shape) == 1 else (*sides, 1))


def _half(sides: Shape, mask: str, rest: str | None, axis: int, first: bool) -> np.ndarray:
  check(rest is None, MASK, mask, f"{mask.partition(':')[0]!r} alone: halves have no numbers")
  legal = f"a box or random for examples with positions {sides}: halves are those of images"
  check(len(sides) == 2, MASK, mask, legal)
  in_first = np.indices(sides)[axis] < sides[axis] // 2
  return in_first != first


def _box(sides: Shape, mask: str, rest: str | None) -> np.ndarray:
  form = "box:top,left,height,width" if len(sides) == 2 else "box:start,...,length,..."
  legal = f"{form}, {2 * len(sides)} whole numbers of a box within the {sides} positions"
  try:
    starts, lengths = np.reshape([int(n) for n in (rest or "").split(",")], (2, len(sides)))
  except ValueError as error:
    raise invalid(MASK, mask, legal) from error
  stops = starts + lengths
  inside = (starts >= 0) & (lengths > 0) & (stops <= sides)
  check(False not in inside, MASK, mask, legal)
  known = np.ones(sides, bool)
  known[tuple(map(slice, starts, stops))] = False
  return known


def _random(sides: Shape, mask: str, rest: str | None) -> np.ndarray:
  legal = "random:share or random:share:seed, a share between 0 and 1 and a whole number"
  share, _, seed = (rest or "").partition(":")
  try:
    share, stream = float(share), np.random.RandomState(int(seed or 0))
  except ValueError as error:
    raise invalid(MASK, mask, legal) from error
  check(0 < share < 1, MASK, mask, legal)
  known = np.ones(np.prod(sides), bool)
  known[stream.permutation(known.size)[: round(share * known.size)]] = False
  return known.reshape(sides)


def _from_file(sides: Shape, mask: str) -> np.ndarray:
  path = Path(mask).expanduser()
  legal = f"{', '.join(MASKS)} (see operators.read_mask), or the path of a PNG; no such file"
  check(path.is_file(), MASK, mask, legal)
  legal = "a PNG for images only; for other examples take box or random"
  check(len(sides) == 2, MASK, mask, legal)
  try:
    with Image.open(path) as image:
      known = _is_white(image)
  except Exception as error:  # Pillow raises many kinds for broken files
    raise invalid(MASK, mask, f"an image file that can be read ({error})") from error
  size = lambda shape: f"{shape[1]}x{shape[0]}"
  legal = f"a PNG of the size of the images, {size(sides)} pixels; it has {size(known.shape)}"
  check(known.shape == sides, MASK, mask, legal, f"resize it to {size(sides)} pixels")
  return known


def _is_white(image: Image.Image) -> np.ndarray:
  """The pixels [h, w] in the upper half of the range from black to white."""
  if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
    return np.asarray(image) >= 2**15
  black = Image.new("RGBA", image.size, "black")
  return np.asarray(Image.alpha_composite(black, image.convert("RGBA")).convert("L")) >= 2**7


def _users(name: str, shape: Shape) -> Operator:
  """The operator of two functions that the user wrote."""
  pair = users_function(name, FIELD)(shape)
  good = isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair))
  legal = f"a function (shape) -> (forward, pseudo_inverse), two functions; it returns {pair!r}"
  check(good, FIELD, name, legal)
  with jax.default_matmul_precision("highest"):
    _check_operator(Operator(*map(jax.jit, pair)), shape, name)
  return Operator(*pair)


def _check_operator(operator: Operator, shape: Shape, name: str) -> None:
  """Raises unless shapes and, on random numbers, all identities of A and A^+ are right."""
  stream = np.random.RandomState(0)
  draw = lambda shape: jnp.asarray(stream.standard_normal((2, *shape)), jnp.float32)
  a, inverse = operator
  x, z = draw(shape), draw(shape)
  measured = _shape_of(a, x, "forward", name)
  y, v = draw(measured), draw(measured)
  found = _shape_of(inverse, y, "pseudo_inverse", name)
  legal = f"pseudo_inverse: [b, *{measured}] -> [b, *{shape}]; it returns [b, *{found}]"
  check(found == shape, FIELD, name, legal)

  inner = lambda a, b: (a * b).reshape(2, -1).sum(1)
  combined = lambda f, a, b: (f(2 * a - 3 * b), 2 * f(a) - 3 * f(b))
  identities = {
    "forward is linear": combined(a, x, z),
    "pseudo_inverse is linear": combined(inverse, y, v),
    "forward treats each example alone": (a(x[:1]), a(x)[:1]),
    "A A^+ A = A (A forward, A^+ pseudo_inverse)": (a(inverse(a(x))), a(x)),
    "A^+ A A^+ = A^+ (A forward, A^+ pseudo_inverse)": (inverse(a(inverse(y))), inverse(y)),
    "A^+ A is symmetric (A forward, A^+ pseudo_inverse)": (
      inner(z, inverse(a(x))),
      inner(inverse(a(z)), x),
    ),
    "A A^+ is symmetric (A forward, A^+ pseudo_inverse)": (
      inner(v, a(inverse(y))),
      inner(a(inverse(v)), y),
    ),
  }
  for identity, (left, right) in identities.items():
    error = float(abs(left - right).max() / jnp.maximum(abs(right).max(), 1e-20))
    legal = f"functions with: {identity}, to {TOLERANCE:g}; on random numbers it fails by {error:g}"
    check(error <= TOLERANCE, FIELD, name, legal)
  transpose = lambda y: jax.linear_transpose(a, x)(y)[0]
  _shape_of(transpose, a(x), "jax.linear_transpose of forward", name)


def _shape_of(function: Callable, x: jax.Array, what: str, name: str) -> Shape:
  """The shape of one example of what the function returns for x [2, *d]."""
  try:
    y = jax.eval_shape(function, x)
  except Exception as error:
    legal = f"functions that jax can trace; {what} fails: {type(error).__name__}: {error}"
    raise invalid(FIELD, name, legal) from error
  good = getattr(y, "shape", ())[:1] == x.shape[:1] and y.dtype == x.dtype
  legal = f"functions of a batch [b, ...] to one of float32; for {x.shape} {what} returns {y}"
  check(good, FIELD, name, legal)
  return y.shape[1:]


# name of a mask: (sides, the text, what follows its colon or None) -> known positions [*sides]
MASKS = {
  "lower_half": functools.partial(_half, axis=0, first=False),
  "upper_half": functools.partial(_half, axis=0, first=True),
  "left_half": functools.partial(_half, axis=1, first=True),
  "right_half": functools.partial(_half, axis=1, first=False),
  "box": _box,
  "random": _random,
}

OPERATORS: dict[str, Callable[..., Operator]] = {
  "inpainting": inpainting,
  "colorization": colorization,
  "super_resolution": super_resolution,
  "deblurring": deblurring,
}
