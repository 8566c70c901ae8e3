"""Classifiers of noisy data, told the noise level: p(y | x_t) for classifier guidance."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from models.layers import adm, unet
from models.layers.conv import Conv
from models.layers.norm import GroupNorm


class Model(nn.Module):
  """Noise-conditional classifier; `architecture` names one of `ARCHITECTURES`, the other fields
  reach the architectures that have a field of that name.

  Attributes:
    architecture: "wide_resnet" (see `WideResNet`) or "adm_encoder" (see `AdmEncoder`) for images,
      "mlp" (see `Perceptron`) for data of any shape.
    num_classes: length of the output.
    hidden: of "mlp".
    depth, widen, embedding: of "wide_resnet".
    nf, ch_mult, num_res_blocks, attn_resolutions, num_head_channels, dropout, dtype, remat: of
      "adm_encoder"; the defaults are ADM's for ImageNet 64x64, where the paper has 4 blocks.
  """

  architecture: str = "wide_resnet"
  num_classes: int = 10
  hidden: tuple[int, ...] = (128, 128, 128)
  depth: int = 28
  widen: int = 10
  embedding: str = "fourier"
  nf: int = 128
  ch_mult: tuple[int | float, ...] = (1, 2, 3, 4)
  num_res_blocks: int = 4
  attn_resolutions: tuple[int, ...] = (32, 16, 8)
  num_head_channels: int = 64
  dropout: float = 0.0
  dtype: str = "float32"
  remat: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b *d"], c_noise: Float[Array, " b"], train: bool = False
  ) -> Float[Array, "b k"]:
    """Logits [b, num_classes], float32, of x [b, *d] at the noise condition c_noise [b]."""
    network = _pick(ARCHITECTURES, "architecture", self.architecture)
    if self.architecture != "mlp" and x.ndim != 4:
      raise ValueError(f"architecture {self.architecture!r} is for images [h, w, c]: take 'mlp'")
    return network(self)(x, c_noise, train)


class Perceptron(nn.Module):
  """Fully connected layers, each told the noise, for data of any one shape, flattened.

  Attributes:
    hidden: width of each hidden layer.
  """

  num_classes: int
  hidden: tuple[int, ...] = (128, 128, 128)

  @nn.compact
  def __call__(
    self, x: Float[Array, "b *d"], c_noise: Float[Array, " b"], train: bool
  ) -> Float[Array, "b k"]:
    """Logits [b, num_classes] at c_noise: log sigma, or a timestep."""
    told = nn.swish(nn.Dense(64, name="noise")(unet.sinusoidal_embedding(c_noise, 64)))
    h = x.reshape(len(x), -1)
    for i, features in enumerate(self.hidden):
      h = nn.Dense(features, name=f"hidden_{i}")(h)
      h = nn.swish(h + nn.Dense(features, name=f"noise_{i}")(told))
    return nn.Dense(self.num_classes, kernel_init=_uniform_out, name="logits")(h)


class WideResNet(nn.Module):
  """Wide ResNet (Zagoruyko & Komodakis 2016) with GroupNorm, told the noise in every block; every
  image is standardised, so its scale does not matter (Song et al. 2021, appendix I.1).

  Attributes:
    depth: 6 n + 4 for n blocks in each of the three groups.
    widen: the groups have 16, 32 and 64 times as many channels.
    embedding: how the noise level enters, a name in `EMBEDDINGS`: "fourier" is for log sigma and
      large data sets, "positional" for timesteps 0 .. 999, or smooth in log sigma.
  """

  num_classes: int
  depth: int = 28
  widen: int = 10
  embedding: str = "fourier"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], c_noise: Float[Array, " b"], train: bool):
    """Logits [b, num_classes]; each side must be a multiple of 4."""
    unet.check_size(x.shape[1:3], 4)
    if self.depth % 6 != 4 or self.depth < 10:
      raise ValueError(f"depth {self.depth} is not 6 n + 4: take 10, 16, 22, 28, ...")
    told = _pick(EMBEDDINGS, "embedding", self.embedding)(c_noise)
    told = nn.Dense(512, name="noise_1")(nn.swish(nn.Dense(512, name="noise_0")(told)))
    h = _conv(16, "input")(_standardise(x))
    for group in range(3):
      for block in range(self.depth // 6):
        width, stride = 16 * 2**group * self.widen, 2 if group and not block else 1
        first = not group and not block
        h = WideBlock(width, stride, first, name=f"group_{group}_{block}")(h, told)
    h = nn.relu(_group_norm(h.shape[-1], "norm")(h)).mean((1, 2))
    return nn.Dense(self.num_classes, kernel_init=_uniform_out, name="logits")(h)


class WideBlock(nn.Module):
  """Two normalised 3x3 convolutions told the noise between them; the shortcut has no parameters:
  averaged pixels, zeros for the channels that are new.

  Attributes:
    first: the shortcut starts after the first norm, in the first block of the network only.
  """

  features: int
  stride: int = 1
  first: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], told: Float[Array, "b e"]
  ) -> Float[Array, "b h2 w2 f"]:
    """Returns [b, h / stride, w / stride, features]."""
    h = nn.relu(_group_norm(x.shape[-1], "norm_0")(x))
    x = h if self.first else x
    h = _conv(self.features, "conv_0", self.stride)(h)
    h += nn.Dense(self.features, name="noise")(nn.swish(told))[:, None, None, :]
    h = nn.relu(_group_norm(self.features, "norm_1")(h))
    h = _conv(self.features, "conv_1")(h)
    if self.stride > 1:
      x = adm.halve(x)
    return h + jnp.pad(x, [(0, 0)] * 3 + [(0, self.features - x.shape[-1])])


class FourierEmbedding(nn.Module):
  """[sin, cos] of 2 pi w c_noise for 128 frequencies w drawn from N(0, 16^2) and never trained
  (Song et al. 2021, appendix I.1).
  """

  @nn.compact
  def __call__(self, c_noise: Float[Array, " b"]) -> Float[Array, "b 256"]:
    """c_noise of order one: log sigma."""
    frequencies = self.param("frequencies", nn.initializers.normal(16.0), (128,))
    angles = 2 * jnp.pi * c_noise[:, None] * jax.lax.stop_gradient(frequencies)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class AdmEncoder(adm.Trunk):
  """The downward half of ADM's U-Net, then attention pooling (Dhariwal & Nichol 2021, section 4 and
  appendix I). The pooling fixes the size of the images.

  The embedding of time is sinusoidal, of periods from 2 pi up: made for timesteps 0 .. 999, it
  tells values of log sigma apart as well (Karras et al. 2022 tell this network log(sigma) / 4).
  """

  num_classes: int = 1000
  resblock_updown: bool = True
  num_head_channels: int = 64

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], c_noise: Float[Array, " b"], train: bool):
    """Logits [b, num_classes] of x [b, h, w, c] at c_noise [b]: a timestep, or log sigma."""
    h, _ = self.encode(x, self.time_embedding(c_noise), train)
    h = nn.swish(adm.group_norm(h.shape[-1], name="head_0")(h))
    heads = adm.count_heads(h.shape[-1], self.num_heads, self.num_head_channels)
    return adm.AttentionPool(heads, self.num_classes, name="head_2")(h)


EMBEDDINGS = {
  "fourier": lambda c_noise: FourierEmbedding(name="fourier")(c_noise),
  "positional": lambda c_noise: adm.timestep_embedding(c_noise, 256),
}

ARCHITECTURES = {
  "wide_resnet": lambda m: WideResNet(
    m.num_classes, m.depth, m.widen, m.embedding, name="wide_resnet"
  ),
  "adm_encoder": lambda m: AdmEncoder(
    num_classes=m.num_classes,
    nf=m.nf,
    ch_mult=m.ch_mult,
    num_res_blocks=m.num_res_blocks,
    attn_resolutions=m.attn_resolutions,
    num_head_channels=m.num_head_channels,
    dropout=m.dropout,
    dtype=m.dtype,
    remat=m.remat,
    name="adm_encoder",
  ),
  "mlp": lambda m: Perceptron(m.num_classes, m.hidden, name="mlp"),
}


def _pick(table, field, name):
  """The entry of `table`; a ValueError that lists the legal names."""
  if name not in table:
    raise ValueError(f"{field} is {name!r}; legal: {', '.join(table)}")
  return table[name]


def _conv(features, name, stride=1):
  """3x3 convolution without bias, initialised after He et al. 2015 by the number of outputs."""
  init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
  return Conv(features, (3, 3), (stride, stride), use_bias=False, kernel_init=init, name=name)


def _group_norm(channels, name):
  """As many groups as divide the channels, at most 32 and each of at least 4 channels, eps 1e-5."""
  groups = max(n for n in range(1, min(32, channels // 4) + 1) if channels % n == 0)
  return GroupNorm(groups, epsilon=1e-5, name=name)


def _uniform_out(key, shape, dtype):
  """U(-1/sqrt(out), 1/sqrt(out)) for the last layer."""
  return jax.random.uniform(key, shape, dtype, -1, 1) / jnp.sqrt(shape[1])


def _standardise(x):
  """Every image minus its mean over its std (at least 1 / sqrt(h w c))."""
  axes = (1, 2, 3)
  least = x[0].size ** -0.5
  return (x - x.mean(axes, keepdims=True)) / jnp.maximum(x.std(axes, keepdims=True), least)
