"""The checkpoints of ermongroup/ncsn (CondRefineNetDilated) and ermongroup/ncsnv2 (NCSNv2,
NCSNv2Deeper, NCSNv2Deepest): which of their arrays is which of our parameters.

Names are without the "module." of DataParallel. Weights in the files, as torch.load gives them:
ncsn a list [model, optimizer]; ncsnv2 a list [model, optimizer, epoch, step, ema], ema a dict that
has no prefix and lacks the buffer "sigmas".
"""

import re

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from checkpoint_formats.layouts import Source, conv, same


def ncsn(model: nn.Module) -> dict[str, Source]:
  """Sources of the parameters of a `models.ncsn.Model`."""
  return _sources(model)


def ncsnv2(model: nn.Module) -> dict[str, Source]:
  """Sources of the parameters of a `models.ncsnv2.Model`; its sigmas are the SDE's, not the
  network's.
  """
  return _sources(model)


def _sources(model):
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
  return {path: _source(path) for path in flatten_dict(params["params"], sep="/")}


def _source(path: str) -> Source:
  """Our names are the files' but for the order of an RCU's numbers and the index in a list."""
  name = re.sub(r"(conv|norm)_(\d)_(\d)/", r"\2_\3_\1/", path)
  name = re.sub(r"_(\d)/", r".\1/", name)
  name = re.sub(r"(kernel|embedding)$", "weight", name)
  return Source(name.replace("/", "."), conv if path.endswith("kernel") else same)
