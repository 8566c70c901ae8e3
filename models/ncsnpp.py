"""The U-Nets of the SDE framework, NCSN++ and DDPM++, for images of 32 to 1024 pixels."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import biggan, unet

OPTIONS = {
  "resblock_type": ("biggan", "ddpm"),
  "progressive": ("none", "output_skip", "residual"),
  "progressive_input": ("none", "input_skip", "residual"),
  "progressive_combine": ("sum", "cat"),
  "embedding_type": ("fourier", "positional"),
}


class Model(nn.Module):
  """NCSN++ (the defaults: the CIFAR-10 network of the VE SDE) and DDPM++ (fir=False,
  progressive_input="none", embedding_type="positional") of Song et al. 2021, appendix H.

  The output of the networks for VE SDEs is to be divided by sigma: output "scaled_score".

  Attributes:
    nf: channels at full resolution; level i has nf * ch_mult[i].
    ch_mult: one factor per resolution level: its length is the depth.
    num_res_blocks: residual blocks per level going down; one more going up.
    attn_resolutions: heights at which attention blocks stand.
    dropout: rate inside the residual blocks while training.
    resamp_with_conv: convolve when resampling (residual blocks "ddpm" only).
    conditional: whether the network is told about time.
    fir: resample with the filter `fir_kernel`, else by nearest neighbour and mean.
    fir_kernel: one axis of the separable filter, of any scale.
    skip_rescale: divide the sum of every residual connection by sqrt(2).
    resblock_type: "biggan" blocks resample themselves, "ddpm" blocks have layers for it.
    progressive: the output grows over resolutions: "output_skip" sums an output per level,
      "residual" carries features along.
    progressive_input: the resampled input joins every level: "input_skip" or "residual".
    progressive_combine: how "input_skip" joins: "sum" or "cat".
    embedding_type: "fourier" takes log sigma as c_noise, "positional" a time label up to 999.
    fourier_scale: std of the Fourier frequencies.
    init_scale: of the last layer of every block and of the network; 0 means nearly zero.
    num_classes: 0 for an unconditional network; labels are 0 .. num_classes - 1, None means no
      class.
    classes_first: labels join the features of time, before the linear maps of the embedding and
      as a linear map themselves (Karras et al. 2022, released code); else they join the embedding.
    augment_dim: number of conditions that tell how the images were augmented, 9 for
      `augment.augment`; 0: the network takes none.
    centered: the data are in [-1, 1]; False: in [0, 1], mapped to [-1, 1] here.
    dtype: of the computation; parameters and output are float32.
    remat: compute the residual blocks again in the backward pass: less memory, more time.
  """

  nf: int = 128
  ch_mult: tuple[int, ...] = (1, 2, 2, 2)
  num_res_blocks: int = 4
  attn_resolutions: tuple[int, ...] = (16,)
  dropout: float = 0.1
  resamp_with_conv: bool = True
  conditional: bool = True
  fir: bool = True
  fir_kernel: tuple[int | float, ...] = (1, 3, 3, 1)
  skip_rescale: bool = True
  resblock_type: str = "biggan"
  progressive: str = "none"
  progressive_input: str = "residual"
  progressive_combine: str = "sum"
  embedding_type: str = "fourier"
  fourier_scale: float = 16.0
  init_scale: float = 0.0
  num_classes: int = 0
  classes_first: bool = False
  augment_dim: int = 0
  centered: bool = True
  dtype: str = "float32"
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    c_noise: Float[Array, " b"],
    labels: Int[Array, " b"] | None = None,
    train: bool = False,
    augmentation: Float[Array, "b n"] | None = None,
  ) -> Float[Array, "b h w c"]:
    """Maps x [b, h, w, c] and the noise condition c_noise [b] to an output of the shape of x."""
    self._check(x.shape[1:3])
    embedding = self._embedding(c_noise, labels, augmentation)
    h = (x if self.centered else 2 * x - 1).astype(self.dtype)
    skips = self._down(h, embedding, train)
    h = self._block(skips[-1], skips[-1].shape[-1], embedding, train)
    h = self._block(self._attention(h), h.shape[-1], embedding, train)
    return self._up(h, skips, x.shape[-1], embedding, train).astype(jnp.float32)

  def _check(self, size):
    for name, legal in OPTIONS.items():
      if getattr(self, name) not in legal:
        raise ValueError(f"{name} = {getattr(self, name)!r} is not one of {', '.join(legal)}")
    unet.check_size(size, 2 ** (len(self.ch_mult) - 1))

  def _embedding(self, c_noise, labels, augmentation):
    if not self.conditional:
      unet.check_augmentation(0, augmentation)
      return None
    if self.embedding_type == "fourier":
      features = biggan.FourierEmbedding(self.nf, self.fourier_scale)(c_noise)
    else:
      features = unet.sinusoidal_embedding(c_noise, self.nf)
    num_classes = self.num_classes
    if num_classes and self.classes_first:
      features, num_classes = features + self._class_features(labels, features), 0
    features = unet.augmented(features, self.augment_dim, augmentation, dtype=self.dtype)
    return unet.noise_embedding(features, 4 * self.nf, num_classes, labels, self.dtype)

  def _class_features(self, labels, features):
    """[b, f], a linear map of the label's unit vector times sqrt(num_classes); no class is zero."""
    labels = jnp.full(len(features), self.num_classes) if labels is None else labels
    units = math.sqrt(self.num_classes) * jax.nn.one_hot(labels, self.num_classes)
    return unet.dense(features.shape[-1], dtype=self.dtype, name="classes")(units)

  def _down(self, x, embedding, train):
    """The features after every layer of the way down, the coarsest last."""
    pyramid, skips = x, [unet.conv(self.nf, dtype=self.dtype)(x)]
    for level, mult in enumerate(self.ch_mult):
      if level:
        h = self._resample("down", skips[-1], embedding, train)
        if self.progressive_input == "input_skip":
          pyramid = self._resampler(unet.Downsample, with_conv=False)(pyramid)
          h = biggan.Combine(self.progressive_combine, dtype=self.dtype)(pyramid, h)
        elif self.progressive_input == "residual":
          pyramid = self._resampler(unet.Downsample, features=h.shape[-1])(pyramid)
          pyramid = h = unet.add(pyramid, h, self.skip_rescale)
        skips.append(h)
      for _ in range(self.num_res_blocks):
        h = self._block(skips[-1], mult * self.nf, embedding, train)
        skips.append(self._attention(h) if h.shape[1] in self.attn_resolutions else h)
    return skips

  def _up(self, h, skips, channels, embedding, train):
    """The output [b, h, w, channels]; empties `skips`."""
    pyramid = None
    for level, mult in reversed(list(enumerate(self.ch_mult))):
      for _ in range(self.num_res_blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self._block(h, mult * self.nf, embedding, train)
      h = self._attention(h) if h.shape[1] in self.attn_resolutions else h
      if self.progressive == "output_skip":
        coarse = 0 if pyramid is None else self._resampler(unet.Upsample, with_conv=False)(pyramid)
        pyramid = coarse + self._head(h, channels, self.init_scale)
      elif self.progressive == "residual" and pyramid is None:
        pyramid = self._head(h, h.shape[-1], scale=1.0)
      elif self.progressive == "residual":
        pyramid = self._resampler(unet.Upsample, features=h.shape[-1])(pyramid)
        pyramid = h = unet.add(pyramid, h, self.skip_rescale)
      h = self._resample("up", h, embedding, train) if level else h
    if self.progressive == "output_skip":
      return pyramid
    return self._head(h, channels, self.init_scale)

  def _block(self, h, features, embedding, train, **options):
    """A residual block of the chosen type."""
    options |= {"skip_rescale": self.skip_rescale, "init_scale": self.init_scale}
    options |= {"dropout": self.dropout, "dtype": self.dtype}
    if self.resblock_type == "biggan":
      kernel = self.fir_kernel if self.fir else (1, 1)
      block = biggan.BigGANBlock(features, fir_kernel=kernel, **options)
    else:
      block = unet.ResnetBlock(features, **options)
    return unet.call_block(block, h, embedding, train, remat=self.remat)

  def _resample(self, direction, h, embedding, train):
    """Up or down by a factor 2 on the main path."""
    if self.resblock_type == "biggan":
      return self._block(h, h.shape[-1], embedding, train, resample=direction)
    kind = {"up": unet.Upsample, "down": unet.Downsample}[direction]
    return self._resampler(kind, with_conv=self.resamp_with_conv)(h)

  def _resampler(self, kind, **options):
    return kind(fir_kernel=self.fir_kernel if self.fir else None, dtype=self.dtype, **options)

  def _attention(self, h):
    scales = {"init_scale": self.init_scale, "qkv_scale": 0.1}
    return unet.AttentionBlock(skip_rescale=self.skip_rescale, dtype=self.dtype, **scales)(h)

  def _head(self, h, features, scale):
    h = nn.swish(unet.group_norm(h.shape[-1], dtype=self.dtype)(h))
    return unet.conv(features, scale=scale, dtype=self.dtype)(h)
