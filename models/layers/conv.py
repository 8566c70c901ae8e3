"""Convolution whose gradients are convolutions in the layout that XLA:CPU runs fast.

The usual gradients carry permuted dimension numbers, which XLA:CPU rewrites outside of loops only:
inside a scan or while loop they take its naive code, 3 to 50 times slower. At the default matmul
precision 3x3 convolutions and their gradients take Winograd's algorithm.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from models.layers import winograd

Pads = tuple[tuple[int, int], ...]  # zeros before and after each spatial axis


class Conv(nn.Module):
  """flax.linen.Conv for channels-last arrays of one batch axis: the same parameters "kernel"
  [*kernel_size, in, out] and "bias" [out], initialisation and output.

  On CPU stride 1 without dilation takes `unit_conv`; a kernel of one pixel is a matrix product
  everywhere; the rest, and other platforms, take lax.conv_general_dilated.

  Attributes:
    padding: "SAME", "VALID" or (before, after) per spatial axis.
    dtype: of the computation; None follows the input and the parameters.
  """

  features: int
  kernel_size: tuple[int, ...]
  strides: tuple[int, ...] | None = None
  padding: str | Pads = "SAME"
  kernel_dilation: tuple[int, ...] | None = None
  use_bias: bool = True
  dtype: str | None = None
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

  @nn.compact
  def __call__(self, x: Float[Array, "b *hw c"]) -> Float[Array, "b *hw2 f"]:
    """[b, *size, c] -> [b, *smaller or equal size, features]."""
    shape = (*self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = self._linear(x, kernel)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

  def _linear(self, x, kernel):
    ones = (1,) * len(self.kernel_size)
    strides, dilation = self.strides or ones, self.kernel_dilation or ones
    plain = strides == dilation == ones
    if plain and self.kernel_size == ones and isinstance(self.padding, str):
      # a product of two matrices: with more axes XLA:CPU takes half as long again
      flat = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[-2:])
      return flat.reshape(*x.shape[:-1], -1)
    if plain and jax.default_backend() == "cpu":
      pads = self.padding
      if isinstance(pads, str):
        pads = lax.padtype_to_pads(x.shape[1:-1], self.kernel_size, ones, pads)
      return unit_conv(x, kernel, tuple(pads))
    return _lax_conv(x, kernel, self.padding, strides, dilation)


def unit_conv(
  x: Float[Array, "b *hw c"], kernel: Float[Array, "*k c f"], pads: Pads
) -> Float[Array, "b *hw2 f"]:
  """Convolution of stride 1; all its derivatives, forward and reverse, are such convolutions.

  Winograd's algorithm where it pays, unless `jax.default_matmul_precision` is "highest".
  """
  exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
  return _bind(x, kernel, pads, exact)


def _bind(x, kernel, pads, exact):
  over_x, over_kernel = (jax.typeof(a).mat.varying for a in (x, kernel))  # of a shard_map
  x = _vary(x, over_kernel - over_x)
  return _conv_p.bind(x, _vary(kernel, over_x - over_kernel), pads=pads, exact=exact)


def _vary(array, axes):
  """Marked as varying over more axes, so that shard_map sums the gradient over them."""
  return lax.pcast(array, tuple(axes), to="varying") if axes else array


def _lax_conv(x, kernel, padding, strides=None, dilation=None):
  spatial = "DHW"[2 - x.ndim :]
  layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
  strides = strides or (1,) * len(spatial)
  return lax.conv_general_dilated(
    x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=layout
  )


# A primitive of its own: unlike linear_call it batches, so that jvp, vjp and vmap combine; it is
# bilinear, and the transposes below are calls of itself.


def _implementation(x, kernel, *, pads, exact):
  around, size = ((1, 1), (1, 1)), kernel.shape[:-2]
  if not exact and pads == around and size == (3, 3):
    if winograd.suits(x.shape, kernel.shape[-1], x.dtype):
      return winograd.convolution(x, kernel)
  if not exact and pads == around and size == x.shape[1:-1]:
    # as `_kernel_gradient` asks for it
    images, gradient = x.swapaxes(0, -1), jnp.moveaxis(kernel, -2, 0)
    if winograd.suits(images.shape, kernel.shape[-1], x.dtype):
      return jnp.moveaxis(winograd.kernel_gradient(images, gradient), -2, 0)
  return _lax_conv(x, kernel, pads)


def _abstract(x, kernel, *, pads, exact):
  size = (n + sum(pad) - k + 1 for n, k, pad in zip(x.shape[1:-1], kernel.shape, pads))
  return x.update(shape=(x.shape[0], *size, kernel.shape[-1]), weak_type=False)


def _input_gradient(gradient, x, kernel, *, pads, exact):
  """The kernel flipped in space, its channels exchanged."""
  size = kernel.shape[:-2]
  kernel = jnp.flip(kernel, range(len(size))).swapaxes(-1, -2)
  pads = tuple((k - 1 - a, k - 1 - b) for k, (a, b) in zip(size, pads))
  return _bind(gradient, kernel, pads, exact)


def _kernel_gradient(gradient, x, kernel, *, pads, exact):
  """The batch is the axis summed over, the input's channels are the batch."""
  result = _bind(x.swapaxes(0, -1), jnp.moveaxis(gradient, 0, -2), pads, exact)
  return jnp.moveaxis(result, 0, -2)


def _batch(args, axes, *, pads, exact):
  """Under vmap: a new axis of the input alone joins its batch."""
  x, kernel = args
  if axes[1] is not None:
    return jax.vmap(lambda *a: _lax_conv(*a, pads), axes)(x, kernel), 0
  x = jnp.moveaxis(x, axes[0], 0)
  y = _bind(x.reshape(-1, *x.shape[2:]), kernel, pads, exact)
  return y.reshape(*x.shape[:2], *y.shape[1:]), 0


_conv_p = Primitive("unit_conv")
_conv_p.def_impl(jax.jit(_implementation, static_argnames=("pads", "exact")))
_conv_p.def_abstract_eval(_abstract)
ad.defbilinear(_conv_p, _input_gradient, _kernel_gradient)
batching.primitive_batchers[_conv_p] = _batch
mlir.register_lowering(_conv_p, mlir.lower_fun(_implementation, multiple_results=False))
