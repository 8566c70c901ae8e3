"""The diffusion transformer: published sizes, what mixes with what, and its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import dit

TINY = {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
FAST = {"xla_backend_optimization_level": "0"}
TIME = jnp.array([0.0, 500.0, 999.0])
X = jnp.linspace(-1, 1, 3 * 4 * 6).reshape(3, 4, 6, 1)


def abstract(model, shape):
  """Shapes of (output, parameters)."""
  x, c_noise = jnp.zeros(shape), jnp.zeros(shape[0])
  out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x, c_noise)
  return out, variables["params"]


@functools.cache
def perturbed(shape=X.shape[1:], **options):
  """(model, random parameters): the initial ones give zero."""
  model, rng = dit.Model(**TINY | options), np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
  return model, jax.tree.map(draw, abstract(model, (1, *shape))[1])


@functools.cache
def network(**options):
  model, params = perturbed(**options)
  return jax.jit(functools.partial(model.apply, {"params": params}))


def differ(a, b):
  """Which examples differ by more than rounding."""
  return (np.abs(a - b) > 1e-3).any((1, 2, 3)).tolist()


@pytest.mark.parametrize(
  "hidden, depth, heads, count, millions",
  [
    (384, 12, 6, 32_865_056, 33),
    (768, 12, 12, 130_315_808, 130),
    (1024, 24, 16, 457_840_672, 458),
    (1152, 28, 16, 674_834_720, 675),
  ],
)
def test_number_of_parameters(hidden, depth, heads, count, millions):
  """DiT-S/2, B/2, L/2 and XL/2 on 32x32x4 latents: summed by hand, and as published (table 4)."""
  d, pixels = hidden, 2 * 2 * 4
  block = (6 * d * d + 6 * d) + (4 * d * d + 4 * d) + (8 * d * d + 5 * d)
  tokens = pixels * d + d
  condition = (256 * d + d) + (d * d + d) + 1001 * d
  last = (2 * d * d + 2 * d) + 2 * pixels * (d + 1)
  model = dit.Model(2, hidden, depth, heads, num_classes=1000, learned_variance=True)
  out, params = abstract(model, (1, 32, 32, 4))
  assert out.shape == (1, 32, 32, 8)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert total == depth * block + tokens + condition + last == count
  assert round(total / 1e6) == millions


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("patch, shape", [(2, (3, 4, 6, 1)), (3, (1, 3, 9, 2)), (1, (2, 5, 2, 3))])
def test_output_has_the_shape_of_its_input(patch, shape, learned_variance):
  model = dit.Model(patch, learned_variance=learned_variance, **TINY)
  assert abstract(model, shape)[0].shape == (*shape[:3], shape[3] * (1 + learned_variance))


def test_at_initialisation_blocks_are_the_identity_and_the_output_is_zero():
  model = dit.Model(**TINY | {"depth": 1})
  watch = lambda module, _: isinstance(module, dit.Block)
  init = functools.partial(model.init_with_output, capture_intermediates=watch)
  out, variables = jax.jit(init, compiler_options=FAST)(jax.random.key(0), X, TIME)
  np.testing.assert_array_equal(out, jnp.zeros_like(X))
  after = variables["intermediates"]["block_0"]["__call__"][0]
  layer = variables["params"]["patches"]
  before = dit.patchify(X, 2) @ layer["kernel"] + dit.position_embedding(2, 3, 16)[None]
  np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.parametrize(
  "options, size, message",
  [
    ({"patch_size": 4}, (8, 30), r"image size \(8, 30\).*multiple of 4.*to 30: 28 or 32"),
    ({"patch_size": 3}, (2, 3), r"image size \(2, 3\).*multiple of 3.*to 2: 3"),
    ({"hidden_size": 20}, (4, 4), "hidden_size 20.*multiple of 8.*to 20: 16 or 24"),
    ({"num_heads": 3}, (4, 4), "hidden_size 16.*num_heads 3.*multiple of 24.*to 16: 24"),
  ],
)
def test_what_does_not_divide_names_the_nearest(options, size, message):
  with pytest.raises(ValueError, match=message):
    abstract(dit.Model(**TINY | options), (1, *size, 1))


def test_position_embedding_is_that_of_the_paper():
  """[sin, cos] of the column, then of the row, at frequencies 10000^(-k / 3), row by row."""
  w = 10000.0 ** -(np.arange(3) / 3)
  tell = lambda p: np.concatenate([np.sin(p * w), np.cos(p * w)])
  expected = [np.concatenate([tell(j), tell(i)]) for i in range(2) for j in range(5)]
  np.testing.assert_allclose(dit.position_embedding(2, 5, 12), expected, atol=1e-6)


def test_without_blocks_a_patch_sees_only_itself():
  """Changes one pixel of a network of depth 0: exactly the pixels of its patch change."""
  run = network(depth=0)
  changed = np.array(run(X.at[1, 3, 4].add(1.0), TIME) != run(X, TIME))[..., 0]
  expected = np.zeros_like(changed)
  expected[1, 2:4, 4:6] = True
  np.testing.assert_array_equal(changed, expected)


def test_patches_are_cut_and_put_back():
  image = jnp.arange(2 * 6 * 9 * 2.0).reshape(2, 6, 9, 2)
  tokens = dit.patchify(image, 3)
  np.testing.assert_array_equal(tokens[1, 4], image[1, 3:6, 3:6].reshape(-1))
  np.testing.assert_array_equal(dit.unpatchify(tokens, (2, 3), 3), image)


@functools.cache
def block():
  """(block of two heads, its random parameters, tokens [2, 7, 8], condition [2, 8])."""
  module, rng = dit.Block(2, 4.0, "float32"), np.random.default_rng(0)
  tokens, condition = jnp.float32(rng.normal(size=(2, 7, 8))), jnp.float32(rng.normal(size=(2, 8)))
  draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
  variables = jax.eval_shape(module.init, jax.random.key(0), tokens, condition)
  variables = jax.tree.map(draw, variables)
  run = jax.jit(functools.partial(module.apply, variables))
  return run, variables["params"], tokens, condition


def test_a_block_is_the_figure_of_the_paper():
  """Figure 3, written out in numpy: the order of the six vectors is the published code's."""
  run, params, tokens, condition = block()
  params = jax.tree.map(np.float64, params)
  linear = lambda x, name: x @ params[name]["kernel"] + params[name]["bias"]
  norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  gelu = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  x = np.float64(tokens)
  six = np.split(linear(np.float64(condition), "modulation")[:, None], 6, axis=-1)
  query, key, value = np.split(linear(norm(x) * (1 + six[1]) + six[0], "qkv"), 3, axis=-1)
  heads = []
  for head in (slice(0, 4), slice(4, 8)):
    logits = query[..., head] @ key[..., head].swapaxes(1, 2) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    heads.append(weights @ value[..., head])
  x = x + six[2] * linear(np.concatenate(heads, axis=-1), "attention_out")
  x = x + six[5] * linear(gelu(linear(norm(x) * (1 + six[4]) + six[3], "mlp_in")), "mlp_out")
  np.testing.assert_allclose(run(tokens, condition), x, rtol=1e-4, atol=1e-4)


def test_a_block_knows_no_order():
  run, _, tokens, condition = block()
  order, out = np.random.default_rng(1).permutation(7), run(tokens, condition)
  np.testing.assert_allclose(run(tokens[:, order], condition), out[:, order], atol=1e-5)
  assert np.abs(run(tokens.at[:, 0, 0].add(1.0), condition) - out).max(2).min() > 1e-3


def test_every_patch_sees_every_other_and_its_place():
  run = network()
  assert np.all(run(X.at[:, 0, 0].add(1.0), TIME) != run(X, TIME))
  constant = np.array(run(jnp.ones_like(X), TIME)).reshape(3, 2, 2, 3, 2).swapaxes(2, 3)
  patches = constant.reshape(3, 6, 4)[0]
  assert all(np.abs(patches[i] - patches[j]).max() > 1e-3 for i in range(6) for j in range(i))


def test_time_and_labels_reach_their_own_example():
  run = network()
  assert differ(run(X, TIME), run(X, TIME[::-1])) == [True, False, True]
  out = run(X, TIME, jnp.array([0, 1, 2]))
  assert differ(out, run(X, TIME, jnp.array([0, 2, 2]))) == [False, True, False]


def test_no_label_is_a_class_of_its_own():
  run = network()
  for label in range(3):
    assert differ(run(X, TIME), run(X, TIME, jnp.full(3, label))) == [True] * 3
  np.testing.assert_array_equal(run(X, TIME), run(X, TIME, jnp.full(3, 3)))


def test_without_classes_there_is_no_table():
  assert "classes" not in abstract(dit.Model(**TINY | {"num_classes": 0}), (1, 4, 4, 1))[1]


@pytest.mark.exhaustive
def test_bfloat16_keeps_float32_outside():
  model = dit.Model(dtype="bfloat16", **TINY)
  leaves = jax.tree.leaves(abstract(model, (1, 4, 6, 1)))
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
  exact, rounded = network()(X, TIME), network(dtype="bfloat16")(X, TIME)
  error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.05


@pytest.mark.exhaustive
def test_remat_changes_neither_outputs_nor_gradients():
  def value_and_grads(remat):
    model, params = perturbed(remat=remat, depth=1)
    loss = lambda params: (model.apply({"params": params}, X, TIME) ** 2).sum()
    assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(params))) == remat
    return jax.jit(jax.value_and_grad(loss), compiler_options=FAST)(params)

  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, value_and_grads(True), value_and_grads(False))
