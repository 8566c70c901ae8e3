"""Convolutions with fewer multiplications are the same convolutions, to rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_conv import (
  FAST_COMPILE,
  TRANSFORMS,
  check_in_shard_map,
  convolutions,
  gradient_of,
  results,
)

from models.layers import winograd
from models.layers.conv import Conv

DIRECT = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
DIRECT = functools.partial(DIRECT, dimension_numbers=("NHWC", "HWIO", "NHWC"))
LAYERS = Conv(16, (3, 3)), nn.Conv(16, (3, 3))


def random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def test_one_axis_is_exact():
  """Four outputs of three weights over six inputs, in float64."""
  rng = np.random.default_rng(0)
  output, kernel, inputs = winograd._transforms()
  k, x = rng.normal(size=3), rng.normal(size=6)
  np.testing.assert_allclose(output @ ((kernel @ k) * (inputs @ x)), np.correlate(x, k), rtol=1e-12)


@pytest.fixture(params=[1, 3])
def num_parts(request, monkeypatch):
  """In how many parts a batch of 6 images [16, 20, 32] is computed."""
  largest = 6 * 16 * 20 * 32 * 4 * 36 // 16 // request.param
  monkeypatch.setattr(winograd, "LARGEST", largest)


@pytest.mark.usefixtures("num_parts")
def test_the_rounding_of_outputs_and_gradients_is_that_of_float32():
  """Less than four times what the direct sum has, 7e-7 of the largest value."""
  x, kernel, gradient = random(6, 16, 20, 32), random(3, 3, 32, 24), random(6, 16, 20, 24)
  ours = winograd.convolution(x, kernel), winograd.kernel_gradient(x, gradient)
  with jax.enable_x64(True):
    x, kernel, gradient = (jnp.asarray(np.float64(a)) for a in (x, kernel, gradient))
    exact, pull = jax.vjp(lambda kernel: DIRECT(x, kernel), kernel)
    for a, b in zip(ours, (exact, *pull(gradient))):
      np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * float(jnp.abs(b).max()))


@functools.cache
def both():
  """What every transformation makes of the layer here and in flax."""
  x, tangent = random(2, 2, 16, 16, 16)
  params = LAYERS[1].init(jax.random.key(1), x)
  run = jax.jit(results, static_argnums=0, compiler_options=FAST_COMPILE)
  return [run(layer, params, x, tangent) for layer in LAYERS]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equals_flax(transform):
  ours, flax = (result[transform] for result in both())
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(flax), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("precision, count", [(None, 0), ("highest", 3)])
def test_the_highest_precision_sums_directly(precision, count):
  """Outputs and both gradients."""
  x = random(2, 16, 16, 16)
  params = LAYERS[0].init(jax.random.key(1), x)
  with jax.default_matmul_precision(precision):
    text = jax.jit(gradient_of(LAYERS[0])).lower(params, x).as_text()
  assert len(convolutions(text)) == count


@pytest.mark.parametrize(
  "shape, features", [((8, 8, 16), 16), ((18, 16, 16), 16), ((16, 16, 3), 16)]
)
def test_what_it_does_not_suit_is_summed_directly(shape, features):
  """Few pixels, no whole tiles, few channels."""
  layer, x = Conv(features, (3, 3)), random(2, *shape)
  params = layer.init(jax.random.key(1), x)
  text = jax.jit(gradient_of(layer)).lower(params, x).as_text()
  assert len(convolutions(text)) == 3


@pytest.mark.parametrize("checked", [True, False])
def test_in_shard_map(checked, monkeypatch):
  """Each device in two parts."""
  monkeypatch.setattr(winograd, "LARGEST", 1)
  check_in_shard_map(LAYERS[0], random(4, 16, 16, 16), checked, rtol=1e-4)
