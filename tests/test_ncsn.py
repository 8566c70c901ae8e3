"""NCSN and NCSNv2: published sizes, InstanceNorm++, and the published networks' own numbers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from checkpoint_formats import ncsn as formats
from models import ncsn, ncsnv2
from models.layers import refinenet

PARITY = pathlib.Path(__file__).parents[2] / "shared" / "parity"
WIDE = {"decoder_widths": "score_sde"}


def parameters(model, shape=(1, 8, 8, 3)):
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]))[
    "params"
  ]


@pytest.mark.parametrize(
  "model, count",
  [
    (ncsn.Model(), 30_117_635),
    (ncsn.Model(**WIDE), 34_428_675),
    (ncsn.Model(num_scales=232, **WIDE), 44_828_931),
    (ncsn.Model(num_scales=500, **WIDE), 57_384_195),
    (ncsnv2.Model(), 29_694_083),
    (ncsnv2.Model(**WIDE), 33_970_563),
    (ncsnv2.Model(resolution_class=128), 83_445_379),
    (ncsnv2.Model(resolution_class=256), 94_132_611),
  ],
)
def test_number_of_parameters(model, count):
  assert sum(leaf.size for leaf in jax.tree.leaves(parameters(model))) == count


def perturbed(params, rng):
  """Every parameter moved, so that zeros and ones hide nothing."""
  return jax.tree.map(
    lambda leaf: leaf + rng.normal(scale=0.2, size=leaf.shape).astype(leaf.dtype), params
  )


@pytest.mark.parametrize("num_scales", [0, 3])
def test_instance_norm_plus_is_the_formula(num_scales):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 4, 5)) + np.arange(5)
  level = jnp.array([2, 0]) if num_scales else None
  norm = refinenet.InstanceNormPlus(num_scales)
  params = perturbed(norm.init(jax.random.key(0), jnp.float32(x), level)["params"], rng)
  if num_scales:
    gamma, alpha, beta = np.split(params["embed"]["embedding"][level], 3, axis=1)
  else:
    gamma, alpha, beta = (np.stack([params[name]] * 2) for name in ("gamma", "alpha", "beta"))
  expected = np.empty_like(x)
  for b in range(2):
    means = [x[b, :, :, k].sum() / 12 for k in range(5)]
    m = sum(means) / 5
    v = sum((mean - m) ** 2 for mean in means) / 4
    for k in range(5):
      s = ((x[b, :, :, k] - means[k]) ** 2).sum() / 12
      instance = (x[b, :, :, k] - means[k]) / (s + 1e-5) ** 0.5
      contrast = (means[k] - m) / (v + 1e-5) ** 0.5
      expected[b, :, :, k] = gamma[b, k] * (instance + alpha[b, k] * contrast) + beta[b, k]
  out = norm.apply({"params": params}, jnp.float32(x), level)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_resize_keeps_corners_and_straight_lines():
  line = lambda size: np.linspace(-1, 2, size)[:, None] + np.linspace(0, 5, 2 * size)[None]
  out = refinenet.resize(jnp.float32(line(4))[None, ..., None], (9, 18))
  np.testing.assert_allclose(out[0, ..., 0], line(9), atol=1e-5)
  assert (refinenet.resize(jnp.full((1, 1, 1, 1), 3.0), (2, 2)) == 3).all()


MODELS = {
  "ncsn": ncsn.Model(nf=4),
  "64": ncsnv2.Model(nf=4),
  "64 wide": ncsnv2.Model(nf=4, **WIDE),
  "128": ncsnv2.Model(nf=4, resolution_class=128),
  "256": ncsnv2.Model(nf=4, resolution_class=256),
}


@pytest.mark.parametrize(
  "name, shape", [(name, (2, 16, 24, 1)) for name in MODELS] + [("ncsn", (1, 6, 8, 5))]
)
def test_output_has_the_shape_of_its_input(name, shape):
  out, _ = jax.eval_shape(
    MODELS[name].init_with_output, jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0])
  )
  assert (out.shape, out.dtype) == (shape, jnp.float32)


@pytest.mark.parametrize(
  "name, size, nearest",
  [("ncsn", 27, "26 or 28"), ("64", 33, "32 or 34"), ("128", 30, "28 or 32"), ("256", 4, "8")],
)
def test_an_illegal_size_names_the_nearest(name, size, nearest):
  with pytest.raises(ValueError, match=nearest):
    parameters(MODELS[name], (1, 16, size, 1))


def test_mnist_size_is_legal():
  parameters(MODELS["ncsn"], (1, 28, 28, 1))


@pytest.mark.parametrize("name", ["ncsn", "64"])
def test_labels_are_refused(name):
  x, c_noise = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
  with pytest.raises(ValueError, match="no class conditioning"):
    MODELS[name].init(jax.random.key(0), x, c_noise, jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize(
  "options, message", [({"resolution_class": 32}, "64, 128, 256"), ({"decoder_widths": "x"}, "ori")]
)
def test_an_unknown_architecture_lists_the_known(options, message):
  with pytest.raises(ValueError, match=message):
    parameters(ncsnv2.Model(nf=4, **options))


def read(name, which):
  """The published-code network of shared/parity: its file's weights, inputs and outputs, facts."""
  if not (PARITY / f"{name}.pth").exists():
    pytest.skip(f"no reference outputs: {PARITY / name}.pth is missing")
  torch = pytest.importorskip("torch", reason="torch is needed to read .pth files")
  weights = torch.load(PARITY / f"{name}.pth", weights_only=True, map_location="cpu")[which]
  weights = {key.removeprefix("module."): value.numpy() for key, value in weights.items()}
  with np.load(PARITY / f"{name}.npz") as arrays:
    return weights, dict(arrays), json.loads((PARITY / f"{name}.json").read_text())


def imported(model, sources, weights):
  """The parameters of `model` from a file's weights; every array is used once and fits."""
  names = [source.name for source in sources.values()]
  assert sorted(names) == sorted(set(weights) - {"sigmas"})
  params = {path: source.layout(weights[source.name]) for path, source in sources.items()}
  expected = flatten_dict(parameters(model), sep="/")
  assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in expected.items()}
  return unflatten_dict(params, sep="/")


def relative_error(actual, expected):
  return np.abs(actual - expected).max() / np.abs(expected).max()


def jit(function):
  """Compiled with little optimisation, which takes a quarter of the time."""
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": "0"})


def network(model, params):
  def apply(x, c_noise):
    with jax.default_matmul_precision("highest"):
      return model.apply({"params": params}, x, c_noise)

  return jit(apply)


def test_ncsn_gives_the_published_codes_output():
  weights, arrays, facts = read("ncsn", 0)
  model = ncsn.Model(nf=facts["ngf"], num_scales=facts["num_classes"])
  apply = network(model, imported(model, formats.ncsn(model), weights))
  level = np.float32(arrays["labels"])
  assert relative_error(apply(arrays["x"], level), arrays["output"]) < 1e-4
  other = apply(arrays["x"], level[::-1])
  assert relative_error(other, arrays["output"]) > 1e-2
  np.testing.assert_array_equal(apply(arrays["x"], level[::-1] + 0.4), other)


@pytest.mark.parametrize("centered", [False, True])
def test_ncsnv2_gives_the_published_codes_output(centered):
  weights, arrays, facts = read("ncsnv2_64", 4)
  model = ncsnv2.Model(nf=facts["ngf"], centered=centered)
  apply = network(model, imported(model, formats.ncsnv2(model), weights))
  sigmas = np.geomspace(facts["sigma_begin"], facts["sigma_end"], facts["num_classes"])
  scaled_score = arrays["output"] * sigmas[arrays["labels"], None, None, None]
  x = 2 * arrays["x"] - 1 if centered else arrays["x"]
  assert relative_error(apply(x, jnp.zeros(2)), scaled_score) < 1e-4


def test_the_deepest_network_has_the_published_names():
  model = MODELS["256"]
  names = {source.name for source in formats.ncsnv2(model).values()}
  assert len(names) == len(jax.tree.leaves(parameters(model)))
  assert {
    "res31.0.conv2.conv.bias",
    "res4.0.shortcut.weight",
    "refine31.adapt_convs.1.2_1_conv.weight",
    "refine5.output_convs.3_2_conv.weight",
    "refine1.crp.convs.1.weight",
    "normalizer.alpha",
  } < names


class Shallow(nn.Module):
  """The outer `depth` stages, quick to compile; two have every kind of block."""

  num_scales: int
  depth: int
  dtype: str = "float32"
  remat: bool = False

  @nn.compact
  def __call__(self, x, level):
    stages = refinenet.stages(64, "original")[: self.depth]
    options = {"num_scales": self.num_scales, "dtype": self.dtype, "remat": self.remat}
    return refinenet.refinenet(x, level, nf=4, stages=stages, centered=False, **options)


X = jnp.linspace(0, 1, 2 * 64 * 2).reshape(2, 8, 8, 2)
LEVEL = jnp.array([0, 9])
MODULES = pytest.mark.parametrize("module", [ncsn, ncsnv2])


def drawn(model):
  """Random parameters, without running the network's own initialisation."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), X, LEVEL)["params"]
  return perturbed(
    jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes), np.random.default_rng(0)
  )


@pytest.mark.exhaustive
def test_bfloat16_changes_the_output_a_little():
  full, half = Shallow(0, 2), Shallow(0, 2, dtype="bfloat16")
  params = drawn(full)
  out, expected = (network(model, params)(X, LEVEL) for model in (half, full))
  assert 1e-4 < relative_error(out, expected) < 0.1


@pytest.mark.exhaustive
@MODULES
def test_bfloat16_keeps_parameters_and_output_in_float32(module):
  model = module.Model(nf=4, dtype="bfloat16")
  out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), X, jnp.zeros(2))
  assert {leaf.dtype for leaf in jax.tree.leaves((out, variables))} == {jnp.dtype("float32")}
  assert "bf16[2,8,8,4]" in str(trace(model))


@pytest.mark.exhaustive
def test_remat_changes_neither_output_nor_gradient():
  def evaluate(model):
    loss = lambda out: ((out**2).mean(), out)
    gradient = jax.grad(lambda p: loss(model.apply({"params": p}, X, LEVEL)), has_aux=True)
    return jax.tree.leaves(jit(gradient)(params))

  params = drawn(Shallow(10, 1))
  plain, remat = (evaluate(Shallow(10, 1, remat=on)) for on in (False, True))
  for a, b in zip(remat, plain, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@MODULES
@pytest.mark.parametrize("remat", [False, True])
def test_remat_is_a_choice(module, remat):
  assert ("remat" in str(trace(module.Model(nf=4, remat=remat)))) == remat


def trace(model):
  """The jaxpr of the network."""
  variables = jax.eval_shape(model.init, jax.random.key(0), X, jnp.zeros(2))
  return jax.make_jaxpr(model.apply)(variables, X, jnp.zeros(2))
