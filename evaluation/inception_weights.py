"""The weights of the FID network: found or downloaded, checked by hash, converted once, cached.

Batch norms (of constant statistics) are folded into the convolutions, in float64.
"""

import hashlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

import checkpoint_import
from checkpoint_formats.layouts import conv, dense
from checkpoint_formats.tensorflow_bundle import message
from errors import ConfigError, RunError, check, invalid
from evaluation import files
from evaluation.inception import BLOCKS, SIZE, STEM, Branch, Inception
from settings import written_whole

PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{PUBLISHED}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SAME_FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity publishes it
GRAPH = "classify_image_graph_def.pb"
GRAPH_URL = "http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz"
CACHED = "inception-2015-12-05.npz"
EPSILON = 1e-3  # of the batch norms
TIMEOUT = 20  # seconds without an answer
INSTEAD = "--config.evaluation.features=classifier, random_conv or pixels"


class Weights(NamedTuple):
  """Variables of `Inception`; `digest`: of their values, whichever file they come from."""

  params: PyTree
  digest: str


def load(folder: Path) -> Weights:
  """The weights cached in `folder`, else converted from a published file that lies there, else
  downloaded into it.

  Raises:
    ConfigError: there is none; says which file, from where, with which hash, and what to do.
  """
  cached = folder / CACHED
  if not cached.is_file():
    names = (PUBLISHED, SAME_FILE, GRAPH)
    source = next((folder / name for name in names if (folder / name).is_file()), None)
    arrays = convert(source or _download(folder))
    files.write_arrays(cached, arrays)
  arrays = dict(sorted(files.read_arrays(cached).items()))  # its members have checksums
  content = hashlib.sha256()
  for name, array in arrays.items():
    content.update(f"{name}{array.shape}".encode() + array.tobytes())
  return Weights({"params": unflatten_dict(arrays, sep="/")}, content.hexdigest()[:16])


def _download(folder: Path) -> Path:
  """The published file, in `folder`."""
  path = folder / PUBLISHED
  try:
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {URL} (91 MiB)", flush=True)
    with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer, written_whole(path) as temporary:
      temporary.write_bytes(answer.read())
  except OSError as error:
    legal = f"with the weights of the FID network: {path}\n    sha256 {SHA256}\n    from {URL}"
    mend = f"put that file there ({error}), or {GRAPH} of {GRAPH_URL}; or take {INSTEAD}"
    raise invalid("evaluation.features", "inception", legal, mend) from error
  return path


def convert(path: Path) -> dict[str, np.ndarray]:
  """{"layer/kernel" or "layer/bias": array} of a published file: PyTorch's, whose hash must be
  the published one, or TensorFlow's graph.
  """
  try:
    params = _folded(_of_graph(path) if path.suffix == ".pb" else _of_torch(path))
  except KeyError as error:
    raise ConfigError(f"{path} has no {error}: it is not the FID network") from error
  wanted = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
  shapes = {name: leaf.shape for name, leaf in flatten_dict(wanted["params"], sep="/").items()}
  for name, shape in shapes.items():
    check(params[name].shape == shape, f"{path}: {name}", params[name].shape, f"the shape {shape}")
  return params


def names() -> dict[str, str]:
  """{layer in PyTorch's file: the same in TensorFlow's graph}; the graph numbers what repeats."""
  number = lambda name, i: f"{name}_{i}" if i else name
  stem = [layer.name for branch in STEM for layer in branch.layers]
  pairs = {name: number("conv", i) for i, name in enumerate(stem)}

  def add(block: str, scope: str, branch: Branch) -> None:
    for inner, layers in (("", branch.layers), ("mixed/", branch.fork)):
      for i, layer in enumerate(layers):
        pairs[f"{block}.{layer.name}"] = f"{scope}{inner}{number('conv', i)}"

  for i, (block, branches) in enumerate(BLOCKS.items()):
    towers = 0
    for branch in branches:
      alone = branch.pool == "none" and len(branch.layers) == 1 and not branch.fork
      tower = "" if alone else f"{number('tower', towers)}/"
      add(block, f"{number('mixed', i)}/{tower}", branch)
      towers += not alone
  return pairs


def _of_torch(path: Path) -> dict[str, np.ndarray]:
  with path.open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  mend = f"remove {path}: it is damaged, or holds other weights; the file is from {URL}"
  check(found == SHA256, "sha256 of the Inception weights", found, SHA256, mend)
  return checkpoint_import.read(path, "plain")[1]


def _folded(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """conv, then (y - mean) / sqrt(var + eps) gamma + beta, as one convolution with a bias."""
  params = {"fc/kernel": dense(arrays["fc.weight"])}
  for name in names():
    of_norm = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, var = (arrays[f"{name}.bn.{key}"].astype(np.float64) for key in of_norm)
    scale = gamma / np.sqrt(var + EPSILON)
    params[f"{name}/kernel"] = conv(arrays[f"{name}.conv.weight"]) * scale
    params[f"{name}/bias"] = beta - mean * scale
  return {name: np.ascontiguousarray(array, np.float32) for name, array in params.items()}


def _constants(graph: bytes) -> Iterator[tuple[str, np.ndarray]]:
  """The float constants of a GraphDef: nodes (1) of a name (1) and attributes (5), of these "value"
  holds a tensor (8) of dtype (1), shape (2) and content (4) or values (5).
  """
  for field, node in message(graph):
    if field != 1:
      continue
    fields = [(key, value) for key, value in message(node) if key in (1, 5)]
    attributes = [dict(message(value)) for key, value in fields if key == 5]
    value = next((dict(message(a[2])) for a in attributes if a[1] == b"value"), {})
    if 8 not in value or (tensor := dict(message(value[8]))).get(1) != 1:
      continue
    shape = [dict(message(dim)).get(1, 0) for _, dim in message(tensor.get(2, b""))]
    content = np.frombuffer(tensor.get(4) or tensor.get(5, b""), "<f4")
    yield dict(fields)[1].decode(), content.reshape(shape)


def _of_graph(path: Path) -> dict[str, np.ndarray]:
  """TensorFlow's arrays under the names and in the layouts of the PyTorch file."""
  try:
    graph = dict(_constants(path.read_bytes()))
  except (IndexError, KeyError, ValueError, UnicodeDecodeError) as error:
    raise RunError(f"{path} is damaged, or no frozen graph of TensorFlow: {error}") from error
  arrays = {"fc.weight": graph["softmax/weights"].T}
  of_norm = {"weight": "gamma", "bias": "beta"}
  of_norm |= {"running_mean": "moving_mean", "running_var": "moving_variance"}
  for name, theirs in names().items():
    kernel = graph[f"{theirs}/conv2d_params"]
    arrays[f"{name}.conv.weight"] = np.moveaxis(kernel, (-1, -2), (0, 1))
    for key, other in of_norm.items():
      arrays[f"{name}.bn.{key}"] = graph[f"{theirs}/batchnorm/{other}"]
  return arrays
