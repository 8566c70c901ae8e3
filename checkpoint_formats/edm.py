"""The pickles of NVlabs/edm: networks stored with their source code, read without running it."""

import collections
import io
import pickle
from typing import Any

import numpy as np

from errors import RunError


class Record:
  """Stands for an object of any class in the file: keeps its data, does nothing."""

  def __init__(self, *args, **kwargs):
    self.args, self.state, self.items = args, kwargs, {}

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
  return {name: arrays for name, arrays in networks.items() if arrays}
