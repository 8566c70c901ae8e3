"""EDM's pickles: every array of the published networks is used, and outputs are the original's."""

import collections
import functools
import math
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest

import experiment
import settings
from checkpoint_formats import edm
from checkpoint_formats.score_sde import trace
from checkpoint_import import load_variables, read
from errors import ConfigError
from evaluation import importing
from models import adm, ncsnpp

# outputs of NVlabs/edm's networks with the weights of `weights` below, float32, eval mode, for
# `inputs()`: EDMPrecond(8, 3, label_dim=3, ...).model(x, c_noise, one-hot labels, or zeros first)
REFERENCE = Path(__file__).parent / "data" / "edm_outputs.npz"
TINY = {"side": 8, "mults": (1, 2), "count": 1, "attends": (4,), "classes": 3, "augment": 9}
OURS = {"num_res_blocks": 1, "attn_resolutions": (4,), "num_classes": 3}
SONG = OURS | {"nf": 8, "ch_mult": (1, 2), "classes_first": True}
DDPMPP = {"embedding_type": "positional", "fir": False, "progressive_input": "none"}
WIDE = TINY | {"width": 128, "mults": (1, 1), "augment": 0}
HEADS = {"num_head_channels": 64, "learned_variance": False, "resblock_updown": True}
DHARIWAL = adm.Model(nf=128, ch_mult=(1, 1), null_class=True, **OURS, **HEADS)
NETWORKS = {
  "ddpmpp": (ncsnpp.Model(**SONG, **DDPMPP), TINY | {"width": 8, "kind": "ddpmpp"}),
  "ncsnpp": (ncsnpp.Model(**SONG), TINY | {"width": 8, "kind": "ncsnpp"}),
  "adm": (DHARIWAL, WIDE | {"kind": "adm"}),
  "adm_other_order": (DHARIWAL.clone(use_new_attention_order=True), WIDE | {"kind": "adm"}),
}


class Shapes(dict):
  """{name: shape} of the arrays of one network of EDM, of the kind "ddpmpp", "ncsnpp" or "adm"."""

  def __init__(self, *, kind, side, width, mults, count, attends, classes=0, augment=0):
    self.adm, self.attends = kind == "adm", attends
    self.filter = 4 if kind == "ncsnpp" else 2
    self.told = 2 * width if kind == "ncsnpp" else width  # features of the noise level
    self.embedded = 4 * width
    self._mapping(classes, augment, frequencies=kind == "ncsnpp")
    skips = self._encoder(side, width, mults, count, residual=kind == "ncsnpp")
    out = self._decoder(side, width, mults, count, skips)
    norm, conv = ("out_norm", "out_conv")
    if not self.adm:
      norm, conv = (f"dec.{side}x{side}_aux_{name}" for name in ("norm", "conv"))
    self._norm(norm, out)
    self._conv(conv, out, 3)

  def _mapping(self, classes, augment, frequencies):
    if frequencies:
      self["model.map_noise.freqs"] = (self.told // 2,)
    if augment:
      self["model.map_augment.weight"] = (self.told, augment)
    self._dense("map_layer0", self.told, self.embedded)
    self._dense("map_layer1", self.embedded, self.embedded)
    if classes:
      self._dense("map_label", classes, self.embedded if self.adm else self.told, bias=not self.adm)

  def _encoder(self, side, width, mults, count, residual):
    """The channels that the way down hands across."""
    h, skips, channels = width * (mults[0] if self.adm else 1), [], 3
    self._conv(f"enc.{side}x{side}_conv", 3, h)
    for level, mult in enumerate(mults):
      place = f"enc.{side >> level}x{side >> level}"
      if level:
        self._block(f"{place}_down", h, h, resample=True)
        if residual:
          self._conv(f"{place}_aux_residual", channels, h, resample=True)
          channels = h
      skips.append(h)
      for i in range(count):
        self._block(f"{place}_block{i}", h, mult * width, attention=side >> level in self.attends)
        h = mult * width
        skips.append(h)
    return skips

  def _decoder(self, side, width, mults, count, skips):
    """The channels at the end."""
    h, last = skips[-1], len(mults) - 1
    for level in range(last, -1, -1):
      place, attends = f"dec.{side >> level}x{side >> level}", side >> level in self.attends
      if level == last:
        self._block(f"{place}_in0", h, h, attention=True)
        self._block(f"{place}_in1", h, h)
      else:
        self._block(f"{place}_up", h, h, resample=True)
      for i in range(count + 1):
        attention = attends and (self.adm or i == count)
        self._block(f"{place}_block{i}", h + skips.pop(), mults[level] * width, attention=attention)
        h = mults[level] * width
    return h

  def _block(self, name, before, after, resample=False, attention=False):
    self._norm(f"{name}.norm0", before)
    self._conv(f"{name}.conv0", before, after, resample=resample)
    self._dense(f"{name}.affine", self.embedded, after * (1 + self.adm))
    self._norm(f"{name}.norm1", after)
    self._conv(f"{name}.conv1", after, after)
    if before != after or (resample and not self.adm):
      self._conv(f"{name}.skip", before, after, 1, resample=resample)
    elif resample:
      self._filter(f"{name}.skip")
    if attention:
      self._norm(f"{name}.norm2", after)
      self._conv(f"{name}.qkv", after, 3 * after, 1)
      self._conv(f"{name}.proj", after, after, 1)

  def _conv(self, name, before, after, kernel=3, resample=False):
    self[f"model.{name}.weight"] = (after, before, kernel, kernel)
    self[f"model.{name}.bias"] = (after,)
    if resample:
      self._filter(name)

  def _filter(self, name):
    self[f"model.{name}.resample_filter"] = (1, 1, self.filter, self.filter)

  def _dense(self, name, before, after, bias=True):
    self[f"model.{name}.weight"] = (after, before)
    if bias:
      self[f"model.{name}.bias"] = (after,)

  def _norm(self, name, channels):
    self |= {f"model.{name}.weight": (channels,), f"model.{name}.bias": (channels,)}


def weights(shapes):
  """Random arrays by a fixed rule, none of them zero."""
  rng = np.random.default_rng(0)
  arrays = {}
  for name, shape in sorted(shapes.items()):
    draw = rng.normal(size=shape).astype(np.float32)
    norm = "norm" in name and name.endswith("weight")
    arrays[name] = draw / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else norm + 0.3 * draw
    if name.endswith("resample_filter"):
      taps = np.array({2: (1, 1), 4: (1, 3, 3, 1)}[shape[-1]], np.float32)
      arrays[name] = (np.outer(taps, taps) / taps.sum() ** 2).reshape(shape)
  return arrays


def inputs():
  """Images, noise conditions and labels, of which the last, 3, is no class."""
  x = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
  return x, np.log(np.array([0.02, 0.5, 60.0], np.float32)) / 4, np.array([0, 2, 3])


def _reconstruct_persistent_obj(meta):
  raise AssertionError("code of the file was called")


class Persistent:
  """Pickled as EDM pickles its modules: a call on the source code and the state."""

  def __init__(self, state):
    self.state = state

  def __reduce__(self):
    meta = {"type": "class", "module_src": "raise SystemExit", "state": self.state}
    return _reconstruct_persistent_obj, (meta,), None


class Plain:
  """Pickled as PyTorch pickles its own modules: made without a call, then given its state."""

  def __init__(self, state):
    self.__dict__ = state


def as_module(arrays, kind=Persistent):
  torch = pytest.importorskip("torch", reason="writes a pickle of tensors")
  state = {"_parameters": {}, "_buffers": {}, "_modules": collections.OrderedDict()}
  inner = collections.defaultdict(dict)
  for name, array in arrays.items():
    head, _, rest = name.partition(".")
    if rest:
      inner[head][rest] = array
    elif head in ("freqs", "resample_filter"):
      state["_buffers"][head] = torch.from_numpy(array)
    else:
      state["_parameters"][head] = torch.nn.Parameter(torch.from_numpy(array))
  for name, below in inner.items():
    state["_modules"][name] = as_module(below, Plain if name in ("enc", "dec") else Persistent)
  return kind(state)


def save(path, arrays):
  path.write_bytes(pickle.dumps({"ema": as_module(arrays), "loss_fn": Persistent({})}))
  return path


def outputs(model, variables, labels):
  x, c_noise, _ = inputs()
  run = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": "0"})
  with jax.default_matmul_precision("highest"):
    return run(variables, x, c_noise, labels)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_original_code(name, tmp_path):
  model, sizes = NETWORKS[name]
  path = save(tmp_path / "network.pkl", weights(Shapes(**sizes)))
  variables = load_variables(path, model, shape=(8, 8, 3))
  found = outputs(model, variables, inputs()[2])
  with np.load(REFERENCE) as stored:
    for out, expected in zip(found, stored[sizes["kind"]]):
      assert np.abs(out - expected).max() < 1e-4 * np.abs(expected).max()


def test_no_labels_mean_no_class(tmp_path):
  model, sizes = NETWORKS["ddpmpp"]
  path = save(tmp_path / "network.pkl", weights(Shapes(**sizes)))
  out = outputs(model, load_variables(path, model), None)
  with np.load(REFERENCE) as stored:
    np.testing.assert_allclose(out[2], stored["ddpmpp"][2], atol=1e-4)
    assert np.abs(out[0] - stored["ddpmpp"][0]).max() > 1e-2


def published(name):
  """The sizes of the published network that a configuration names."""
  sizes = {"kind": name.replace("_conditional", "").rpartition("_")[2]}
  if sizes["kind"] == "adm":
    levels = {"mults": (1, 2, 3, 4), "attends": (32, 16, 8)}
    return sizes | levels | {"side": 64, "width": 192, "count": 3, "classes": 1000}
  sizes |= {"width": 128, "count": 4, "attends": (16,), "augment": 9}
  if name.startswith("cifar10"):
    classes = 10 if name.endswith("conditional") else 0
    return sizes | {"side": 32, "mults": (2, 2, 2), "classes": classes}
  return sizes | {"side": 64, "mults": (1, 2, 2, 2)}


CONFIGS = sorted(path.stem for path in Path("configs/edm").glob("*.py"))


def config_of(name):
  return settings.load_config_file(f"configs/edm/{name}.py")


@functools.cache
def described(model, shape):
  """Our sources and our parameters."""
  return edm.names(model, shape), trace(model, shape)[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CONFIGS)
def test_every_array_of_the_published_networks_is_used(name):
  parts = experiment.outline(config_of(name))
  model, shape = parts.model, parts.spec.shape
  shapes = Shapes(**published(name) | ({} if model.augment_dim else {"augment": 0}))
  shapes = {k: v for k, v in shapes.items() if not edm.UNUSED.fullmatch(k)}
  sources, params = described(model.clone(dropout=0.0), shape)
  assert sources.keys() == params.keys()
  assert {source.name for source in sources.values()} == shapes.keys()
  for path, (theirs, layout) in sources.items():
    assert layout(np.zeros(shapes[theirs], np.float32)).shape == params[path].shape, path
  assert sum(leaf.size for leaf in params.values()) == sum(map(math.prod, shapes.values()))


def test_what_is_not_for_us_is_skipped_by_name(tmp_path):
  shapes = Shapes(**TINY, width=8, kind="ncsnpp")
  kind, arrays = read(save(tmp_path / "network.pkl", weights(shapes)))
  assert kind == "EDM"
  skipped = {name.removesuffix("resample_filter") for name in shapes.keys() - arrays.keys()}
  filtered = ("enc.4x4_down.conv0", "enc.4x4_down.skip", "enc.4x4_aux_residual")
  filtered += ("dec.8x8_up.conv0", "dec.8x8_up.skip")
  assert skipped == {f"model.{name}." for name in filtered}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_map_of_the_augmentation_is_loaded_where_the_network_has_it(name, tmp_path):
  model, sizes = NETWORKS[name]
  arrays = weights(Shapes(**sizes | {"augment": 9}))
  path = save(tmp_path / "network.pkl", arrays)
  without = load_variables(path, model, shape=(8, 8, 3))["params"]
  params = load_variables(path, model.clone(augment_dim=9), shape=(8, 8, 3))["params"]
  kernel = params.pop("augmentation")["kernel"]
  np.testing.assert_array_equal(kernel, arrays["model.map_augment.weight"].T)
  jax.tree.map(np.testing.assert_array_equal, params, without)


def test_a_file_without_the_map_of_the_augmentation_is_not_for_a_network_with_it(tmp_path):
  model, sizes = NETWORKS["adm"]
  path = save(tmp_path / "network.pkl", weights(Shapes(**sizes)))
  missing = r"missing: model\.map_augment\.weight, for augmentation/kernel \(9, 128\)"
  with pytest.raises(ConfigError, match=missing):
    load_variables(path, model.clone(augment_dim=9), shape=(8, 8, 3))


UNCONDITIONAL = {"num_classes": 0}


@pytest.mark.parametrize(
  "name, changes, message",
  [
    ("ddpmpp", UNCONDITIONAL, r"unexpected: model\.map_label\.weight \(8, 3\)"),
    ("ddpmpp", {"classes_first": False}, r"nothing for classes/embedding \(4, 32\)"),
    ("ddpmpp", {"progressive_input": "residual"}, r"missing: model\.enc\.4x4_aux_residual\.weight"),
    (
      "ncsnpp",
      DDPMPP,
      r"(?s)map_layer0\.weight is \(32, 16\).*unexpected: model\.map_noise\.freqs",
    ),
    ("adm", {"num_classes": 4}, r"map_label\.weight is \(512, 3\), .* expects \(5, 512\)"),
  ],
)
def test_the_wrong_network_is_told_what_differs(name, changes, message, tmp_path):
  model, sizes = NETWORKS[name]
  path = save(tmp_path / "network.pkl", weights(Shapes(**sizes)))
  with pytest.raises(ConfigError, match=message):
    load_variables(path, model.clone(**changes), shape=(8, 8, 3))


def test_a_file_for_another_size_shows_both_sizes(tmp_path):
  model, sizes = NETWORKS["ddpmpp"]
  path = save(tmp_path / "network.pkl", weights(Shapes(**sizes)))
  with pytest.raises(ConfigError, match=r"(?s)missing: .*8x8_in0.*unexpected: .*enc\.8x8"):
    load_variables(path, model, shape=(16, 16, 3))


def test_the_import_mode_refuses_a_wrong_file(tmp_path):
  path = save(tmp_path / "network.pkl", weights(Shapes(**NETWORKS["ddpmpp"][1])))
  config = config_of("cifar10_ddpmpp")
  config.import_.path = str(path)
  with pytest.raises(ConfigError, match=r"\(EDM\) does not fit models\.ncsnpp"):
    importing.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
