"""Group normalisation that sums over pixels first, channel by channel, which XLA vectorises."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float


class GroupNorm(nn.Module):
  """flax.linen.GroupNorm for channels-last arrays of one batch axis: the same parameters "scale"
  and "bias" [c] and output (Wu & He 2018).

  Attributes:
    dtype: of the output; None follows the input and the parameters. Statistics are in float32 or
      better.
  """

  num_groups: int
  epsilon: float = 1e-6
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b *hw c"]) -> Float[Array, "b *hw c"]:
    """Keeps the shape."""
    c = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones_init(), (c,))
    bias = self.param("bias", nn.initializers.zeros_init(), (c,))
    dtype = nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    return _normalise(x, scale, bias, self.num_groups, self.epsilon).astype(dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))  # traced once for all layers of a shape
def _normalise(x, scale, bias, num_groups, epsilon):
  b, *size, c = x.shape

  def group_mean(values):  # [b, *size, c] -> [b, *ones, c]
    channels = values.mean(range(1, x.ndim - 1)).reshape(b, num_groups, -1)
    mean = jnp.broadcast_to(channels.mean(-1, keepdims=True), channels.shape)
    return mean.reshape(b, *(1 for _ in size), c)

  mean = group_mean(x)
  variance = jnp.maximum(group_mean(lax.square(x)) - lax.square(mean), 0.0)
  widen = lambda p: p.reshape((1,) * (x.ndim - 1) + (-1,))
  return (x - mean) * (lax.rsqrt(variance + epsilon) * widen(scale)) + widen(bias)
