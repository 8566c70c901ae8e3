"""The checkpoints of yang-song/score_sde and score_sde_pytorch: the names there of the parameters
of our ddpm and ncsnpp.

PyTorch numbers the modules of the network in the order they are called, JAX those of a kind; inside
a block both have the same names. So the rule is: our modules in the order of their calls, renamed.
"""

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from checkpoint_formats.layouts import Source, conv, dense, same

KINDS = {
  "ResnetBlock": "ResnetBlockDDPM",
  "BigGANBlock": "ResnetBlockBigGAN",
  "AttentionBlock": "AttnBlock",
  "FourierEmbedding": "GaussianFourierProjection",
}
BLOCKS = {"ResnetBlock", "BigGANBlock", "AttentionBlock"}  # their names end in "pp" for ncsnpp
MATRICES = {"query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"}  # never transposed


def torch_names(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, Source]:
  """Sources in a PyTorch state_dict without the prefix "module.", for images [h, w, c]."""
  order, params = trace(model, shape)
  prefixes = {name: f"all_modules.{i}" for i, name in enumerate(order)}

  def rename(path, leaf):
    module, inner, name = _inside(model, path)
    if name in ("kernel", "scale"):
      name = "weight"
    inner = ["Conv" if module.startswith("Combine") else n for n in inner]
    layout = same
    if path.endswith("kernel") and name != "W":
      layout = conv if leaf.ndim == 4 else dense
    return Source(".".join([prefixes[module], *inner, name]), layout)

  return _sources(params, prefixes, rename)


def jax_names(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, Source]:
  """Sources in flattened JAX parameters, their paths joined by "/", for images [h, w, c]."""
  order, params = trace(model, shape)
  suffix = "pp" if type(model).__module__ == "models.ncsnpp" else ""
  prefixes, counts = {}, collections.Counter()
  for name in order:
    kind = name.rsplit("_", 1)[0]
    theirs = KINDS.get(kind, kind) + (suffix if kind in BLOCKS else "")
    prefixes[name] = f"{theirs}_{counts[theirs]}"
    counts[theirs] += 1

  def rename(path, _):
    module, inner, name = _inside(model, path)
    if inner == ["Conv2d_0"] and name == "kernel":
      name = "weight"
    return Source("/".join([prefixes[module], *inner, name]))

  return _sources(params, prefixes, rename)


def trace(model, shape):
  """The names of the top-level modules in the order of their calls, and {path: abstract parameter}
  of the network for images [h, w, c].
  """
  order = []

  def record(call, args, kwargs, context):
    if len(context.module.path) == 1 and context.module.path[0] not in order:
      order.append(context.module.path[0])
    return call(*args, **kwargs)

  plain = model.clone(remat=False)
  with nn.intercept_methods(record):
    params = jax.eval_shape(plain.init, jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1))
  return [name for name in order if name != "classes"], flatten_dict(params["params"], sep="/")


def _sources(params, prefixes: dict, rename: Callable) -> dict[str, Source]:
  """A source for every parameter of theirs: the table of classes is ours alone."""
  return {path: rename(path, p) for path, p in params.items() if path.split("/")[0] in prefixes}


def _inside(model, path: str) -> tuple[str, list[str], str]:
  """Our module, and their names inside of it: of the submodule, if any, and of the array."""
  module, *inner, name = path.split("/")
  if inner == ["shortcut"]:
    inner = ["Conv_2" if module.startswith("BigGAN") else "NIN_0"]
  if module.startswith(("Downsample", "Upsample")) and getattr(model, "fir", False):
    inner = ["Conv2d_0"]
  inner = [MATRICES.get(n, n) for n in inner]
  if inner and inner[0].startswith("NIN"):
    name = {"kernel": "W", "bias": "b"}[name]
  return module, inner, "W" if name == "frequencies" else name
