"""The U-Net for sequences: it is the 2-D network on images that are constant along their width."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import ddpm, unet1d

TINY = {
  "nf": 8,
  "ch_mult": (1, 2),
  "num_res_blocks": 1,
  "attn_resolutions": (4, 12),
  "dropout": 0.5,
}
ALL = {"num_classes": 3, "learned_variance": True}
SMALL = {"ch_mult": (1,), "num_res_blocks": 0}
FAST = {"xla_backend_optimization_level": "0"}
TIME = jnp.array([0.0, 999.0])
X = jnp.sin(jnp.arange(2 * 8 * 2.0)).reshape(2, 8, 2)


def abstract(model, shape):
  """Shapes of (output, parameters)."""
  x, c_noise = jnp.zeros(shape), jnp.zeros(shape[0])
  out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x, c_noise)
  return out, variables["params"]


@functools.cache
def perturbed(**options):
  """(model, random parameters): the initial ones give zero."""
  model, rng = unet1d.Model(**TINY | options), np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
  return model, jax.tree.map(draw, abstract(model, X.shape)[1])


@functools.cache
def network(**options):
  model, params = perturbed(**options)
  run = functools.partial(model.apply, {"params": params})
  return jax.jit(run, static_argnums=3, compiler_options=FAST)


def differ(a, b):
  """Which examples differ by more than rounding."""
  return (np.abs(a - b) > 1e-3).any((1, 2)).tolist()


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 1), (1, 24, 5)])
def test_output_has_the_shape_of_its_input(shape, learned_variance):
  model = unet1d.Model(learned_variance=learned_variance, **TINY)
  assert abstract(model, shape)[0].shape == (*shape[:2], shape[2] * (1 + learned_variance))


@pytest.mark.parametrize("length, nearest", [(30, "28 or 32"), (2, "4")])
def test_a_length_that_cannot_be_halved_names_the_nearest(length, nearest):
  with pytest.raises(ValueError, match=f"halved 2 times.*to {length}: {nearest}"):
    abstract(unet1d.Model(nf=8, ch_mult=(1, 1, 1)), (1, length, 1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{}, {"attn_every_block": False, "num_classes": 10}])
def test_number_of_parameters_is_that_of_the_image_network_but_for_the_kernels(options):
  """Of the 3x3 kernels of the published network a third is left."""
  params = abstract(unet1d.Model(128, **options), (1, 32, 3))[1]
  image_params = abstract(ddpm.Model(128, **options), (1, 32, 32, 3))[1]
  sizes = lambda tree, factor: jax.tree.map(lambda a: a.size // (factor if a.ndim > 2 else 1), tree)
  assert sizes(params, 1) == sizes(image_params, 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  "options",
  [
    ALL,
    {"resamp_with_conv": False, "attn_every_block": False, "conditional": False},
  ],
)
def test_it_is_the_image_network_on_images_constant_along_their_width(options):
  """Each kernel becomes the middle column of a 3x3 kernel of zeros."""
  _, params = perturbed(**options)
  widen = lambda leaf: jnp.zeros((3, *leaf.shape)).at[1].set(leaf).swapaxes(0, 1)
  wide = jax.tree.map(lambda leaf: widen(leaf) if leaf.ndim == 3 else leaf, params)
  apply = jax.jit(ddpm.Model(**TINY | options).apply, compiler_options=FAST)
  images = apply({"params": wide}, X[:, :, None].repeat(4, axis=2), TIME, jnp.array([2, 0]))
  out = network(**options)(X, TIME, jnp.array([2, 0]))
  np.testing.assert_allclose(images, out[:, :, None].repeat(4, axis=2), rtol=1e-4, atol=1e-4)


def test_output_is_nearly_zero_at_initialisation():
  model = unet1d.Model(**TINY | SMALL)
  out, _ = jax.jit(model.init_with_output, compiler_options=FAST)(jax.random.key(0), X, TIME)
  assert 0 < np.abs(out).max() < 1e-4


def test_time_and_labels_reach_their_own_example():
  run = network(**ALL)
  assert differ(run(X, TIME), run(X, TIME.at[1].set(0.0))) == [False, True]
  out = run(X, TIME, jnp.array([0, 1]))
  assert differ(out, run(X, TIME, jnp.array([2, 1]))) == [True, False]
  assert differ(out, run(X, TIME)) == [True, True]
  np.testing.assert_array_equal(run(X, TIME), run(X, TIME, jnp.full(2, 3)))


def test_dropout_acts_only_while_training():
  run = network(**SMALL)
  train = lambda seed: run(X, TIME, None, True, rngs={"dropout": jax.random.key(seed)})
  np.testing.assert_array_equal(run(X, TIME), run(X, TIME))
  assert differ(train(0), train(1)) == differ(train(0), run(X, TIME)) == [True] * 2


@pytest.mark.exhaustive
def test_bfloat16_keeps_float32_outside():
  leaves = jax.tree.leaves(abstract(unet1d.Model(dtype="bfloat16", **TINY), X.shape))
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
  exact, rounded = network(**SMALL)(X, TIME), network(**SMALL, dtype="bfloat16")(X, TIME)
  error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.05
  narrow, _ = perturbed(**ALL, dtype="bfloat16")
  program = str(jax.make_jaxpr(narrow.init)(jax.random.key(0), X, TIME))
  convolutions = [line for line in program.splitlines() if "conv_general" in line]
  assert convolutions and all(":bf16[" in line for line in convolutions)


@pytest.mark.exhaustive
def test_remat_changes_neither_outputs_nor_gradients():
  def value_and_grads(remat):
    model, params = perturbed(remat=remat, **SMALL)
    rngs = {"dropout": jax.random.key(0)}
    loss = lambda params: (
      model.apply({"params": params}, X, TIME, None, True, rngs=rngs) ** 2
    ).sum()
    assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(params))) == remat
    return jax.jit(jax.value_and_grad(loss), compiler_options=FAST)(params)

  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)
  jax.tree.map(close, value_and_grads(True), value_and_grads(False))
