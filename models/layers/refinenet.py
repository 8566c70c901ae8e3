"""Blocks of the RefineNets of NCSN and NCSNv2, and the network that both are made of.

A block computes in the dtype of its input; its parameters and the statistics of its norms are
float32. `num_scales` > 0 makes a block NCSN's: a norm with one set of parameters per noise level
before every convolution, average pooling. 0 makes it NCSNv2's: no norm in the decoder, max pooling.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import unet


class Stage(NamedTuple):
  """Two residual blocks and the RefineBlock that takes their output; names as in the published
  checkpoints, widths in multiples of nf.
  """

  encoder: str
  decoder: str
  width: int
  decoder_width: int
  dilation: int = 1  # 1: the first block halves the image (not in the first stage)


STAGES = {
  64: (
    Stage("res1", "refine4", 1, 1),
    Stage("res2", "refine3", 2, 1),
    Stage("res3", "refine2", 2, 2, dilation=2),
    Stage("res4", "refine1", 2, 2, dilation=4),
  ),
  128: (
    Stage("res1", "refine5", 1, 1),
    Stage("res2", "refine4", 2, 1),
    Stage("res3", "refine3", 2, 2),
    Stage("res4", "refine2", 4, 2, dilation=2),
    Stage("res5", "refine1", 4, 4, dilation=4),
  ),
  256: (
    Stage("res1", "refine5", 1, 1),
    Stage("res2", "refine4", 2, 1),
    Stage("res3", "refine3", 2, 2),
    Stage("res31", "refine31", 2, 2),
    Stage("res4", "refine2", 4, 2, dilation=2),
    Stage("res5", "refine1", 4, 4, dilation=4),
  ),
}


def stages(resolution_class: int, decoder_widths: str) -> tuple[Stage, ...]:
  """The stages of the 64, 128 or 256 px network, from full resolution down.

  decoder_widths "original" are the authors' own; "score_sde" those of Song et al. 2021's code,
  whose third RefineBlock at 64 px is twice as wide (the other two networks are the same in both).
  """
  if resolution_class not in STAGES:
    raise ValueError(
      f"resolution_class is {resolution_class}: one of {', '.join(map(str, STAGES))}"
    )
  if decoder_widths not in ("original", "score_sde"):
    raise ValueError(f'decoder_widths is "{decoder_widths}": one of original, score_sde')
  chosen = STAGES[resolution_class]
  if decoder_widths == "original" or resolution_class != 64:
    return chosen
  return tuple(s._replace(decoder_width=2) if s.decoder == "refine3" else s for s in chosen)


def conv(
  x: Float[Array, "b h w c"],
  features: int,
  kernel: int = 3,
  *,
  dilation: int = 1,
  bias: bool = True,
  name: str,
) -> Float[Array, "b h w f"]:
  """Square convolution that keeps height and width; weights and biases start as in the published
  code, uniform within 1 / sqrt(fan in).
  """
  bound = (kernel * kernel * x.shape[-1]) ** -0.5
  uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
  return nn.Conv(
    features,
    (kernel, kernel),
    kernel_dilation=dilation,
    use_bias=bias,
    dtype=x.dtype,
    kernel_init=uniform,
    bias_init=uniform,
    name=name,
  )(x)


def resize(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
  """Bilinear interpolation to `size` that maps corner pixels onto corner pixels."""
  if x.shape[1:3] == size:
    return x

  def weights(old, new):
    positions = jnp.linspace(0, old - 1, new)
    distance = jnp.abs(positions[:, None] - jnp.arange(old)[None])
    return jnp.maximum(1 - distance, 0).astype(x.dtype)

  rows, columns = (weights(old, new) for old, new in zip(x.shape[1:3], size))
  return jnp.einsum("Hh,Ww,bhwc->bHWc", rows, columns, x, precision="highest")


class InstanceNormPlus(nn.Module):
  """InstanceNorm++ (Song and Ermon 2019, appendix A.1): instance normalisation that also keeps how
  each channel's mean mu_k differs from the channels' average m, in units of their spread v:
  gamma_k ((x_k - mu_k) / s_k + alpha_k (mu_k - m) / v) + beta_k.

  As in the published code gamma also multiplies the alpha term, v is the unbiased standard
  deviation and s_k the biased one, each with 1e-5 added to its square. Conditional on the noise
  level for num_scales > 0.
  """

  num_scales: int = 0

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], level: Int[Array, " b"] | None = None
  ) -> Float[Array, "b h w c"]:
    """Keeps shape and dtype; a level outside 0 .. num_scales - 1 gives NaN."""
    h = x.astype(jnp.float32)
    means = h.mean((1, 2), keepdims=True)
    spread = jnp.sqrt(means.var(-1, ddof=1, keepdims=True) + 1e-5)
    contrast = (means - means.mean(-1, keepdims=True)) / spread
    h = (h - means) / jnp.sqrt(h.var((1, 2), keepdims=True) + 1e-5)
    gamma, alpha, beta = self._parameters(x.shape[-1], level)
    return (gamma * (h + alpha * contrast) + beta).astype(x.dtype)

  def _parameters(self, channels, level):
    """gamma, alpha and beta, each [b or 1, 1, 1, channels]."""
    near_one = lambda key, shape, dtype=jnp.float32: 1 + 0.02 * jax.random.normal(key, shape, dtype)
    if self.num_scales:
      rows = lambda key, shape, dtype: near_one(key, shape, dtype).at[:, 2 * channels :].set(0)
      table = nn.Embed(self.num_scales, 3 * channels, embedding_init=rows, name="embed")
      return jnp.split(table(level)[:, None, None], 3, axis=-1)
    inits = {"gamma": near_one, "alpha": near_one, "beta": nn.initializers.zeros}
    return [self.param(name, init, (channels,))[None, None, None] for name, init in inits.items()]


class ConvMeanPool(nn.Module):
  """A convolution, then the mean over 2x2 pixels."""

  features: int
  kernel: int = 3

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
    """[b, h, w, c] -> [b, h / 2, w / 2, features]."""
    return nn.avg_pool(conv(x, self.features, self.kernel, name="conv"), (2, 2), (2, 2))


class ResidualBlock(nn.Module):
  """Two normalised ELU convolutions and a residual connection (Song and Ermon 2019, appendix A.2,
  A.3).

  A `transition` changes the width: without dilation it halves height and width, with dilation the
  image keeps its size and the shortcut is a dilated convolution.
  """

  features: int
  transition: bool = False
  dilation: int = 1
  num_scales: int = 0

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], level: Int[Array, " b"] | None = None
  ) -> Float[Array, "b h2 w2 f"]:
    """[b, h, w, c] -> [b, h, w, features], or half the height and width."""
    halves = self.transition and self.dilation == 1
    norm = lambda h, name: nn.elu(InstanceNormPlus(self.num_scales, name=name)(h, level))
    dilated = lambda h, features, name: conv(h, features, dilation=self.dilation, name=name)
    h = dilated(norm(x, "normalize1"), x.shape[-1], "conv1")
    h = norm(h, "normalize2")
    if halves:
      shortcut = ConvMeanPool(self.features, kernel=1, name="shortcut")(x)
      return shortcut + ConvMeanPool(self.features, name="conv2")(h)
    shortcut = dilated(x, self.features, "shortcut") if self.transition else x
    return shortcut + dilated(h, self.features, "conv2")


class ResidualConvUnits(nn.Module):
  """RCU: `num_units` times two activated convolutions without bias and a residual connection (Lin
  et al. 2017, section 3.2).
  """

  num_units: int
  num_scales: int = 0

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], level: Int[Array, " b"] | None = None
  ) -> Float[Array, "b h w c"]:
    """Keeps the shape."""
    for unit in range(1, self.num_units + 1):
      h = x
      for stage in (1, 2):
        if self.num_scales:
          h = InstanceNormPlus(self.num_scales, name=f"norm_{unit}_{stage}")(h, level)
        h = conv(nn.elu(h), x.shape[-1], bias=False, name=f"conv_{unit}_{stage}")
      x += h
    return x


class MultiResolutionFusion(nn.Module):
  """MSF: every input convolved to `features` channels and resized to the first one's size, then the
  sum (Lin et al. 2017, section 3.2).
  """

  features: int
  num_scales: int = 0

  @nn.compact
  def __call__(
    self, xs: tuple[Float[Array, "b _ _ _"], ...], level: Int[Array, " b"] | None = None
  ) -> Float[Array, "b h w f"]:
    """Images of any sizes and channels to one of the first one's size."""
    total = 0
    for index, h in enumerate(xs):
      if self.num_scales:
        h = InstanceNormPlus(self.num_scales, name=f"norms_{index}")(h, level)
      total += resize(conv(h, self.features, name=f"convs_{index}"), xs[0].shape[1:3])
    return total


class ChainedResidualPooling(nn.Module):
  """CRP: two rounds of 5x5 pooling and convolution, each added to the activated input (Lin et al.
  2017, section 3.2); the mean with `num_scales` (Song and Ermon 2019, appendix A.3), else the
  maximum.
  """

  num_scales: int = 0

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], level: Int[Array, " b"] | None = None
  ) -> Float[Array, "b h w c"]:
    """Keeps the shape."""
    x = path = nn.elu(x)
    pool = nn.avg_pool if self.num_scales else nn.max_pool
    for index in range(2):
      if self.num_scales:
        path = InstanceNormPlus(self.num_scales, name=f"norms_{index}")(path, level)
      path = pool(path, (5, 5), padding="SAME")
      path = conv(path, x.shape[-1], bias=False, name=f"convs_{index}")
      x += path
    return x


class RefineBlock(nn.Module):
  """RefineNet's block (Lin et al. 2017, section 3.2): RCUs on each input, fusion, chained pooling,
  output RCUs. A block of one input has no fusion and keeps that input's channels.
  """

  features: int
  num_output_units: int = 1
  num_scales: int = 0

  @nn.compact
  def __call__(
    self, xs: tuple[Float[Array, "b _ _ _"], ...], level: Int[Array, " b"] | None = None
  ) -> Float[Array, "b h w f"]:
    """Images of any sizes and channels to one of the first one's size."""
    adapted = tuple(
      ResidualConvUnits(2, self.num_scales, name=f"adapt_convs_{index}")(x, level)
      for index, x in enumerate(xs)
    )
    if len(xs) == 1:
      h = adapted[0]
    else:
      h = MultiResolutionFusion(self.features, self.num_scales, name="msf")(adapted, level)
    h = ChainedResidualPooling(self.num_scales, name="crp")(h, level)
    return ResidualConvUnits(self.num_output_units, self.num_scales, name="output_convs")(h, level)


def refinenet(
  x: Float[Array, "b h w c"],
  level: Int[Array, " b"] | None = None,
  *,
  nf: int,
  stages: tuple[Stage, ...],
  num_scales: int,
  centered: bool,
  dtype: str,
  remat: bool,
) -> Float[Array, "b h w c"]:
  """The whole network, to be called in a compact method, whose submodules the blocks become.

  x is in [-1, 1], or in [0, 1] unless `centered`, plus noise; the output is float32.
  """
  unet.check_size(x.shape[1:3], 2 ** sum(stage.dilation == 1 for stage in stages[1:]))
  wrap = nn.remat if remat else lambda block: block
  h = (x if centered else 2 * x - 1).astype(dtype)
  h = conv(h, nf, name="begin_conv")
  outputs = []
  for position, stage in enumerate(stages):
    for index in range(2):
      block = wrap(ResidualBlock)(
        features=stage.width * nf,
        transition=position > 0 and index == 0,
        dilation=stage.dilation,
        num_scales=num_scales,
        name=f"{stage.encoder}_{index}",
      )
      h = block(h, level)
    outputs.append(h)
  inputs = (outputs.pop(),)
  for stage in reversed(stages):
    block = wrap(RefineBlock)(
      stage.decoder_width * nf, 1 if outputs else 3, num_scales, name=stage.decoder
    )
    h = block(inputs, level)
    inputs = (outputs.pop(), h) if outputs else ()
  h = nn.elu(InstanceNormPlus(num_scales, name="normalizer")(h, level))
  return conv(h, x.shape[-1], name="end_conv").astype(jnp.float32)
