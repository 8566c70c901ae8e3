"""Published weights of other code as parameters of our networks. The format of a file is recognised
by its content; nothing in it is ever executed.
"""

import importlib
import pickle
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from checkpoint_formats import edm, tensorflow_bundle
from errors import ConfigError, RunError, check

WEIGHTS = ("ema", "plain")
LEGACY_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number at the head of files before 1.6
BUFFERS = {"sigmas"}  # arrays of the files that are not parameters: the noise levels
UNTRAINED = r"all_modules\.\d+\.W"  # the Fourier frequencies of score_sde have no average
UNREADABLE = (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, RuntimeError)
AVERAGE = "/ExponentialMovingAverage"  # TensorFlow's ending of an averaged variable
SHOWN = 20  # lines of a failed match

# (format, module of the network): (file in checkpoint_formats, function). The names of
# those in BY_SHAPE depend on the size of the image, because attention does.
MAPPINGS = {
  ("score_sde (PyTorch)", "models.ddpm"): ("score_sde", "torch_names"),
  ("score_sde (PyTorch)", "models.ncsnpp"): ("score_sde", "torch_names"),
  ("score_sde (JAX)", "models.ddpm"): ("score_sde", "jax_names"),
  ("score_sde (JAX)", "models.ncsnpp"): ("score_sde", "jax_names"),
  ("TensorFlow", "models.ddpm"): ("ddpm", "tensorflow_names"),
  ("ncsn", "models.ncsn"): ("ncsn", "ncsn"),
  ("ncsn", "models.ncsnv2"): ("ncsn", "ncsnv2"),
  ("state_dict", "models.adm"): ("improved_diffusion", "adm"),
  ("EDM", "models.ncsnpp"): ("edm", "names"),
  ("EDM", "models.adm"): ("edm", "names"),
}

BY_SHAPE = {"score_sde", "ddpm", "edm"}

Arrays = dict[str, np.ndarray]


def load_variables(
  path: str | Path,
  model: nn.Module,
  *,
  weights: str = "ema",
  shape: tuple[int, int, int] | None = None,
) -> PyTree:
  """The variables of a published checkpoint, for `model.apply(variables, x, c_noise, labels,
  train)`.

  Args:
    model: the network as the checkpoint was trained, a `Model` of models/.
    weights: "ema", the average (a file without one gives its only weights, with a warning), or
      "plain".
    shape: of one image, [h, w, c]; None tries the sizes at which attention differs, of 3 and of 1
      channels.

  Raises:
    ConfigError: the file has not the parameters of the network; lists what differs.
    RunError: the file cannot be read.
  """
  kind, arrays = read(path, weights)
  mapping = _mapping(kind, model)
  best = None
  for candidate in [shape] if shape else _shapes(model):
    params, problems = _match(model, candidate, mapping, arrays)
    if not problems:
      return {"params": params}
    if best is None or len(problems) < len(best):
      best = problems
  raise _misfit(f"{path} ({kind}) does not fit {type(model).__module__}", best)


def _misfit(what: str, problems: list[str]) -> ConfigError:
  lines = [f"  {line}" for line in problems]
  if len(lines) > SHOWN:  # what is missing stands first, what is unexpected last
    half = SHOWN // 2
    lines = [*lines[:half], f"  and {len(lines) - SHOWN} more", *lines[-half:]]
  mend = "  mend:  give the network the options that the checkpoint was trained with"
  return ConfigError("\n".join([f"{what}:", *lines, mend]))


def _mapping(kind: str, model: nn.Module) -> Callable:
  """(model, shape) -> {path of ours: Source}."""
  module = type(model).__module__
  formats = sorted({name for name, other in MAPPINGS if other == module})
  if (kind, module) not in MAPPINGS:
    legal = ", ".join(formats) or "none"
    raise ConfigError(f"a checkpoint of format {kind} has no weights for {module}: legal: {legal}")
  file, name = MAPPINGS[kind, module]
  function = getattr(importlib.import_module(f"checkpoint_formats.{file}"), name)
  return function if file in BY_SHAPE else lambda model, _: function(model)


def _shapes(model: nn.Module) -> list[tuple[int, int, int]]:
  """Images that differ in where attention stands; the size matters for nothing else."""
  levels = len(getattr(model, "ch_mult", (1,) * 6))
  heights, factor = getattr(model, "attn_resolutions", ()), 2 ** (levels - 1)
  sizes = {height << level for height in heights for level in range(levels)}
  without_attention = factor * (max(heights, default=1) + 1)
  sizes = [*sorted(size for size in sizes if size % factor == 0), without_attention]
  return [(size, size, channels) for channels in (3, 1) for size in sizes]


def _match(model, shape, mapping: Callable, arrays: Arrays) -> tuple[PyTree, list[str]]:
  """The parameters, and a line for everything that is missing, left over or of another shape."""
  args = jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1)
  wanted = flatten_dict(jax.eval_shape(model.init, *args)["params"], sep="/")
  sources, params, problems = mapping(model, shape), {}, []
  left = {name: array for name, array in arrays.items() if name not in edm.OPTIONAL}
  for path, leaf in wanted.items():
    if path not in sources:
      problems.append(f"missing: the format has nothing for {path} {leaf.shape}")
      continue
    name, layout = sources[path]
    if name not in arrays:
      problems.append(f"missing: {name}, for {path} {leaf.shape}")
      continue
    array = arrays[name]
    left.pop(name, None)  # several of ours may be parts of one of theirs
    try:
      params[path] = jnp.asarray(layout(array), leaf.dtype)
    except ValueError:
      params[path] = array
    if params[path].shape != leaf.shape:
      problems.append(f"shape: {name} is {array.shape}, {path} expects {leaf.shape}")
  problems += [f"unexpected: {name} {array.shape}" for name, array in left.items()]
  return unflatten_dict(params, sep="/"), problems


def read(path: str | Path, weights: str = "ema") -> tuple[str, Arrays]:
  """The format of a checkpoint file and its arrays by their names there, without "module."."""
  path = Path(path)
  check(weights in WEIGHTS, "weights", weights, " or ".join(map(repr, WEIGHTS)))
  file = path if path.is_file() else Path(f"{path}.index")
  check(file.is_file(), "checkpoint", str(path), "a file, or the prefix of TensorFlow's files")
  path = file
  data = path.read_bytes()
  if tensorflow_bundle.is_bundle(data):
    return _from_tensorflow(path, weights)
  if data.startswith(b"PK\x03\x04") or LEGACY_TORCH in data[:20]:
    return _from_torch(path, weights)
  if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
    return _from_pickle(path, data, weights)
  if data[:1] and (data[0] >> 4 == 8 or data[0] in (0xDE, 0xDF)):
    return _from_flax(path, data, weights)
  raise RunError(f"{path} is no checkpoint of PyTorch, flax or TensorFlow, nor a pickle")


def _from_torch(path, weights):
  try:
    import torch
  except ImportError as error:
    raise RunError(f"{path} needs PyTorch: pip install -r requirements-torch.txt") from error
  try:
    content = torch.load(path, map_location="cpu", weights_only=True)
  except UNREADABLE as error:
    reason = str(error).partition("\n")[0]
    raise RunError(f"{path} is damaged, or holds more than tensors: {reason}") from error
  if isinstance(content, dict) and {"model", "ema"} <= content.keys():
    plain = _arrays(content["model"])
    average = _averaged(path, plain, content["ema"]["shadow_params"])
    return "score_sde (PyTorch)", _chosen(path, weights, plain, average)
  if isinstance(content, list) and content and isinstance(content[0], dict):
    average = _arrays(content[4]) if len(content) > 4 else None
    return "ncsn", _chosen(path, weights, _arrays(content[0]), average)
  if isinstance(content, dict) and all(map(torch.is_tensor, content.values())):
    return "state_dict", _chosen(path, weights, _arrays(content), None)
  raise RunError(f"{path} is a file of PyTorch whose layout is not known")


def _arrays(state: dict) -> Arrays:
  """Tensors as float32 arrays, under names without the prefix of DataParallel."""
  named = {name.removeprefix("module."): tensor for name, tensor in state.items()}
  return {name: t.detach().float().numpy() for name, t in named.items() if name not in BUFFERS}


def _averaged(path, plain: Arrays, shadow: list) -> Arrays:
  """score_sde's averages are a list, in the order of the parameters that are trained."""
  trained = [name for name in plain if not re.fullmatch(UNTRAINED, name)]
  average = [tensor.detach().float().numpy() for tensor in shadow]
  if [a.shape for a in average] != [plain[name].shape for name in trained]:
    raise RunError(f"{path}: the {len(shadow)} averages do not fit its {len(trained)} parameters")
  return plain | dict(zip(trained, average))


def _from_flax(path, data, weights):
  try:
    content = msgpack_restore(data)
    plain = content["optimizer"]["target"]
  except (ValueError, KeyError, TypeError) as error:
    raise RunError(f"{path} is no train state of score_sde in msgpack: {error}") from error
  flat = lambda params: None if params is None else flatten_dict(params, sep="/")
  return "score_sde (JAX)", _chosen(path, weights, flat(plain), flat(content.get("params_ema")))


def _from_pickle(path, data, weights):
  try:
    networks = edm.read(data)
  except RunError:
    raise
  except UNREADABLE as error:
    raise RunError(f"{path} is a pickle that holds more than data: {error}") from error
  if not networks:
    raise RunError(f"{path} is a pickle without a network")
  plain = networks.get("net", networks.get("ema"))
  return "EDM", _chosen(path, weights, plain, networks.get("ema"))


def _from_tensorflow(path, weights):
  """The averages are variables of their own; what the optimizer keeps has no average."""
  try:
    arrays = tensorflow_bundle.read(str(path).removesuffix(".index"))
  except (*UNREADABLE, LookupError, OSError, struct.error) as error:
    raise RunError(f"{path} or its data cannot be read: {error}") from error
  average = {k.removesuffix(AVERAGE): a for k, a in arrays.items() if k.endswith(AVERAGE)}
  plain = {name: arrays[name] for name in average or arrays if name in arrays}
  return "TensorFlow", _chosen(path, weights, plain, average or None)


def _chosen(path, weights: str, plain: Arrays, average: Arrays | None) -> Arrays:
  if weights == "ema" and average is None:
    warnings.warn(f"{path} holds one set of weights and no average: it is used", stacklevel=5)
  return plain if weights == "plain" or average is None else average
