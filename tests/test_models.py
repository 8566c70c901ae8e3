"""The DDPM network: published sizes, shapes, and what reaches it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ddpm import Model
from models.layers import unet

TINY = {
  "nf": 8,
  "ch_mult": (1, 2),
  "num_res_blocks": 1,
  "attn_resolutions": (4, 12),
  "dropout": 0.5,
}
LARGE = {"ch_mult": (1, 1, 2, 2, 4, 4)}
ONCE = {"attn_every_block": False}


def parameters(model, shape):
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]))[
    "params"
  ]


@pytest.mark.parametrize(
  "size, options, count",
  [
    (32, {}, 35_746_307),
    (32, ONCE, 35_218_947),
    (32, ONCE | {"conditional": False}, 32_329_347),
    (256, LARGE, 113_673_219),
    (256, LARGE | ONCE, 111_569_923),
  ],
)
def test_number_of_parameters(size, options, count):
  leaves = jax.tree.leaves(parameters(Model(**options), (1, size, size, 3)))
  assert sum(leaf.size for leaf in leaves) == count


@functools.cache
def perturbed(**options):
  """A tiny network, compiled, with random parameters: the initial ones give zero."""
  model, rng = Model(**TINY, **options), np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
  params = jax.tree.map(draw, parameters(model, (1, 8, 8, 1)))
  return jax.jit(functools.partial(model.apply, {"params": params}), static_argnums=3)


X = jnp.linspace(-1, 1, 3 * 64).reshape(3, 8, 8, 1)
TIME = jnp.array([0.0, 500.0, 999.0])


def differ(a, b):
  """Which examples differ by more than rounding."""
  return (np.abs(a - b) > 1e-3).any((1, 2, 3)).tolist()


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (2, 24, 40, 2)])
def test_output_has_the_shape_of_its_input(shape):
  model = Model(**TINY)
  out, _ = jax.eval_shape(
    model.init_with_output, jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0])
  )
  assert out.shape == shape


@pytest.mark.parametrize(
  "size, nearest", [((30, 32), "28 or 32"), ((32, 2), "4"), ((32, 35), "32 or 36")]
)
def test_a_size_that_cannot_be_halved_names_the_nearest(size, nearest):
  with pytest.raises(ValueError, match=f"halved 2 times.*{nearest}"):
    parameters(Model(nf=8, ch_mult=(1, 1, 1)), (1, *size, 1))


def test_the_network_is_told_the_time():
  network = perturbed(num_classes=3)
  assert differ(network(X, TIME), network(X, TIME[::-1])) == [True, False, True]


def test_labels_change_their_own_example():
  network = perturbed(num_classes=3)
  out = network(X, TIME, jnp.array([0, 1, 2]))
  assert differ(out, network(X, TIME, jnp.array([0, 2, 2]))) == [False, True, False]


def test_no_label_is_a_class_of_its_own():
  network = perturbed(num_classes=3)
  for label in range(3):
    assert differ(network(X, TIME), network(X, TIME, jnp.full(3, label))) == [True] * 3
  np.testing.assert_array_equal(network(X, TIME), network(X, TIME, jnp.full(3, 3)))


def test_a_network_blind_to_time_gives_the_same_at_every_time():
  network = perturbed(conditional=False)
  np.testing.assert_array_equal(network(X, TIME), network(X, TIME[::-1]))


def test_dropout_acts_only_while_training():
  """Without training the network neither asks for a dropout key nor differs from call to call."""
  network = perturbed(num_classes=3)
  train = lambda seed: network(X, TIME, None, True, rngs={"dropout": jax.random.key(seed)})
  np.testing.assert_array_equal(network(X, TIME), network(X, TIME))
  assert differ(train(0), train(1)) == differ(train(0), network(X, TIME)) == [True] * 3


def test_a_learned_variance_doubles_the_channels():
  model = Model(**TINY, learned_variance=True)
  out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), X, TIME)
  assert out.shape == (3, 8, 8, 2)


def test_data_that_are_not_centered_are_mapped():
  out = perturbed(centered=False)((X + 1) / 2, TIME)
  np.testing.assert_allclose(out, perturbed()(X, TIME), rtol=1e-3, atol=1e-4)


def test_groups_of_one_channel_on_request():
  """The published code always has 32 groups: of 32 channels each is one."""
  groups = lambda **options: unet.group_norm(32, **options).num_groups
  assert (groups(), groups(group_size=1)) == (8, 32)
  assert differ(perturbed(group_size=1)(X, TIME), perturbed()(X, TIME)) == [True] * 3


def test_low_precision_computes_close_and_stays_float32_outside():
  low, exact = perturbed(dtype="bfloat16")(X, TIME), perturbed()(X, TIME)
  assert low.dtype == jnp.float32
  leaves = jax.tree.leaves(parameters(Model(**TINY, dtype="bfloat16"), X.shape))
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
  assert 1e-4 < np.abs(low - exact).max() / np.abs(exact).max() < 0.1


def test_recomputed_activations_change_nothing():
  """Same names, same outputs, same gradients, dropout included."""
  model, rngs = (
    Model(**(TINY | {"ch_mult": (1,), "attn_resolutions": ()})),
    {"dropout": jax.random.key(0)},
  )
  draw = lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype)
  params = jax.tree.map(draw, parameters(model, (3, 4, 4, 1)))

  def value_and_gradient(remat):
    apply = model.clone(remat=remat).apply
    square = lambda p: (apply({"params": p}, X[:, :4, :4], TIME, None, True, rngs=rngs) ** 2).mean()
    quick = {"xla_backend_optimization_level": "0"}
    return jax.jit(jax.value_and_grad(square), compiler_options=quick)(params)

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, value_and_gradient(True), value_and_gradient(False))
