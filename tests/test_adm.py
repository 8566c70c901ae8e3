"""The iDDPM / ADM network: published sizes, a published forward pass, and what each option does."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from checkpoint_formats import improved_diffusion
from models.adm import Model
from models.layers import adm

PARITY = pathlib.Path(__file__).parents[2] / "shared" / "parity"
TINY = {
  "nf": 8,
  "ch_mult": (1, 2),
  "num_res_blocks": 1,
  "attn_resolutions": (4,),
  "dropout": 0.5,
  "num_heads": 2,
}
PUBLISHED = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}
ADM = {
  "num_classes": 1000,
  "num_head_channels": 64,
  "resblock_updown": True,
  "attn_resolutions": (32, 16, 8),
}


def parameters(model, shape):
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]))[
    "params"
  ]


# quick to compile, slow to run
QUICK = {"xla_backend_optimization_level": "0"}


def drawn(model, shape):
  """Random parameters: the initial ones give zero."""
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
  return jax.tree.map(draw, parameters(model, shape))


@pytest.mark.parametrize(
  "size, options, count",
  [
    (16, PUBLISHED | {"num_classes": 10}, 758_310),
    (32, {}, 52_546_438),
    (64, {"nf": 192, "ch_mult": (1, 2, 3, 4), "num_classes": 1000}, 273_049_350),
    (64, ADM | {"nf": 192, "ch_mult": (1, 2, 3, 4)}, 295_904_454),
    (
      512,
      ADM | {"nf": 256, "ch_mult": (0.5, 1, 1, 2, 2, 4, 4), "num_res_blocks": 2},
      558_997_638,
    ),
  ],
  ids=["parity", "CIFAR-10: 50M", "ImageNet-64: 270M", "ADM-64: 296M", "ADM-512: 559M"],
)
def test_number_of_parameters(size, options, count):
  leaves = jax.tree.leaves(parameters(Model(**options), (1, size, size, 3)))
  assert sum(leaf.size for leaf in leaves) == count


def imported(model, tensors, shape):
  """Our parameters from those of a file, and the names that were used."""
  wanted = traverse_util.flatten_dict(parameters(model, shape), sep="/")
  sources = improved_diffusion.adm(model)
  flat = {path: sources[path].layout(tensors[sources[path].name]) for path in wanted}
  assert {p: a.shape for p, a in flat.items()} == {p: a.shape for p, a in wanted.items()}
  return traverse_util.unflatten_dict(flat, sep="/"), {sources[path].name for path in wanted}


@pytest.fixture(scope="module")
def published():
  """(tensors of the file, inputs and output, description) of the published network."""
  torch = pytest.importorskip("torch", reason="reading the .pt file needs torch")
  if not (PARITY / "iddpm_cond.pt").exists():
    pytest.skip(f"the published forward pass is not here: {PARITY}/iddpm_cond.pt")
  tensors = torch.load(PARITY / "iddpm_cond.pt", weights_only=True)
  tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
  text = (PARITY / "iddpm_cond.json").read_text()
  return tensors, np.load(PARITY / "iddpm_cond.npz"), json.loads(text)


@pytest.mark.parametrize("null_class", [False, True])
def test_the_published_network_is_reproduced(published, null_class):
  tensors, data, description = published
  assert sum(tensor.size for tensor in tensors.values()) == description["params"]
  model = Model(**PUBLISHED, num_classes=10, null_class=null_class)
  params, used = imported(model, tensors, data["x"].shape)
  assert used == set(tensors)
  if null_class:
    assert not params["classes"]["embedding"][10:].any()
  args = (jnp.asarray(data[name]) for name in ("x", "timesteps", "class_labels"))
  with jax.default_matmul_precision("highest"):
    out = jax.jit(model.apply, compiler_options=QUICK)({"params": params}, *args)
  assert np.linalg.norm(out - data["output"]) < 1e-4 * np.linalg.norm(data["output"])


@pytest.mark.parametrize(
  "options, path, name",
  [
    ({}, "input_2_0/conv/kernel", "input_blocks.2.0.op.weight"),
    ({}, "output_1_2/conv/bias", "output_blocks.1.2.conv.bias"),
    ({}, "output_1_1/conv/bias", "output_blocks.1.1.conv.bias"),
    ({"resblock_updown": True}, "input_2_0/in_norm/scale", "input_blocks.2.0.in_layers.0.weight"),
    ({"num_classes": 3}, "classes/embedding", "label_emb.weight"),
    ({"num_head_channels": 16}, "input_3_1/qkv/bias", "input_blocks.3.1.qkv.bias"),
  ],
)
def test_names_in_the_file(options, path, name):
  assert improved_diffusion.adm(Model(**TINY, **options))[path].name == name


def test_timestep_embedding_against_its_formula():
  times, i = np.array([0.0, 17.5, 999.0]), np.arange(4)
  angles = times[:, None] * 10000.0 ** (-i / 4)
  expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
  out = adm.timestep_embedding(jnp.asarray(times, jnp.float32), 8)
  np.testing.assert_allclose(out, expected, atol=2e-4)


@pytest.mark.parametrize("split_first", [False, True])
def test_attention_head_by_head(split_first):
  """Both layouts of the channels against softmax(q k / sqrt(width)) v written out."""
  n, heads, width = 5, 2, 4
  qkv = np.random.default_rng(0).normal(size=(2, n, 3 * heads * width))
  index = np.arange(3 * heads * width)
  index = index.reshape((3, heads, width) if split_first else (heads, 3, width))
  index = index if split_first else index.transpose(1, 0, 2)
  expected = []
  for head in range(heads):
    query, key, value = (qkv[..., index[part, head]] for part in range(3))
    weights = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(width))
    expected.append(weights / weights.sum(-1, keepdims=True) @ value)
  out = adm.attend(jnp.asarray(qkv, jnp.float32), heads, split_first)
  np.testing.assert_allclose(out, np.concatenate(expected, -1), atol=1e-5)


@pytest.mark.parametrize(
  "options, wanted", [({"num_heads": 3}, "3 equal"), ({"num_head_channels": 5}, "heads of 5")]
)
def test_channels_that_do_not_split_into_heads(options, wanted):
  with pytest.raises(ValueError, match="16 channels cannot be split into " + wanted):
    parameters(Model(**TINY | options), (1, 8, 8, 1))


X = jnp.linspace(-1, 1, 3 * 64).reshape(3, 8, 8, 1)
TIME = jnp.array([0.0, 500.0, 999.0])
LABELS = jnp.array([0, 1, 2])


def block_output(bias, scale_shift):
  """A residual block with random parameters whose embedding layer gives `bias` [width]."""
  block = adm.ResBlock(8, use_scale_shift_norm=scale_shift)
  x, told = jnp.sin(jnp.arange(2 * 64 * 8.0)).reshape(2, 8, 8, 8), jnp.ones((2, 4))
  apply = jax.jit(lambda params: block.apply({"params": params}, x, told, False))
  params = jax.jit(lambda: block.init(jax.random.key(0), x, told, False)["params"])()
  kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype("float32")
  params["out_conv"] = {"kernel": kernel, "bias": jnp.ones(8)}
  params["embedding"] = {"kernel": jnp.zeros((4, len(bias))), "bias": bias}
  return apply(params), x


def test_scale_and_shift_act_after_the_norm():
  """A scale of 1 - 1 = 0 leaves the last bias only; a shift then enters as it is."""
  out, x = block_output(jnp.repeat(jnp.array([-1.0, 0.0]), 8), True)
  np.testing.assert_allclose(out, x + 1, atol=1e-6)
  shifted, _ = block_output(jnp.repeat(jnp.array([-1.0, 1.0]), 8), True)
  assert np.abs(shifted - out).max() > 0.1


def test_a_shift_alone_acts_before_the_norm():
  """Groups of one channel: the norm takes a constant away."""
  shifted, still = (block_output(jnp.full(8, c), False)[0] for c in (0.0, 1.0))
  np.testing.assert_allclose(shifted, still, atol=1e-3)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_resampling_block_resamples_its_shortcut(direction):
  """Its convolutions give nothing: the shortcut alone is left."""
  block, told = adm.ResBlock(8, resample=direction), jnp.ones((3, 4))
  x = jnp.broadcast_to(X, (3, 8, 8, 8))
  abstract = jax.eval_shape(lambda: block.init(jax.random.key(0), x, told, False))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract)
  out = jax.jit(block.apply, static_argnums=3, compiler_options=QUICK)(zeros, x, told, False)
  small = x.reshape(3, 4, 2, 4, 2, 8).mean((2, 4))
  expected = {"down": small, "up": x.repeat(2, axis=1).repeat(2, axis=2)}[direction]
  np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (2, 24, 40, 2)])
@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_shapes(shape, updown, learned):
  model = Model(**TINY, resblock_updown=updown, learned_variance=learned)
  out, _ = jax.eval_shape(
    model.init_with_output, jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0])
  )
  assert out.shape == (*shape[:3], shape[3] * (1 + learned))


def test_a_size_that_cannot_be_halved_names_the_nearest():
  with pytest.raises(ValueError, match=r"halved 1 times.*8 or 10"):
    parameters(Model(**TINY), (1, 8, 9, 1))


@functools.cache
def perturbed(**options):
  """A tiny network with random parameters, compiled."""
  model = Model(**TINY, **options)
  apply = functools.partial(model.apply, {"params": drawn(model, X.shape)})
  return jax.jit(apply, static_argnums=3, compiler_options=QUICK)


def differ(a, b):
  """Which examples differ by more than rounding."""
  return (np.abs(a - b) > 1e-3).any((1, 2, 3)).tolist()


def test_the_network_is_told_time_and_labels():
  network = perturbed(num_classes=3, null_class=True)
  out = network(X, TIME, LABELS)
  assert differ(out, network(X, TIME[::-1], LABELS)) == [True, False, True]
  assert differ(out, network(X, TIME, jnp.array([0, 2, 2]))) == [False, True, False]


def test_no_label_is_the_last_class():
  network = perturbed(num_classes=3, null_class=True)
  out = network(X, TIME)
  np.testing.assert_array_equal(out, network(X, TIME, jnp.full(3, 3)))
  assert differ(out, network(X, TIME, LABELS)) == [True] * 3


@pytest.mark.parametrize(
  "options, labels, message",
  [
    ({}, LABELS, "unconditional network"),
    ({"num_classes": 3}, None, r"labels \[b\] in 0 \.\. 2 are required"),
  ],
)
def test_labels_that_do_not_fit_the_network(options, labels, message):
  with pytest.raises(ValueError, match=message):
    perturbed(**options)(X, TIME, labels)


def test_dropout_acts_only_while_training():
  network = perturbed(num_classes=3, null_class=True)
  train = lambda seed: network(X, TIME, None, True, rngs={"dropout": jax.random.key(seed)})
  assert differ(train(0), train(1)) == differ(train(0), network(X, TIME)) == [True] * 3


@pytest.mark.exhaustive
def test_bfloat16_is_for_the_computation_only():
  model = Model(**TINY, dtype="bfloat16")
  assert {leaf.dtype.name for leaf in jax.tree.leaves(parameters(model, X.shape))} == {"float32"}
  out, exact = perturbed(dtype="bfloat16")(X, TIME), perturbed()(X, TIME)
  assert out.dtype == jnp.float32
  error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.1


@pytest.mark.exhaustive
def test_recomputation_changes_nothing():
  """Outputs, gradients and dropout masks, with nn.remat and without."""
  shallow = TINY | {"ch_mult": (1,), "attn_resolutions": ()}

  def loss(params, remat):
    model, rngs = Model(**shallow, remat=remat), {"dropout": jax.random.key(0)}
    out = model.apply({"params": params}, X, TIME, None, True, rngs=rngs)
    return (out**2).mean(), out

  params = drawn(Model(**shallow), X.shape)
  gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1, compiler_options=QUICK)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, gradient(params, True), gradient(params, False))
  blocks = 1 + 2 + 2  # down, middle, up
  assert str(jax.make_jaxpr(lambda p: loss(p, True))(params)).count("remat") == blocks
