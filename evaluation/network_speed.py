"""How fast the DDPM++ network runs against the same network in PyTorch, and against itself with
flax's own convolution and group norm, on the same cores: python -m evaluation.network_speed
[rounds].

All have the same parameters, and their outputs are compared first. Rounds alternate in one process,
so that a busy machine slows all; medians of the elapsed and of the processor's time are compared.
PyTorch (pip install torch) runs eagerly in its channels-last layout with the fused Adam; its
threads wait passively (OMP_WAIT_POLICY): spinning ones lose most of their time to other processes
on a busy machine, which would flatter us.
"""

import importlib
import math
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from models import ncsnpp
from models.layers.conv import Conv
from models.layers.norm import GroupNorm

BATCH, SIZE, MULTIPLIERS, ATTENTION = 16, 32, (1, 2, 2, 2), 16
NETWORK = ncsnpp.Model(
  nf=64,
  ch_mult=MULTIPLIERS,
  num_res_blocks=1,
  attn_resolutions=(ATTENTION,),
  fir=False,
  progressive_input="none",
  embedding_type="positional",
)
LEARNING_RATE = 1e-4


class TorchNetwork:
  """NETWORK for PyTorch, on a copy of its parameters; images are [b, c, h, w], channels last."""

  def __init__(self, torch, params):
    self.torch, self.f = torch, torch.nn.functional
    self.params = jax.tree_util.tree_map_with_path(self._convert, params)
    self.leaves = jax.tree.leaves(self.params)

  def _convert(self, path, array):
    """Kernels [h, w, in, out] -> [out, in, h, w] and [in, out] -> [out, in]."""
    tensor = self.torch.from_numpy(np.array(array))
    if path[-1].key == "kernel":
      tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    layout = self.torch.channels_last if tensor.ndim == 4 else self.torch.contiguous_format
    return tensor.contiguous(memory_format=layout).requires_grad_()

  def __call__(self, x, c_noise):
    """The output for images [b, c, h, w] and time labels [b]."""
    counts = {"BigGANBlock": 0, "AttentionBlock": 0}

    def call(kind, function, *args):  # the next block of the kind, in the order of flax's names
      counts[kind] += 1
      return function(self.params[f"{kind}_{counts[kind] - 1}"], *args)

    embedding = self._embedding(c_noise)
    block = lambda h, *change: call("BigGANBlock", self._block, h, embedding, *change)
    attention = lambda h: call("AttentionBlock", self._attention, h)
    skips = [self._conv(self.params["Conv_0"], x)]
    for level in range(len(MULTIPLIERS)):
      if level:
        skips.append(block(skips[-1], lambda h: self.f.avg_pool2d(h, 2)))
      h = block(skips[-1])
      skips.append(attention(h) if h.shape[2] == ATTENTION else h)
    h = block(attention(block(skips[-1])))
    for level in reversed(range(len(MULTIPLIERS))):
      for _ in range(2):
        h = block(self.torch.cat([h, skips.pop()], 1))
      h = attention(h) if h.shape[2] == ATTENTION else h
      h = block(h, lambda h: self.f.interpolate(h, scale_factor=2)) if level else h
    h = self.f.silu(self._norm(self.params["GroupNorm_0"], h))
    return self._conv(self.params["Conv_1"], h)

  def _embedding(self, c_noise):
    half = NETWORK.nf // 2
    exponents = self.torch.arange(half) / (half - 1)
    angles = c_noise[:, None] * self.torch.exp(-math.log(1e4) * exponents)
    features = self.torch.cat([angles.sin(), angles.cos()], 1)
    hidden = self.f.silu(self._dense(self.params["Dense_0"], features))
    return self.f.silu(self._dense(self.params["Dense_1"], hidden))

  def _conv(self, params, x):
    kernel = params["kernel"]
    return self.f.conv2d(x, kernel, params["bias"], padding=kernel.shape[-1] // 2)

  def _dense(self, params, x):
    return self.f.linear(x, params["kernel"], params["bias"])

  def _norm(self, params, x):
    groups = min(32, x.shape[1] // 4)
    return self.f.group_norm(x, groups, params["scale"], params["bias"], eps=1e-6)

  def _block(self, params, x, embedding, change=lambda h: h):
    h = change(self.f.silu(self._norm(params["GroupNorm_0"], x)))
    h = self._conv(params["Conv_0"], h)
    h = h + self._dense(params["Dense_0"], embedding)[:, :, None, None]
    h = self._conv(params["Conv_1"], self.f.silu(self._norm(params["GroupNorm_1"], h)))
    x = change(x)
    x = self._conv(params["shortcut"], x) if "shortcut" in params else x
    return (x + h) * math.sqrt(0.5)

  def _attention(self, params, x):
    b, c, height, width = x.shape
    h = self._norm(params["GroupNorm_0"], x).permute(0, 2, 3, 1).reshape(b, 1, height * width, c)
    query, key, value = (self._dense(params[name], h) for name in ("query", "key", "value"))
    h = self._dense(params["out"], self.f.scaled_dot_product_attention(query, key, value))
    return (x + h.reshape(b, height, width, c).permute(0, 3, 1, 2)) * math.sqrt(0.5)


def apply(params, x, c_noise):
  """The output [b, h, w, c]."""
  return NETWORK.apply({"params": params}, x, c_noise)


def apply_flax(*args):
  """The same with flax's layers."""
  with nn.intercept_methods(_flax_layer):
    return apply(*args)


def _flax_layer(call, args, kwargs, context):
  """What flax's layer of the same fields gives, for one of ours that stands in for it."""
  module = context.module
  layer = {Conv: nn.Conv, GroupNorm: nn.GroupNorm}.get(type(module))
  if layer is None or context.method_name != "__call__":
    return call(*args, **kwargs)
  names = type(module).__annotations__.keys() - {"parent", "name"}
  fields = {name: getattr(module, name) for name in names}
  return layer(**fields, parent=None).apply({"params": module.variables["params"]}, *args)


def in_jax(network, params, x, c_noise):
  """Two functions without arguments: the output [b, h, w, c], and a train step."""
  optimizer = optax.adam(LEARNING_RATE)
  loss = lambda *args: (network(*args) ** 2).mean()

  def step(state, x, c_noise):
    value, gradient = jax.value_and_grad(loss)(state[0], x, c_noise)
    updates, moments = optimizer.update(gradient, state[1])
    return (optax.apply_updates(state[0], updates), moments), value

  forward = jax.jit(network)
  compiled = jax.jit(step, donate_argnums=0)
  state = [jax.tree.map(jnp.copy, (params, optimizer.init(params)))]

  def train():
    state[0], value = compiled(state[0], x, c_noise)
    return float(value)

  return lambda: np.asarray(forward(params, x, c_noise)), train


def in_torch(torch, params, x, c_noise):
  """The same in PyTorch."""
  network = TorchNetwork(torch, params)
  optimizer = torch.optim.Adam(network.leaves, LEARNING_RATE, fused=True)
  x, c_noise = (
    torch.from_numpy(np.array(x)).permute(0, 3, 1, 2),
    torch.from_numpy(np.array(c_noise)),
  )

  def forward():
    with torch.no_grad():
      return network(x, c_noise).permute(0, 2, 3, 1).numpy()

  def train():
    optimizer.zero_grad()
    loss = (network(x, c_noise) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss.item()

  return forward, train


def problem():
  """Parameters, all random so that no layer is silent, images [b, h, w, c] and time labels [b]."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
  c_noise = jnp.linspace(1.0, 999.0, BATCH)
  params = jax.eval_shape(NETWORK.init, jax.random.key(0), x, c_noise)["params"]
  draw = lambda leaf: jnp.asarray(rng.normal(scale=0.03, size=leaf.shape), leaf.dtype)
  return jax.tree.map(draw, params), x, c_noise


def measure(functions, rounds: int) -> np.ndarray:
  """Seconds [2, rounds, m, n], elapsed and of the processor, of each function of m rows of n; a
  first round warms up and is dropped.
  """
  seconds = np.empty((rounds + 1, *np.shape(functions), 2))
  clocks = lambda: np.array([time.perf_counter(), time.process_time()])
  for index in np.ndindex(seconds.shape[:3]):
    begin = clocks()
    functions[index[1]][index[2]]()
    seconds[index] = clocks() - begin
  return np.moveaxis(seconds[1:], -1, 0)


def main() -> None:
  """Checks that the networks agree; prints the medians and their ratios."""
  os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
  try:
    torch = importlib.import_module("torch")
  except ModuleNotFoundError:
    sys.exit("evaluation.network_speed compares with PyTorch: pip install torch")
  inputs = problem()
  runs = (in_jax(apply, *inputs), in_torch(torch, *inputs), in_jax(apply_flax, *inputs))
  functions = list(zip(*runs))
  mine, *others = (forward() for forward in functions[0])
  for other in others:
    np.testing.assert_allclose(mine, other, atol=1e-3)
  seconds = measure(functions, int(sys.argv[1]) if len(sys.argv) > 1 else 10)
  for number, name in enumerate(("forward pass", "train step")):
    for clock, times in zip(("elapsed", "processor"), seconds[:, :, number]):
      ms = np.median(times, axis=0) * 1e3
      ratios = np.median(times[:, :1] / times, axis=0)
      parts = (
        f"{n} {t:.0f} ms ({r:.2f})" for n, t, r in zip(("PyTorch", "flax"), ms[1:], ratios[1:])
      )
      print(f"{name}, {clock}: {ms[0]:.0f} ms; {', '.join(parts)}")


if __name__ == "__main__":
  main()
