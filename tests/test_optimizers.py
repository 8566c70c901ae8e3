"""Any optimizer and schedule of optax, what never trains, what is skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from optimizers import OPTIMIZERS, SCHEDULES, global_norm, learning_rate, make_optimizer
from sde_lib import make_sde

SDE = make_sde("vp")
PARAMS = {"kernel": jnp.arange(1.0, 7).reshape(2, 3), "fourier": {"frequencies": jnp.ones(4)}}


def updated(config, grads, num_steps=1):
  """The parameters after steps with these gradients, and the last state."""
  optimizer, params = make_optimizer(config, SDE), PARAMS
  state = optimizer.init(params)
  for _ in range(num_steps):
    told = {"norm": global_norm(grads), "usable": jnp.array(True)}
    updates, state = optimizer.update(grads, state, params, **told)
    params = optax.apply_updates(params, updates)
  return params, state


def test_learning_rate_warms_up_from_its_first_fraction_and_ends_at_zero():
  config = tiny_config(
    optimizer__warmup_steps=4, training__num_steps=100, optimizer__learning_rate=0.1
  )
  rate = learning_rate(config)
  np.testing.assert_allclose(rate(0), 0.1 / 4, rtol=1e-6)
  np.testing.assert_allclose(rate(50), 0.05, rtol=1e-6)
  assert rate(100) < 1e-8


@pytest.mark.parametrize(
  "name, options, end",
  [
    ("constant", {}, 0.1),
    ("cosine", {"alpha": 0.2}, 0.02),
    ("exponential_decay", {"decay_rate": 0.5}, 0.05),
    ("linear_schedule", {"end_value": 0.01}, 0.01),
    ("polynomial_schedule", {"end_value": 0.02, "power": 2}, 0.02),
    ("piecewise_constant_schedule", {"boundaries_and_scales": {50: 0.1}}, 0.01),
    ("cosine_onecycle_schedule", {"final_div_factor": 25.0}, 0.1 / 625),
  ],
)
def test_a_schedule_of_optax_decays_over_the_whole_run(name, options, end):
  config = tiny_config(
    optimizer__schedule=name,
    optimizer__schedule_options={name: options},
    optimizer__warmup_steps=0,
    optimizer__learning_rate=0.1,
    training__num_steps=100,
  )
  np.testing.assert_allclose(learning_rate(config)(100), end, rtol=1e-4)
  assert name in SCHEDULES


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion", "rmsprop", "adafactor", "lamb"])
def test_an_optimizer_of_optax_is_that_of_optax(name):
  changes = {
    "optimizer__name": name,
    "optimizer__warmup_steps": 0,
    "optimizer__schedule": "constant",
  }
  config = tiny_config(**changes, optimizer__learning_rate=0.1, optimizer__grad_clip=1e9)
  options = config.optimizer.options.get(name, {})
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  optimizer, params = getattr(optax, name)(0.1, **options), PARAMS
  state = optimizer.init(params)
  for _ in range(3):
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  ours = updated(config, grads, 3)[0]
  np.testing.assert_allclose(ours["kernel"], params["kernel"], rtol=1e-5)
  assert len(OPTIMIZERS) > 15


def test_gradients_are_clipped_by_their_global_norm():
  changes = {
    "optimizer__name": "sgd",
    "optimizer__options": {"sgd": {}},
    "optimizer__grad_clip": 0.5,
  }
  config = tiny_config(**changes, optimizer__warmup_steps=0, optimizer__learning_rate=1.0)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  change = PARAMS["kernel"] - updated(config, grads)[0]["kernel"]
  np.testing.assert_allclose(change, 0.5 / np.sqrt(10), rtol=1e-4)
  small = jax.tree.map(lambda g: g * 1e-3, grads)
  change = PARAMS["kernel"] - updated(config, small)[0]["kernel"]
  np.testing.assert_allclose(change, 1e-3, rtol=1e-3)
  none = updated(config, jax.tree.map(jnp.zeros_like, PARAMS))[0]
  jax.tree.map(np.testing.assert_array_equal, none, PARAMS)


def test_the_norm_is_that_of_all_gradients_in_few_sums():
  rng = np.random.default_rng(0)
  vectors = [rng.normal(size=n) for n in (3, 5, 5, 7)]
  grads = {"vectors": vectors, "scalar": 2.0, "kernels": rng.normal(size=(2, 3, 4))}
  grads = jax.tree.map(jnp.float32, grads)
  np.testing.assert_allclose(global_norm(grads), optax.tree.norm(grads), rtol=1e-6)
  jaxpr = str(jax.make_jaxpr(global_norm)(grads))
  assert jaxpr.count("reduce_sum") == 2, "the vectors together, and the kernels"


def test_fixed_frequencies_are_neither_trained_nor_decayed():
  decay = {"optimizer__name": "adamw", "optimizer__options": {"adamw": {"weight_decay": 0.5}}}
  config = tiny_config(**decay, optimizer__warmup_steps=0, optimizer__learning_rate=0.1)
  params, _ = updated(config, jax.tree.map(jnp.ones_like, PARAMS), 3)
  np.testing.assert_array_equal(params["fourier"]["frequencies"], 1.0)
  assert (params["kernel"] < PARAMS["kernel"]).all()


def test_gradients_that_are_not_usable_change_nothing_but_their_count():
  config = tiny_config(optimizer__warmup_steps=0)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  bad = grads | {"kernel": grads["kernel"].at[0, 0].set(jnp.nan)}
  optimizer, (yes, no) = make_optimizer(config, SDE), jnp.array([True, False])
  told = {"norm": global_norm(grads), "usable": yes}
  before = optimizer.update(grads, optimizer.init(PARAMS), PARAMS, **told)[1]
  updates, state = optimizer.update(bad, before, PARAMS, norm=global_norm(bad), usable=no)
  assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
  counts = [optax.tree.get(state, name) for name in ("notfinite_count", "total_notfinite")]
  assert counts == [1, 1]
  inner = [s[0].inner_state for s in (before, state)]
  jax.tree.map(np.testing.assert_array_equal, *inner)
  _, state = optimizer.update(grads, state, PARAMS, **told)
  assert optax.tree.get(state, "notfinite_count") == 0
  assert optax.tree.get(state, "total_notfinite") == 1
