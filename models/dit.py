"""The diffusion transformer: patches as tokens, conditioned through adaptive layer norms."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import unet

FREQUENCY_DIM = 256
normal, xavier = nn.initializers.normal(0.02), nn.initializers.xavier_uniform()


class Model(nn.Module):
  """DiT with adaLN-Zero blocks (Peebles and Xie 2023, section 3.2) for images [b, h, w, c] of any
  size that patch_size divides; its output is zero at initialisation.

  DiT-S, B, L and XL have (hidden_size, depth, num_heads) (384, 12, 6), (768, 12, 12), (1024, 24,
  16) and (1152, 28, 16); "/2" is the patch size. There is no dropout, as in the paper.

  Attributes:
    patch_size: side of the square of pixels that makes a token.
    hidden_size: width of a token, a multiple of 8 and of num_heads.
    depth: number of blocks.
    num_heads: attention heads per block.
    mlp_ratio: hidden width of a block's perceptron, as a multiple of hidden_size.
    num_classes: 0 for an unconditional network; labels are 0 .. num_classes - 1, None means no
      class.
    learned_variance: 2 c output channels, the second half for the variance (section 3.2).
    dtype: of the computation; parameters and output are float32.
    remat: compute the blocks again in the backward pass: less memory, more time.
  """

  patch_size: int = 2
  hidden_size: int = 384
  depth: int = 12
  num_heads: int = 6
  mlp_ratio: float = 4.0
  num_classes: int = 0
  learned_variance: bool = False
  dtype: str = "float32"
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    c_noise: Float[Array, " b"],
    labels: Int[Array, " b"] | None = None,
    train: bool = False,
  ) -> Float[Array, "b h w out"]:
    """Maps x [b, h, w, c] and the noise condition c_noise [b] to [b, h, w, c], or [b, h, w, 2 c]
    with learned_variance.
    """
    _check(x.shape[1:3], self.patch_size, self.hidden_size, self.num_heads)
    grid = x.shape[1] // self.patch_size, x.shape[2] // self.patch_size
    channels = x.shape[3] * (2 if self.learned_variance else 1)
    tokens = dense(self.hidden_size, self.dtype, name="patches")(patchify(x, self.patch_size))
    tokens += position_embedding(*grid, self.hidden_size)[None].astype(self.dtype)
    condition = nn.silu(self._condition(c_noise, labels))
    block = nn.remat(Block) if self.remat else Block
    for i in range(self.depth):
      options = {"dtype": self.dtype, "name": f"block_{i}"}  # the same name with and without remat
      tokens = block(self.num_heads, self.mlp_ratio, **options)(tokens, condition)
    shift, scale = modulation(condition, 2, self.dtype)
    out = dense(self.patch_size**2 * channels, self.dtype, nn.initializers.zeros, "out")(
      modulate(tokens, shift, scale)
    )
    return unpatchify(out, grid, self.patch_size).astype(jnp.float32)

  def _condition(self, c_noise, labels):
    """[b, hidden_size] from the time and, where the network has classes, the label's vector."""
    layer = functools.partial(dense, self.hidden_size, self.dtype, normal)
    embedding = layer("time_in")(frequencies(c_noise, FREQUENCY_DIM))
    embedding = layer("time_out")(nn.silu(embedding))
    if self.num_classes:
      options = {"dtype": self.dtype, "embedding_init": normal, "name": "classes"}
      table = nn.Embed(self.num_classes + 1, self.hidden_size, **options)
      embedding += table(jnp.full(c_noise.shape, self.num_classes) if labels is None else labels)
    return embedding


class Block(nn.Module):
  """A transformer block whose two residual branches the condition shifts, scales and gates, the
  gates zero at first (Peebles and Xie 2023, figure 3).
  """

  num_heads: int
  mlp_ratio: float
  dtype: str

  @nn.compact
  def __call__(
    self, tokens: Float[Array, "b n d"], condition: Float[Array, "b d"]
  ) -> Float[Array, "b n d"]:
    """Keeps the shape; knows no order among the n tokens."""
    b, n, d = tokens.shape
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(condition, 6, self.dtype)
    qkv = dense(3 * d, self.dtype, name="qkv")(modulate(tokens, shift, scale))
    query, key, value = jnp.moveaxis(qkv.reshape(b, n, 3, self.num_heads, -1), 2, 0)
    heads = jax.nn.dot_product_attention(query, key, value).reshape(b, n, d)
    tokens += gate * dense(d, self.dtype, name="attention_out")(heads)
    h = dense(round(self.mlp_ratio * d), self.dtype, name="mlp_in")(
      modulate(tokens, shift_mlp, scale_mlp)
    )
    return tokens + gate_mlp * dense(d, self.dtype, name="mlp_out")(nn.gelu(h))


def dense(features: int, dtype: str, init=xavier, name: str | None = None) -> nn.Dense:
  """Linear map over the last axis, computed in `dtype`; bias zero at first."""
  return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def modulation(condition: Float[Array, "b d"], parts: int, dtype: str) -> list[Array]:
  """`parts` vectors [b, 1, d] linear in the condition, all zero at first; makes a submodule."""
  width = parts * condition.shape[-1]
  out = dense(width, dtype, nn.initializers.zeros, "modulation")(condition)
  return jnp.split(out[:, None], parts, axis=-1)


def modulate(
  tokens: Float[Array, "b n d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"]
) -> Float[Array, "b n d"]:
  """Layer norm in float32 without parameters of its own, then the condition's scale and shift."""
  normalised = jax.nn.standardize(tokens.astype(jnp.float32), epsilon=1e-6)
  return normalised * (1 + scale) + shift


def frequencies(v: Float[Array, " n"], dim: int) -> Float[Array, "n dim"]:
  """[sin, cos] of v at dim / 2 frequencies 10000^(-2 i / dim), i < dim / 2: the last one the shared
  embedding would reach is left out, as in the published networks.
  """
  return unet.sinusoidal_embedding(v, dim, max_period=10000 ** (1 - 2 / dim))


def position_embedding(rows: int, columns: int, dim: int) -> Float[Array, "n dim"]:
  """Fixed embedding of a grid, row by row: half of each vector tells the column, half the row."""
  by_row, by_column = (
    frequencies(jnp.arange(n, dtype=jnp.float32), dim // 2) for n in (rows, columns)
  )
  return jnp.concatenate([jnp.tile(by_column, (rows, 1)), by_row.repeat(columns, axis=0)], axis=1)


def patchify(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n p"]:
  """Tokens of patch x patch pixels: [b, h w / patch^2, patch^2 c], row by row."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c)
  return x.swapaxes(2, 3).reshape(b, -1, patch * patch * c)


def unpatchify(
  tokens: Float[Array, "b n p"], grid: tuple[int, int], patch: int
) -> Float[Array, "b h w c"]:
  """The inverse of `patchify` for a grid of (rows, columns) tokens."""
  b, (rows, columns) = len(tokens), grid
  x = tokens.reshape(b, rows, columns, patch, patch, -1)
  return x.swapaxes(2, 3).reshape(b, rows * patch, columns * patch, -1)


def _check(size: tuple[int, int], patch: int, hidden: int, heads: int) -> None:
  """Raises a ValueError that names the nearest legal numbers."""
  for value, factor, what in (
    (size[0], patch, f"image size {size} cannot be cut into patches: every side"),
    (size[1], patch, f"image size {size} cannot be cut into patches: every side"),
    (hidden, math.lcm(8, heads), f"hidden_size {hidden} does not fit num_heads {heads}: it"),
  ):
    if value % factor:
      below, above = value // factor * factor, (value // factor + 1) * factor
      nearest = f"{below} or {above}" if below else f"{above}"
      raise ValueError(f"{what} must be a multiple of {factor}; nearest to {value}: {nearest}")
