"""3x3 convolutions with a quarter of the multiplications, as matrix products (Lavin & Gray 2016,
"Fast algorithms for convolutional neural networks", F(4x4, 3x3)).

In float32 their error is three times that of the sum itself, 2e-6 of the largest output.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

SIDE, WIDTH = 4, 6  # of a tile of outputs; of the inputs that it depends on
# besides infinity, where polynomials are evaluated: 0, 1, -1, 2, -2 would round four times worse
POINTS = np.array([0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)])
# channels in and out, and pixels, below which the transforms cost about what they save
FEWEST, SMALLEST = 16, 256
LARGEST = 10 * 2**20  # bytes of transformed inputs at once, which a shared cache holds


def _transforms() -> tuple[np.ndarray, ...]:
  """(output [4, 6], kernel [6, 3], input [6, 6]): along one axis the outputs are
  output @ ((kernel @ k) * (input @ x)) (Toom 1963; Cook 1966).
  """
  others = [np.delete(POINTS, i) for i in range(len(POINTS))]
  scale = np.array([np.prod(point - rest) for point, rest in zip(POINTS, others)])
  powers = lambda n: np.vander(POINTS, n, increasing=True)
  output = np.vstack([powers(SIDE), np.eye(SIDE)[-1]]).T
  kernel = np.vstack([powers(3) / scale[:, None], np.eye(3)[-1]])
  inputs = np.array(
    [*(np.append(np.poly(rest)[::-1], 0) for rest in others), np.poly(POINTS)[::-1]]
  )
  return output, kernel, inputs


# of both axes, the columns of an image before its rows
OUTPUT, KERNEL, INPUT = (np.kron(m, m).astype(np.float32) for m in _transforms())
# from the window of inputs, whose inner places are those of the outputs
INNER = np.kron(*2 * [np.pad(np.eye(SIDE), ((0, 0), (1, 1)))]).astype(np.float32)


def suits(shape: tuple[int, ...], features: int, dtype) -> bool:
  """Whether inputs [b, h, w, c] fall into tiles, and it pays."""
  if len(shape) != 4 or shape[1] % SIDE or shape[2] % SIDE or dtype != jnp.float32:
    return False
  return min(shape[-1], features) >= FEWEST and shape[1] * shape[2] >= SMALLEST


def convolution(
  x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"]
) -> Float[Array, "b h w f"]:
  """Of stride 1, with zeros around x."""
  c, f = kernel.shape[2:]
  kernel = (KERNEL @ kernel.swapaxes(0, 1).reshape(9, -1)).reshape(-1, c, f)

  def part(x):
    products = lax.dot_general(_transformed(INPUT, x), kernel, (((2,), (1,)), ((0,), (0,))))
    return _untiled(OUTPUT @ products.reshape(len(kernel), -1), (*x.shape[:3], f))

  return _each_part(part, max(c, f), x).reshape(*x.shape[:3], f)


def kernel_gradient(
  x: Float[Array, "b h w c"], gradient: Float[Array, "b h w f"]
) -> Float[Array, "3 3 c f"]:
  """That of sum(convolution(x, kernel) * gradient) in the kernel."""
  c, f = x.shape[-1], gradient.shape[-1]
  # else XLA would keep the spectrum of the forward pass, 2.25 times as large as x
  x = lax.optimization_barrier(x)

  def part(x, gradient):
    factors = _transformed(INPUT, x), _transformed(OUTPUT.T @ INNER, gradient)
    return lax.dot_general(*factors, (((1,), (1,)), ((0,), (0,))))

  total = _each_part(part, max(c, f), x, gradient).sum(0)
  return (KERNEL.T @ total.reshape(len(INPUT), -1)).reshape(3, 3, c, f).swapaxes(0, 1)


def _each_part(function, channels, *images):
  """[n, ...]: the function of each of n equal parts of the batch, as few as the cache wants."""
  b, h, w, _ = images[0].shape
  bytes_each = h * w * channels * images[0].itemsize * len(INPUT) // SIDE**2
  divisors = (n for n in range(1, b + 1) if b % n == 0)
  count = next((n for n in divisors if b // n * bytes_each <= LARGEST), b)
  if count == 1:
    return function(*images)[None]
  parts = [image.reshape(count, -1, *image.shape[1:]) for image in images]
  return lax.map(lambda part: function(*part), parts)


def _transformed(matrix, x):
  """[36, tiles, c]: the matrix times the window of inputs of each tile."""
  windows = _windows(_windows(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 1), 3)
  return (matrix @ windows.reshape(len(INPUT), -1)).reshape(len(INPUT), -1, x.shape[-1])


def _windows(x, axis):
  """[6, ...]: every SIDE-th place along the axis, from the first, second, ... sixth on."""
  last = x.shape[axis] - WIDTH
  return jnp.stack([lax.slice_in_dim(x, i, i + last + 1, SIDE, axis) for i in range(WIDTH)])


def _untiled(tiles, shape):
  """[b, h, w, f] of the places in a tile [16, tiles * f], of all tiles."""
  b, h, w, f = shape
  tiles = tiles.reshape(SIDE, SIDE, b, h // SIDE, w // SIDE, f)
  return tiles.transpose(2, 3, 1, 4, 0, 5).reshape(shape)
