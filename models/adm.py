"""The U-Net of iDDPM and ADM: learned variances, multi-head attention, class embedding."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.layers import adm, unet


class Model(adm.Trunk):
  """U-Net of iDDPM (Nichol & Dhariwal 2021, appendix A) and, with resblock_updown, of ADM (Dhariwal
  & Nichol 2021, section 3) for images [b, h, w, c] of any size that can be halved often enough. The
  defaults are iDDPM's for CIFAR-10.

  Attributes: those of `adm.Trunk`, and
    learned_variance: the output has 2 c channels: the first c are the prediction, the last c say
      where the variance stands between its two bounds (Nichol & Dhariwal 2021, equation 15).
    num_classes: 0 for an unconditional network; labels are 0 .. num_classes - 1.
    null_class: the class table has one more row, the last, which stands for "no class": it is
      what labels=None means, and what classifier-free guidance trains by giving the label
      num_classes. The published tables have num_classes rows: without it, labels are required.
    augment_dim: number of conditions that tell how the images were augmented, 9 for
      `augment.augment`; 0: the network takes none.
  """

  learned_variance: bool = True
  num_classes: int = 0
  null_class: bool = False
  augment_dim: int = 0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    c_noise: Float[Array, " b"],
    labels: Int[Array, " b"] | None = None,
    train: bool = False,
    augmentation: Float[Array, "b n"] | None = None,
  ) -> Float[Array, "b h w out"]:
    """Maps x [b, h, w, c] and the timestep c_noise [b], on the scale the network was trained with
    (published: 0 .. 999), to [b, h, w, c] or, with learned variance, [b, h, w, 2 c], float32.
    """
    embedding = self.time_embedding(c_noise, augmentation)
    if self._has_class(labels):
      embedding += self._class_embedding(labels, c_noise.shape)
    h, skips = self.encode(x, embedding, train)
    num_stages = len(skips)
    for level, width in reversed(list(enumerate(self.widths()))):
      for block in range(self.num_res_blocks + 1):
        up = bool(level) and block == self.num_res_blocks
        name = f"output_{num_stages - len(skips)}"
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self.stage(name, h, width, embedding, train, up)
    h = nn.swish(adm.group_norm(h.shape[-1], name="head_0")(h))
    return adm.conv(x.shape[-1] * (1 + self.learned_variance), name="head_2", init=adm.ZEROS)(h)

  def time_embedding(
    self, c_noise: Float[Array, " b"], augmentation: Float[Array, "b n"] | None = None
  ) -> Float[Array, "b e"]:
    """[b, 4 nf], float32; the conditions of the augmentation join the features of time."""
    features = adm.timestep_embedding(c_noise, self.nf)
    features = unet.augmented(features, self.augment_dim, augmentation, init=adm.ZEROS)
    hidden = adm.dense(4 * self.nf, name="time_0")(features)
    return adm.dense(4 * self.nf, name="time_2")(nn.swish(hidden))

  def _has_class(self, labels) -> bool:
    """Whether the network has classes; a ValueError where the labels do not fit it."""
    if labels is not None and not self.num_classes:
      raise ValueError(
        "labels were given to an unconditional network: pass None or set num_classes"
      )
    missing = labels is None and self.num_classes and not self.null_class
    if missing and not self.is_initializing():
      raise ValueError(
        f"labels [b] in 0 .. {self.num_classes - 1} are required: this network has no row for 'no "
        "class' (null_class=False)"
      )
    return bool(self.num_classes)

  def _class_embedding(self, labels, shape):
    """[b, 4 nf], the rows of the labels; of the last row where labels is None."""
    rows = self.num_classes + self.null_class
    table = nn.Embed(rows, 4 * self.nf, embedding_init=nn.initializers.normal(1.0), name="classes")
    return table(jnp.full(shape, rows - 1) if labels is None else labels)
