"""Published checkpoint formats: the outputs of the original code, and what a wrong file is told."""

import collections
import json
import pickle
import re
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict

import checkpoint_import
from checkpoint_formats import score_sde
from checkpoint_formats.ddpm import tensorflow_names
from checkpoint_import import load_variables, read
from errors import ConfigError, RunError
from models import ddpm, ncsnpp

PARITY = Path(__file__).parents[1] / "../shared/parity"
SMALL = {"ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}
POSITIONAL = {"fir": False, "progressive_input": "none", "embedding_type": "positional"}
DDPM = ddpm.Model(nf=32, attn_every_block=False, group_size=1, **SMALL)
DDPMPP = ncsnpp.Model(nf=16, **POSITIONAL, **SMALL)
NCSNPP = ncsnpp.Model(nf=16, centered=False, **SMALL)
FILES = {
  "score_sde_ddpm.pth": DDPM,
  "score_sde_ddpmpp_vp.pth": DDPMPP,
  "score_sde_ncsnpp_ve.pth": NCSNPP,
  "score_sde_jax_ncsnpp_ve.checkpoint": NCSNPP,
}
TINY = ncsnpp.Model(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())


def parity_file(name):
  if not (PARITY / name).exists():
    pytest.skip(
      f"{PARITY / name} is not here: the reference outputs are not part of the repository"
    )
  if name.endswith((".pth", ".pt")):
    pytest.importorskip("torch", reason="reading .pth needs requirements-torch.txt")
  return PARITY / name


@pytest.mark.parametrize("name", FILES)
def test_outputs_are_those_of_the_original_code(name):
  path, model = parity_file(name), FILES[name]
  reference, described = (
    np.load(path.with_suffix(".npz")),
    json.loads(path.with_suffix(".json").read_text()),
  )
  variables = load_variables(path, model)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == described["params"]
  time, fourier = reference["time_cond"], getattr(model, "embedding_type", "") == "fourier"
  with jax.default_matmul_precision("highest"):
    c_noise = jnp.asarray(np.log(time) if fourier else time)
    ours = jax.jit(model.apply)(variables, jnp.asarray(reference["x"]), c_noise)
  ours = ours / time[:, None, None, None] if fourier else ours
  for out, expected in zip(ours, reference["output"]):
    assert np.abs(out - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", FILES)
def test_plain_weights_are_others_than_the_average(name):
  path = parity_file(name)
  (_, ema), (_, plain) = read(path), read(path, "plain")
  assert ema.keys() == plain.keys()
  same = {key for key in ema if np.array_equal(ema[key], plain[key])}
  assert len(same) < len(ema) / 2


def torch_state(model, shape=(8, 8, 3)):
  """(names with prefix -> tensors of random numbers, our parameters they stand for)."""
  torch = pytest.importorskip("torch", reason="writes a .pth; needs requirements-torch.txt")
  args = jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1)
  params = flatten_dict(jax.eval_shape(model.init, *args)["params"], sep="/")
  rng, state, ours = np.random.default_rng(0), {"module.sigmas": torch.zeros(3)}, {}
  for path, source in score_sde.torch_names(model, shape).items():
    ours[path] = rng.normal(size=params[path].shape).astype(np.float32)
    linear = path.endswith("kernel") and not source.name.endswith("W")
    theirs = np.moveaxis(ours[path], (-1, -2), (0, 1)) if linear else ours[path]
    state["module." + source.name] = torch.from_numpy(np.ascontiguousarray(theirs))
  return state, ours


def save_torch(path, state, shadow=None):
  import torch

  trained = [state[name] for name in state if not name.endswith(("sigmas", ".0.W"))]
  ema = {"decay": 0.999, "num_updates": 1, "shadow_params": trained if shadow is None else shadow}
  torch.save({"optimizer": {}, "model": state, "ema": ema, "step": 1}, path)
  return path


def test_every_array_finds_its_parameter(tmp_path):
  state, ours = torch_state(TINY)
  loaded = load_variables(save_torch(tmp_path / "any_name", state), TINY)
  assert flatten_dict(loaded["params"], sep="/").keys() == ours.keys()
  for path, array in flatten_dict(loaded["params"], sep="/").items():
    np.testing.assert_array_equal(array, ours[path], err_msg=path)


def test_what_does_not_fit_is_listed(tmp_path):
  state, _ = torch_state(TINY)
  state["module.all_modules.3.bias"] = state["module.all_modules.3.bias"][:5]
  state["module.all_modules.99.bias"] = state["module.all_modules.2.bias"]
  path = save_torch(tmp_path / "checkpoint", state)
  with pytest.raises(ConfigError) as error:
    load_variables(path, TINY.clone(num_classes=3), shape=(8, 8, 3))
  message = str(error.value)
  assert "shape: all_modules.3.bias is (5,), Conv_0/bias expects (8,)" in message
  assert "unexpected: all_modules.99.bias (32,)" in message
  assert "missing: the format has nothing for classes/embedding (4, 32)" in message


def test_a_long_list_is_cut(tmp_path):
  state, _ = torch_state(TINY)
  path = save_torch(tmp_path / "checkpoint", state)
  with pytest.raises(ConfigError, match=r"(?s)does not fit models.ncsnpp.*and \d+ more") as error:
    load_variables(path, TINY.clone(nf=16), shape=(8, 8, 3))
  assert len(str(error.value).splitlines()) == 1 + checkpoint_import.SHOWN + 2


def test_averages_that_do_not_fit_are_refused(tmp_path):
  state, _ = torch_state(TINY)
  with pytest.raises(RunError, match="the 1 averages do not fit its"):
    read(save_torch(tmp_path / "checkpoint", state, shadow=[state["module.sigmas"]]))


def test_a_file_without_average_says_so(tmp_path):
  torch = pytest.importorskip("torch")
  torch.save(collections.OrderedDict(a=torch.ones(2)), tmp_path / "model.pt")
  with pytest.warns(UserWarning, match="one set of weights and no average"):
    kind, arrays = read(tmp_path / "model.pt")
  assert kind == "state_dict"
  np.testing.assert_array_equal(arrays["a"], [1, 1])
  torch.save([{"module.a": torch.ones(2)}, {}, 0, 1, {"a": torch.zeros(2)}], tmp_path / "model.pt")
  assert read(tmp_path / "model.pt", "plain")[1]["a"].tolist() == [1, 1]
  assert read(tmp_path / "model.pt")[1]["a"].tolist() == [0, 0]


def test_without_torch_it_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "checkpoint").write_bytes(b"PK\x03\x04")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(RunError, match=r"pip install -r requirements-torch\.txt"):
    read(tmp_path / "checkpoint")


@pytest.mark.parametrize(
  "content", [b"", b"PK\x03\x04 no zip", b"\x80\x04 no pickle", b"\x87abc", b"text"]
)
def test_a_damaged_file_is_refused(tmp_path, content):
  pytest.importorskip("torch")
  (tmp_path / "checkpoint").write_bytes(content)
  with pytest.raises(RunError, match=re.escape(str(tmp_path))):
    read(tmp_path / "checkpoint")


def test_a_format_without_this_network_names_the_legal_ones(tmp_path):
  state, _ = torch_state(TINY)
  path = save_torch(tmp_path / "checkpoint", state)
  with pytest.raises(ConfigError, match=r"has no weights for .*: legal: none"):
    load_variables(path, nn.Dense(3))
  with pytest.raises(ConfigError, match="weights = 'best'"):
    load_variables(path, TINY, weights="best")
  with pytest.raises(ConfigError, match="not usable"):
    load_variables(tmp_path / "absent", TINY)


class Malicious:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return Path.touch, (self.path,)


def test_a_file_is_never_executed(tmp_path):
  trap = tmp_path / "executed"
  for name, write in {"plain": pickle.dump, "torch": save_malicious}.items():
    with (tmp_path / name).open("wb") as file:
      write({"ema": Malicious(trap)}, file)
    with pytest.raises(RunError):
      read(tmp_path / name)
  assert not trap.exists()


def save_malicious(content, file):
  pytest.importorskip("torch").save(content, file)


def _reconstruct_persistent_obj(meta):
  raise AssertionError("code of the file was called")


class Persistent:
  """Pickled as EDM pickles its networks: a call on the source code and the state."""

  def __init__(self, **state):
    self.state = {"_parameters": {}, "_buffers": {}, "_modules": {}} | state

  def __reduce__(self):
    meta = {"type": "class", "module_src": "raise SystemExit", "state": self.state}
    return _reconstruct_persistent_obj, (meta,), None


def test_parameters_of_an_edm_pickle_are_found(tmp_path):
  torch = pytest.importorskip("torch")
  weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
  half = torch.tensor([1.0, 2.0]).half()
  inner = Persistent(_parameters={"weight": weight, "bias": None}, _buffers={"filter": half})
  network = Persistent(_modules=collections.OrderedDict(conv=inner), sigma_data=0.5)
  (tmp_path / "network.pkl").write_bytes(pickle.dumps({"ema": network, "loss_fn": Persistent()}))
  kind, arrays = read(tmp_path / "network.pkl")
  assert kind == "EDM"
  assert arrays.keys() == {"conv.weight", "conv.filter"}
  np.testing.assert_array_equal(arrays["conv.weight"], weight.detach().numpy())
  np.testing.assert_array_equal(arrays["conv.filter"], [1, 2])


def test_a_flax_file_without_average_says_so(tmp_path):
  target = {"Conv_0": {"bias": np.ones(2, np.float32)}}
  path = tmp_path / "checkpoint_3"
  path.write_bytes(msgpack_serialize({"optimizer": {"target": target}, "step": 3}))
  with pytest.warns(UserWarning, match="no average"):
    kind, arrays = read(path)
  assert kind == "score_sde (JAX)"
  assert arrays["Conv_0/bias"].tolist() == [1, 1]


PYRAMIDS = ncsnpp.Model(
  nf=8,
  ch_mult=(1, 2),
  num_res_blocks=1,
  attn_resolutions=(),
  progressive="output_skip",
  progressive_input="input_skip",
)


def test_names_of_the_networks_for_large_images():
  """Positions 6 and 19 are resampling without parameters, 17 is the block that goes up."""
  torch = score_sde.torch_names(PYRAMIDS, (8, 8, 3))
  expected = {
    "FourierEmbedding_0/frequencies": "all_modules.0.W",
    "Conv_0/kernel": "all_modules.3.weight",
    "BigGANBlock_1/shortcut/kernel": "all_modules.5.Conv_2.weight",
    "Combine_0/Conv_0/kernel": "all_modules.7.Conv.weight",
    "AttentionBlock_0/out/kernel": "all_modules.10.NIN_3.W",
    "GroupNorm_0/scale": "all_modules.14.weight",
    "Conv_1/bias": "all_modules.15.bias",
    "BigGANBlock_7/Dense_0/kernel": "all_modules.16.Dense_0.weight",
    "Conv_2/bias": "all_modules.21.bias",
  }
  assert {path: torch[path].name for path in expected} == expected
  numbers = {int(source.name.split(".")[1]) for source in torch.values()}
  assert numbers == set(range(22)) - {6, 19}
  jax_names = {
    path: source.name for path, source in score_sde.jax_names(PYRAMIDS, (8, 8, 3)).items()
  }
  assert jax_names["Combine_0/Conv_0/kernel"] == "Combine_0/Conv_0/kernel"
  assert jax_names["BigGANBlock_7/shortcut/bias"] == "ResnetBlockBigGANpp_7/Conv_2/bias"
  assert len(set(jax_names.values())) == len(jax_names)


def test_names_of_resampling_layers():
  """Blocks of DDPM have layers for it; a filter changes the name of their convolution."""
  options = {"resblock_type": "ddpm", "progressive": "residual"}
  for fir, inner in ((True, "Conv2d_0"), (False, "Conv_0")):
    names = score_sde.torch_names(PYRAMIDS.clone(fir=fir, **options), (8, 8, 3))
    assert names["Downsample_0/Conv_0/kernel"].name == f"all_modules.5.{inner}.weight"
    assert names["ResnetBlock_1/shortcut/kernel"].name == "all_modules.8.NIN_0.W"
  jax_names = score_sde.jax_names(PYRAMIDS.clone(**options), (8, 8, 3))
  assert jax_names["Upsample_1/Conv_0/kernel"].name == "Upsample_1/Conv2d_0/weight"


def varint(value):
  head, rest = value & 127, value >> 7
  return bytes([head | 128]) + varint(rest) if rest else bytes([head])


def message(**fields):
  """A protocol buffer of numbered fields f1, f2, ...: numbers and bytes."""
  out = b""
  for name, value in fields.items():
    number = int(name[1:]) << 3
    size = varint(len(value)) if isinstance(value, bytes) else b""
    out += varint(number | 2) + size + value if size else varint(number) + varint(value)
  return out


def block(entries):
  """A table block whose keys share what they can with the one before."""
  out, last = b"", b""
  for key, value in sorted(entries.items()):
    shared = next(n for n in range(len(key) + 1) if key[: n + 1] != last[: n + 1] or n == len(key))
    out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
    last = key
  return out + struct.pack("<II", 0, 1)


def save_tensorflow(prefix, arrays):
  """Writes the two files in TensorFlow's format, the index in two blocks."""
  data, entries = b"", {b"": message(f1=1)}
  for name, array in arrays.items():
    dims = b"".join(message(f2=message(f1=size)) for size in array.shape)
    place = {"f4": len(data), "f5": array.nbytes}
    entries[name.encode()] = message(f1={"f": 1, "i": 9}[array.dtype.kind], f2=dims, **place)
    data += array.tobytes()
  Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
  table, handles, keys = b"", {}, sorted(entries)
  for part in (keys[:2], keys[2:]):
    content = block({key: entries[key] for key in part})
    handles[part[-1]] = varint(len(table)) + varint(len(content))
    table += content + bytes(5)
  index = block(handles)
  footer = varint(0) + varint(0) + varint(len(table)) + varint(len(index))
  table += index + bytes(5) + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
  Path(f"{prefix}.index").write_bytes(table)


def test_a_tensorflow_checkpoint_is_read_without_tensorflow(tmp_path):
  kernel = np.arange(600, dtype=np.float32).reshape(2, 300)
  average = {"model/conv_in/W": kernel, "model/conv_in/b": np.ones(1, np.float32)}
  arrays = {name + "/ExponentialMovingAverage": array for name, array in average.items()}
  arrays |= {name: -array for name, array in average.items()}
  arrays |= {"global_step": np.array(7), "model/conv_in/W/Adam": kernel}
  save_tensorflow(tmp_path / "model.ckpt-7", arrays)
  for weights, sign in (("ema", 1), ("plain", -1)):
    for path in ("model.ckpt-7", "model.ckpt-7.index"):
      kind, read_arrays = read(tmp_path / path, weights)
      assert (kind, read_arrays.keys()) == ("TensorFlow", average.keys())
      for name, array in average.items():
        np.testing.assert_array_equal(read_arrays[name], sign * array)
  (tmp_path / "model.ckpt-7.data-00000-of-00001").write_bytes(b"short")
  with pytest.raises(RunError, match="or its data cannot be read"):
    read(tmp_path / "model.ckpt-7")


def test_the_original_ddpm_is_read_from_tensorflow(tmp_path):
  """Arrays under the names of the published code come back where they belong."""
  model = ddpm.Model(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
  names = {path: source.name for path, source in tensorflow_names(model, (8, 8, 3)).items()}
  expected = {
    "Dense_1/bias": "model/temb/dense1/b",
    "Conv_0/kernel": "model/conv_in/W",
    "ResnetBlock_1/GroupNorm_1/scale": "model/down_1/block_0/norm2/gamma",
    "AttentionBlock_0/query/kernel": "model/down_1/attn_0/q/W",
    "AttentionBlock_1/out/bias": "model/mid/attn_1/proj_out/b",
    "AttentionBlock_3/GroupNorm_0/bias": "model/up_1/attn_1/norm/beta",
    "Downsample_0/Conv_0/kernel": "model/down_0/downsample/conv/W",
    "Upsample_0/Conv_0/kernel": "model/up_1/upsample/conv/W",
    "ResnetBlock_7/shortcut/kernel": "model/up_0/block_1/nin_shortcut/W",
    "GroupNorm_0/scale": "model/norm_out/gamma",
  }
  assert {path: names[path] for path in expected} == expected
  _, params = score_sde.trace(model, (8, 8, 3))
  rng = np.random.default_rng(0)
  ours = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in params.items()}
  stored = {names[path]: array for path, array in ours.items()}
  ending = "/ExponentialMovingAverage"
  save_tensorflow(tmp_path / "model", stored | {k + ending: -a for k, a in stored.items()})
  for weights, sign in (("ema", -1), ("plain", 1)):
    loaded = load_variables(tmp_path / "model", model, weights=weights, shape=(8, 8, 3))
    for path, array in flatten_dict(loaded["params"], sep="/").items():
      np.testing.assert_array_equal(array, sign * ours[path], err_msg=path)
