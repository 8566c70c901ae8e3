"""The pickles of NVlabs/edm: networks stored with their source code, read without running it; and
the names there of the parameters of our ncsnpp and adm.
"""

import collections
import io
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from flax import linen as nn

from checkpoint_formats.layouts import Source, conv, dense, same
from checkpoint_formats.score_sde import trace
from errors import RunError
from models.layers.adm import count_heads

UNUSED = re.compile(r"(.*\.)?resample_filter")  # constants of the architecture
# what a network may do without: the conditions of the augmentation are zero but in training
OPTIONAL = {"model.map_augment.weight"}

# names of ours -> names in the file, {0} the height of the image; the names of ncsnpp are first
SINGLE = {
  "FourierEmbedding_0": "map_noise",
  "augmentation": "map_augment",
  "Dense_0": "map_layer0",
  "Dense_1": "map_layer1",
  "Conv_0": "enc.{0}x{0}_conv",
  "GroupNorm_0": "dec.{0}x{0}_aux_norm",
  "Conv_1": "dec.{0}x{0}_aux_conv",
  "time_0": "map_layer0",
  "time_2": "map_layer1",
  "input_0_0": "enc.{0}x{0}_conv",
  "head_0": "out_norm",
  "head_2": "out_conv",
}
BLOCKS = ("BigGANBlock", "input", "middle", "output")  # how the names of our blocks begin
INSIDE = {
  "GroupNorm_0": "norm0",
  "Conv_0": "conv0",
  "Dense_0": "affine",
  "GroupNorm_1": "norm1",
  "Conv_1": "conv1",
  "in_norm": "norm0",
  "in_conv": "conv0",
  "embedding": "affine",
  "out_norm": "norm1",
  "out_conv": "conv1",
  "shortcut": "skip",
}
PARTS = ("query", "key", "value")
ATTENTION = {"GroupNorm_0": "norm2", "norm": "norm2", "qkv": "qkv", "out": "proj"}
ATTENTION |= dict.fromkeys(PARTS, "qkv")
LEAVES = {"bias": "bias", "frequencies": "freqs"}  # the rest is "weight"


class Record:
  """Stands for an object of any class in the file: keeps its data, does nothing."""

  def __new__(cls, *args, **kwargs):
    """Instead of __init__, which pickle calls for some objects only."""
    record = super().__new__(cls)
    record.args, record.state, record.items = args, kwargs, {}
    return record

  def __setstate__(self, state):
    self.state = state

  def __setitem__(self, key, value):
    self.items[key] = value

  def append(self, value):
    """Called by pickle for subclasses of list."""
    self.items[len(self.items)] = value


def _storage(data: bytes):
  """The numbers of a tensor, a file of PyTorch inside of the pickle."""
  try:
    import torch
  except ImportError as error:
    raise RunError("this checkpoint needs `pip install -r requirements-torch.txt`") from error
  return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage, offset, size, stride, *_) -> np.ndarray:
  import torch

  empty = torch.empty(0, dtype=storage.dtype)
  tensor = empty.set_(storage._untyped_storage, offset, tuple(size), tuple(stride))
  return (tensor.float() if tensor.is_floating_point() else tensor).numpy().copy()


REBUILD = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  ("torch.storage", "_load_from_bytes"): _storage,
  ("torch._utils", "_rebuild_tensor_v2"): _tensor,
  ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
  ("torch", "Size"): lambda size=(): tuple(size),
}


class DataUnpickler(pickle.Unpickler):
  """Rebuilds tensors; every other class or function of the file becomes an inert `Record`."""

  def find_class(self, module: str, name: str) -> Any:
    """Never imports what the file names."""
    return REBUILD.get((module, name), Record)


def _state(record: Record) -> dict:
  """The attributes of a pickled object; a persistent class keeps them in its only argument."""
  if record.args and isinstance(record.args[0], dict):
    return record.args[0].get("state") or {}
  return record.state if isinstance(record.state, dict) else {}


def parameters(record: Record, prefix: str = "") -> dict[str, np.ndarray]:
  """{dotted name: array} of the parameters and buffers of a pickled network."""
  state, found = _state(record), {}
  for kind in ("_parameters", "_buffers"):
    arrays = state.get(kind) or {}
    found |= {prefix + name: a for name, a in arrays.items() if isinstance(a, np.ndarray)}
  for name, module in (state.get("_modules") or {}).items():
    if isinstance(module, Record):
      found |= parameters(module, f"{prefix}{name}.")
  return found


def read(data: bytes) -> dict[str, dict[str, np.ndarray]]:
  """{entry of the file, such as "ema": its parameters}."""
  content = DataUnpickler(io.BytesIO(data)).load()
  entries = content.items() if isinstance(content, dict) else {}.items()
  networks = {name: parameters(entry) for name, entry in entries if isinstance(entry, Record)}
  used = lambda arrays: {k: a for k, a in arrays.items() if not UNUSED.fullmatch(k)}
  return {name: used(arrays) for name, arrays in networks.items() if arrays}


def names(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, Source]:
  """Sources of the parameters of an ncsnpp or adm, for images [h, w, c].

  EDM calls its blocks in the same order as we do, attention as a part of the block before it.
  """
  order, params = trace(model, shape)
  blocks = _blocks(shape[0], len(model.ch_mult), model.num_res_blocks)
  places, sources = _places(order, params, shape[0], blocks), {}
  if getattr(model, "classes_first", True):
    places["classes"] = {"": "map_label"}
  for path, leaf in params.items():
    module, *inner, name = path.split("/")
    place = places.get(module, {}).get("/".join(inner))
    if place:
      theirs = f"model.{place}.{LEAVES.get(name, 'weight')}"
      sources[path] = Source(theirs, _layout(model, path, leaf))
  return sources


def _blocks(height: int, levels: int, count: int) -> Iterator[str]:
  """EDM's names of its residual blocks, in the order of their calls; `count` per level."""
  sides = [f"{height >> level}x{height >> level}" for level in range(levels)]
  for side in sides:
    if side != sides[0]:
      yield f"enc.{side}_down"
    yield from (f"enc.{side}_block{i}" for i in range(count))
  yield from (f"dec.{sides[-1]}_in{i}" for i in range(2))
  for side in reversed(sides):
    if side != sides[-1]:
      yield f"dec.{side}_up"
    yield from (f"dec.{side}_block{i}" for i in range(count + 1))


def _places(order: list[str], params: dict, height: int, blocks: Iterator[str]) -> dict:
  """{our module: {our submodule, or "" for the module itself: EDM's module}}."""
  places, block = {}, ""
  for name in order:
    if name in SINGLE:
      places[name] = {"": SINGLE[name].format(height)}
    elif f"{name}/out/kernel" in params:
      places[name] = {ours: f"{block}.{theirs}" for ours, theirs in ATTENTION.items()}
    elif name.startswith("Downsample"):
      places[name] = {"Conv_0": block.replace("_down", "_aux_residual")}
    elif name.startswith(BLOCKS):
      block = next(blocks)
      places[name] = {ours: f"{block}.{theirs}" for ours, theirs in INSIDE.items()}
  return places


def _layout(model: nn.Module, path: str, leaf) -> Callable[[np.ndarray], np.ndarray]:
  """Kernels are convolutions (4 axes) or linear maps (2); the rest stays, but attention's maps and
  the table of classes.
  """
  _, *inner, name = path.split("/")
  linear = {4: conv, 2: dense}[leaf.ndim] if name == "kernel" else same
  if inner and inner[-1] in PARTS:
    part = PARTS.index(inner[-1])
    return lambda array: linear(array[part::3])
  if inner == ["qkv"]:
    heads = count_heads(leaf.shape[-1] // 3, model.num_heads, model.num_head_channels)
    axis = 0 if model.use_new_attention_order else 1
    return lambda array: linear(_qkv(array, heads, axis))
  if path == "classes/embedding":
    return lambda array: np.pad(array.T, ((0, model.null_class), (0, 0)))
  return linear


def _qkv(array: np.ndarray, heads: int, axis: int) -> np.ndarray:
  """Rows ordered [heads, channels, 3], here with the axis of 3 moved to `axis`."""
  split = array.reshape(heads, -1, 3, *array.shape[1:])
  return np.moveaxis(split, 2, axis).reshape(array.shape)
