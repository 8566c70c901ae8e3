"""What the network of a configuration is made of and what it costs, from shapes alone: nothing is
computed or compiled.
"""

import functools
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree
from ml_collections import ConfigDict

import ema
from experiment import abstract_init
from models import dit
from models.layers import adm, biggan, refinenet, unet
from optimizers import make_optimizer
from sde_lib import make_sde

RESIDUAL = "residual blocks"
KINDS = {
  RESIDUAL: (
    unet.ResnetBlock,
    biggan.BigGANBlock,
    adm.ResBlock,
    refinenet.ResidualBlock,
  ),
  "attention blocks": (unet.AttentionBlock, adm.AttentionBlock),
  "transformer blocks": (dit.Block,),
  "RefineBlocks": (refinenet.RefineBlock,),
  "resampling layers": (unet.Downsample, unet.Upsample, adm.Downsample, adm.Upsample),
}
FIXED = (biggan.FourierEmbedding,)  # its parameters are drawn once and never trained
MEMORIES = (8, 16, 24, 40, 80)  # GiB


class Block(NamedTuple):
  """A call of a block of the network: its kind, and whether it changes height and width."""

  kind: str
  resamples: bool


class Cost(NamedTuple):
  """What a network costs; sizes in bytes."""

  num_parameters: int
  num_fixed: int  # of the parameters
  flops: float  # of the forward pass of one image, a multiply-add counted as two
  activations: int  # kept for the backward pass, per image


def _arguments(model: nn.Module, shape: tuple[int, ...], batch_size: int) -> tuple:
  """Shapes of (x, c_noise, labels) as the network is called."""
  array = jax.ShapeDtypeStruct
  labelled = getattr(model, "num_classes", 0)
  labels = array((batch_size,), jnp.int32) if labelled else None
  return array((batch_size, *shape), jnp.float32), array((batch_size,), jnp.float32), labels


def num_bytes(tree: PyTree) -> int:
  """Memory of the arrays of a tree; random keys count nothing."""
  return sum(leaf.size * getattr(leaf.dtype, "itemsize", 0) for leaf in jax.tree.leaves(tree))


def flops(model: nn.Module, shape: tuple[int, ...]) -> float:
  """Floating-point operations of the forward pass of one image, by XLA's analysis of the program
  before it is optimised.
  """
  params = abstract_init(model, shape)[1]
  forward = jax.jit(lambda params, *args: model.apply({"params": params}, *args))
  return forward.lower(params, *_arguments(model, shape, 1)).cost_analysis()["flops"]


def activations(model: nn.Module, shape: tuple[int, ...]) -> int:
  """Bytes that one image more makes the forward pass of a training step keep for the backward
  pass, as JAX traces it: what a compiler fuses or computes again comes off.
  """
  params = abstract_init(model, shape)[1]

  def kept(params, x, c_noise, labels):
    rngs = {"dropout": jax.random.key(0)}
    loss = lambda params: model.apply({"params": params}, x, c_noise, labels, True, rngs=rngs)
    return jax.tree.leaves(jax.vjp(loss, params)[1])

  one, two = (num_bytes(jax.eval_shape(kept, params, *_arguments(model, shape, b))) for b in (1, 2))
  return two - one


def _trace(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[Block], int]:
  """The blocks in the order of their calls, and the number of fixed parameters."""
  blocks, fixed = [], []

  def record(call, args, kwargs, context):
    out, module = call(*args, **kwargs), context.module
    for kind, classes in KINDS.items():
      if isinstance(module, classes) and context.method_name == "__call__":
        size = getattr(args[0], "shape", out.shape)[1:-1]
        blocks.append(Block(kind, size != out.shape[1:-1]))
    if isinstance(module, FIXED):
      fixed.extend(leaf.size for leaf in jax.tree.leaves(module.variables["params"]))
    return out

  plain = model.clone(remat=False) if getattr(model, "remat", False) else model
  with nn.intercept_methods(record):
    jax.eval_shape(plain.init, jax.random.key(0), *_arguments(plain, shape, 1))
  return blocks, sum(fixed)


def count_blocks(model: nn.Module, blocks: list[Block]) -> dict[str, str]:
  """{kind: "total", or of a U-Net "total: encoder / middle / decoder"}, "(+n)" for residual blocks
  that resample.

  The U-Nets have num_res_blocks residual blocks per level going down, then two in the middle.
  """
  down = len(getattr(model, "ch_mult", ())) * getattr(model, "num_res_blocks", 0)
  counts, seen = Counter(), 0
  for kind, resamples in blocks:
    seen += kind == RESIDUAL and not resamples
    phase = 0 if seen <= down else 1 if seen <= down + 2 else 2
    counts[kind, phase, kind == RESIDUAL and resamples] += 1
  texts = {}
  for kind in KINDS:
    cells = [(counts[kind, phase, False], counts[kind, phase, True]) for phase in range(3)]
    parts = " / ".join(f"{n} (+{more})" if more else f"{n}" for n, more in cells)
    if total := sum(map(sum, cells)):
      texts[kind] = f"{total}: {parts}" if down else f"{total}"
  return texts


@functools.lru_cache(maxsize=16)
def measure(model: nn.Module, shape: tuple[int, ...]) -> tuple[Cost, dict[str, str]]:
  """What the network costs for images of `shape`, and its blocks."""
  blocks, num_fixed = _trace(model, shape)
  num_parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_init(model, shape)[1]))
  cost = Cost(num_parameters, num_fixed, flops(model, shape), activations(model, shape))
  return cost, count_blocks(model, blocks)


def state_bytes(model: nn.Module, shape: tuple[int, ...], config: ConfigDict) -> dict[str, int]:
  """Memory of what a training step holds whatever the batch."""
  params = abstract_init(model, shape)[1]
  sde = make_sde(config.sde.name, **config.sde.args)
  size, optimizer = num_bytes(params), make_optimizer(config, sde)
  moments, averages = num_bytes(jax.eval_shape(optimizer.init, params)), len(ema.decays(config))
  return {"parameters": size, "optimizer": moments, "EMA": averages * size, "gradients": size}


def largest_batch(memory: float, state: int, activations: int) -> int:
  """Images whose activations fit into `memory` bytes beside the state; 0 where not even it fits."""
  return max(0, int(memory - state) // activations)


def report(model: nn.Module, shape: tuple[int, ...], config: ConfigDict) -> str:
  """The table of `--mode=inspect`."""
  cost, blocks = measure(model, shape)
  parts = state_bytes(model, shape, config)
  state = sum(parts.values())
  batches = [(size, largest_batch(size * 2**30, state, cost.activations)) for size in MEMORIES]
  mib = lambda size: f"{size / 2**20:,.0f} MiB"
  rows = {
    "parameters": f"{cost.num_parameters:,}, of them {cost.num_fixed:,} fixed",
    **blocks,
    "forward pass": f"{cost.flops / 1e9:,.3f} GFLOP per image",
    "activations": f"{cost.activations / 2**20:,.1f} MiB per image of a training step",
    "training state": f"{mib(state)}: " + ", ".join(f"{k} {mib(v)}" for k, v in parts.items()),
    "largest batch": ", ".join(f"{size} GiB: {count:,}" for size, count in batches),
  }
  lines = [f"network {config.model.name!r}, images of {shape}\n"]
  lines += [f"  {name:<19}{text}" for name, text in rows.items()]
  if any(":" in text for text in blocks.values()):
    lines.append("\nblocks: all: encoder / middle / decoder; (+n) residual blocks that resample")
  lines.append(
    "\nlargest batch: per device, from state and activations; compilers save some of both"
  )
  return "\n".join(lines)
