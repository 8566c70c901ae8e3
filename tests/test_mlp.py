"""The perceptron: what it can be, what reaches it, and that it learns a law of known optimum."""

import functools

import analytic
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import losses
from models.mlp import ACTIVATIONS, Model
from parameterization import make_noise_fn
from sde_lib import make_sde, marginal

TIME = jnp.array([0.0, 500.0, 999.0])
X = jnp.linspace(-1, 1, 3 * 2).reshape(3, 2)
TINY = {"hidden": (8, 16), "embedding_size": 8}


def abstract(model, shape):
  """Shapes of (output, parameters)."""
  x, c_noise = jnp.zeros(shape), jnp.zeros(shape[0])
  out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x, c_noise)
  return out, variables["params"]


@functools.cache
def network(**options):
  """A tiny network, compiled, with random parameters: the initial ones give nearly zero."""
  model, rng = Model(**TINY | options), np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
  params = jax.tree.map(draw, abstract(model, X.shape)[1])
  return jax.jit(functools.partial(model.apply, {"params": params}), static_argnums=3)


def differ(a, b):
  """Which examples differ by more than rounding."""
  return (np.abs(a - b) > 1e-3).any(1).tolist()


@pytest.mark.parametrize("shape", [(3, 2), (1, 5), (2, 4, 6, 1), (2, 7, 3)])
def test_output_has_the_shape_of_its_input(shape):
  assert abstract(Model(**TINY), shape)[0].shape == shape


def test_the_toy_network_of_ncsn():
  """2-128-128-2 with softplus, blind to time: the composition written out."""
  model = Model(hidden=(128, 128), activation="softplus", conditional=False)
  params = abstract(model, (1, 2))[1]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 17_154
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(scale=0.1, size=leaf.shape), params)
  h = np.array(X)
  for layer in ("hidden_0", "hidden_1", "out"):
    h = h @ params[layer]["kernel"] + params[layer]["bias"]
    h = h if layer == "out" else np.log1p(np.exp(h))
  params = jax.tree.map(jnp.float32, params)
  np.testing.assert_allclose(model.apply({"params": params}, X, TIME), h, rtol=1e-4)


def test_a_layer_of_any_shape_is_the_layer_of_its_values():
  grid = X.reshape(1, 3, 2, 1)
  model = Model(**TINY)
  params = jax.jit(model.init)(jax.random.key(0), grid, TIME[:1])["params"]
  params["out"]["kernel"] += jnp.arange(6.0)[None]
  apply = lambda x: jax.jit(model.apply)({"params": params}, x, TIME[:1])
  np.testing.assert_array_equal(apply(grid).reshape(1, 6), apply(X.reshape(1, 6)))


def test_time_and_labels_reach_their_own_example():
  run = network(num_classes=3)
  assert differ(run(X, TIME), run(X, TIME[::-1])) == [True, False, True]
  out = run(X, TIME, jnp.array([0, 1, 2]))
  assert differ(out, run(X, TIME, jnp.array([0, 2, 2]))) == [False, True, False]
  assert differ(out, run(X, TIME)) == [True] * 3
  np.testing.assert_array_equal(run(X, TIME), run(X, TIME, jnp.full(3, 3)))


def test_a_network_blind_to_time_gives_the_same_at_every_time():
  run = network(conditional=False)
  np.testing.assert_array_equal(run(X, TIME), run(X, TIME[::-1]))


def test_time_reaches_every_layer():
  params = abstract(Model(**TINY), (1, 2))[1]
  shapes = {name: params[name]["kernel"].shape for name in params if name.startswith("time_")}
  assert shapes == {"time_0": (8, 8), "time_1": (8, 16)}


def test_dropout_acts_only_while_training():
  run = network(dropout=0.5)
  train = lambda seed: run(X, TIME, None, True, rngs={"dropout": jax.random.key(seed)})
  np.testing.assert_array_equal(run(X, TIME), run(X, TIME))
  assert differ(train(0), train(1)) == differ(train(0), run(X, TIME)) == [True] * 3


def test_activations_differ_and_an_unknown_one_lists_them():
  outputs = [network(activation=name)(X, TIME) for name in ACTIVATIONS]
  assert all(any(differ(a, b)) for i, a in enumerate(outputs) for b in outputs[:i])
  with pytest.raises(
    ValueError, match=r"'silu' is unknown.*elu, gelu, relu, softplus, swish, tanh"
  ):
    abstract(Model(activation="silu"), (1, 2))


@pytest.mark.exhaustive
def test_bfloat16_keeps_float32_outside():
  leaves = jax.tree.leaves(abstract(Model(dtype="bfloat16", **TINY), (3, 2)))
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
  exact, rounded = network()(X, TIME), network(dtype="bfloat16")(X, TIME)
  assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.05


def test_it_learns_a_gaussian():
  """Trained for 400 steps it comes near the least denoising loss there is, the mean over time of
  the noise's variance given x: the sum over eigenvalues v of alpha^2 v / (alpha^2 v + sigma^2).
  """
  law, sde = analytic.rotated([0.5, -1.0], [2.0, 0.1]), make_sde("vp")
  model = Model(hidden=(64, 64), embedding_size=32)
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 400))

  def loss(params, key, total):
    keys, first = jax.random.split(key, 3), jnp.arange(total)
    noise_fn = make_noise_fn(sde, model, params, output="noise", c_noise="log_snr")
    times = losses.stratified(losses.uniform_quantile, keys[0], first, total)
    draw = {"weighting": losses.WEIGHTINGS["simple"], "time_sampler": times}
    return losses.denoising_loss(keys[1], sde, noise_fn, law.sample(keys[2], total), **draw).mean()

  @jax.jit
  def step(params, state, key):
    updates, state = optimizer.update(jax.grad(loss)(params, key, 256), state)
    return optax.apply_updates(params, updates), state

  params = jax.jit(model.init)(jax.random.key(0), X, TIME)["params"]
  state = optimizer.init(params)
  for i in range(400):
    params, state = step(params, state, jax.random.key(i))
  alpha, sigma = marginal(sde, jnp.linspace(sde.t_min, sde.t_max, 10_001))
  signal = alpha[:, None] ** 2 * law.variances
  least = (signal / (signal + sigma[:, None] ** 2)).sum(1).mean()
  reached = jax.jit(loss, static_argnums=2)(params, jax.random.key(1000), 100_000)
  assert 0.985 < reached / least < 1.03
