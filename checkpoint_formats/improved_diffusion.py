"""Checkpoints of openai/improved-diffusion and openai/guided-diffusion: a plain state_dict."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from checkpoint_formats.layouts import Source, conv, dense, same
from models.adm import Model

# names of ours -> names in the file; numbers are separated by "_" here, by "." there
PREFIXES = {
  "time": "time_embed",
  "classes": "label_emb",
  "input": "input_blocks",
  "middle": "middle_block",
  "output": "output_blocks",
  "head": "out",
}
INNER = {
  "in_norm": "in_layers.0",
  "in_conv": "in_layers.2",
  "embedding": "emb_layers.1",
  "out_norm": "out_layers.0",
  "out_conv": "out_layers.3",
  "shortcut": "skip_connection",
  "out": "proj_out",
}
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def adm(model: Model) -> dict[str, Source]:
  """Where every parameter of an iDDPM or ADM network comes from.

  Which heights have attention depends on the size of the image, which a model does not know: the
  result has the entries of every size. Look the paths of the parameters at hand up in it. A row
  for "no class" (null_class), which no published file has, is zero: it adds nothing.
  """
  side = 2 ** (len(model.ch_mult) - 1)
  sources = {}
  for attn_resolutions in ((), tuple(range(1, side + 1))):
    # one head fits every width; names and shapes do not depend on the heads
    variant = model.clone(attn_resolutions=attn_resolutions, num_heads=1, num_head_channels=0)
    args = jax.random.key(0), jnp.zeros((1, side, side, 1)), jnp.zeros(1)
    params = jax.eval_shape(variant.init, *args)["params"]
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
      sources[path] = Source(_name(path), _layout(path, leaf, model.null_class))
  return sources


def _name(path: str) -> str:
  """input_3_0/in_conv/kernel -> input_blocks.3.0.in_layers.2.weight."""
  module, *inner, leaf = path.split("/")
  prefix, *numbers = module.split("_")
  if inner == ["conv"] and prefix == "input":
    inner = ["op"]
  inner = [INNER.get(name, name) for name in inner]
  return ".".join([PREFIXES[prefix], *numbers, *inner, LEAVES.get(leaf, leaf)])


def _layout(path, leaf, null_class):
  """Kernels are convolutions (4 axes) or linear maps (2); the rest stays, but the null class."""
  if path == "classes/embedding" and null_class:
    return _with_null_row
  return {4: conv, 2: dense}[leaf.ndim] if path.endswith("kernel") else same


def _with_null_row(table: np.ndarray) -> np.ndarray:
  """[num_classes, e] -> [num_classes + 1, e]."""
  return np.pad(table, ((0, 1), (0, 0)))
