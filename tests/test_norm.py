"""Group normalisation against flax's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from models.layers.norm import GroupNorm


@pytest.mark.parametrize("shape", [(3, 7, 6, 12), (3, 11, 12), (3, 12)])
def test_outputs_and_gradients_are_those_of_flax(x64, shape):
  x = jax.random.normal(jax.random.key(0), shape, jnp.float64) + 2
  params = {
    "scale": jnp.linspace(0.5, 2, 12, dtype=jnp.float64),
    "bias": jnp.linspace(-1, 1, 12, dtype=jnp.float64),
  }

  def results(kind):
    layer = kind(num_groups=4, epsilon=1e-3, dtype="float64")
    apply = lambda params, x: layer.apply({"params": params}, x)
    loss = lambda params, x: jnp.sin(apply(params, x)).sum()
    return apply(params, x), jax.grad(loss, (0, 1))(params, x)

  check = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
  jax.tree.map(check, results(GroupNorm), results(nn.GroupNorm))


def test_parameters_and_types_are_those_of_flax():
  x = jnp.ones((2, 4, 4, 6), jnp.bfloat16)
  for dtype in (None, "bfloat16", "float32"):
    layers = [kind(num_groups=2, dtype=dtype) for kind in (GroupNorm, nn.GroupNorm)]
    ours, flax = (layer.init_with_output(jax.random.key(0), x) for layer in layers)
    assert ours[0].dtype == flax[0].dtype
    jax.tree.map(np.testing.assert_array_equal, ours[1], flax[1])


def test_a_constant_image_has_no_variance_below_zero():
  layer, x = GroupNorm(1), jnp.full((1, 8, 8, 4), 1e3)
  assert jnp.isfinite(layer.init_with_output(jax.random.key(0), x)[0]).all()
