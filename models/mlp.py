"""A perceptron for vectors and small data of any shape."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import unet

ACTIVATIONS = {
  "elu": jax.nn.elu,
  "gelu": jax.nn.gelu,
  "relu": jax.nn.relu,
  "softplus": jax.nn.softplus,
  "swish": jax.nn.swish,
  "tanh": jnp.tanh,
}


class Model(nn.Module):
  """Fully connected layers, each told the time, for data [b, *d] of any one shape, flattened.

  hidden=(128, 128), activation="softplus", conditional=False is the toy network of Song and Ermon
  2019, appendix B.1.

  Attributes:
    hidden: width of each hidden layer.
    activation: a name in `ACTIVATIONS`.
    embedding_size: width of the time embedding, even and at least 4.
    conditional: whether the network is told about time (and class).
    num_classes: 0 for an unconditional network; labels are 0 .. num_classes - 1, None means no
      class.
    dropout: rate after each hidden layer while training.
    dtype: of the computation; parameters and output are float32.
  """

  hidden: tuple[int, ...] = (128, 128, 128)
  activation: str = "swish"
  embedding_size: int = 64
  conditional: bool = True
  num_classes: int = 0
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b *d"],
    c_noise: Float[Array, " b"],
    labels: Int[Array, " b"] | None = None,
    train: bool = False,
  ) -> Float[Array, "b *d"]:
    """Maps x [b, *d] and the noise condition c_noise [b] to an output of the shape of x."""
    if self.activation not in ACTIVATIONS:
      names = ", ".join(ACTIVATIONS)
      raise ValueError(f"activation {self.activation!r} is unknown: choose one of {names}")
    activation = ACTIVATIONS[self.activation]
    embedding = self._embedding(c_noise, labels, activation)
    h = x.reshape(x.shape[0], -1)
    for i, features in enumerate(self.hidden):
      h = self._dense(features, name=f"hidden_{i}")(h)
      if embedding is not None:
        h += self._dense(features, name=f"time_{i}")(embedding)
      h = nn.Dropout(self.dropout)(activation(h), deterministic=not train)
    out = self._dense(math.prod(x.shape[1:]), scale=0.0, name="out")(h)
    return out.reshape(x.shape).astype(jnp.float32)

  def _embedding(self, c_noise, labels, activation):
    """[b, embedding_size] from the sinusoidal time embedding and, where the network has classes,
    the label's vector.
    """
    if not self.conditional:
      return None
    width = self.embedding_size
    embedding = self._dense(width, name="time")(unet.sinusoidal_embedding(c_noise, width))
    if self.num_classes:
      init = unet.variance_scaling()
      table = nn.Embed(
        self.num_classes + 1, width, dtype=self.dtype, embedding_init=init, name="classes"
      )
      embedding += table(jnp.full(c_noise.shape, self.num_classes) if labels is None else labels)
    return activation(embedding)

  def _dense(self, features: int, *, name: str, scale: float = 1.0) -> nn.Dense:
    init = unet.variance_scaling(scale)
    return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)
