"""The convolution with canonical gradients against flax.linen.Conv, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from models.layers.conv import Conv

CASES = {
  "same": ((3, 3), {}),
  "pixel": ((1, 1), {}),
  "valid": ((3, 3), {"padding": "VALID", "use_bias": False}),
  "pads": ((3, 2), {"padding": ((0, 1), (2, 3))}),
  "stride": ((3, 3), {"strides": (2, 2)}),
  "dilated": ((3, 3), {"kernel_dilation": (2, 2)}),
}
TRANSFORMS = ("output", "vjp", "probes", "hessian", "per_example", "remat", "scan")
FAST_COMPILE = {"xla_backend_optimization_level": "0"}


def data(dtype=jnp.float32):
  """Inputs [4, 7, 6, 3] of odd and even size, and tangents."""
  return jax.random.normal(jax.random.key(0), (2, 4, 7, 6, 3), dtype)


def results(layer, params, x, tangent):
  """What each transformation makes of the layer, by name."""
  apply = lambda params, x: jnp.sin(layer.apply(params, x))
  loss = lambda params, x: jnp.mean(apply(params, x) ** 2)
  gradient = jax.grad(loss, (0, 1))
  push = lambda tangent: jax.jvp(functools.partial(apply, params), (x,), (tangent,))[1]
  descend = lambda p, _: (jax.tree.map(lambda a, g: a - g, p, jax.grad(loss)(p, x)), None)
  return {
    "output": apply(params, x),
    "vjp": gradient(params, x),
    "probes": jax.vmap(push)(jnp.stack([tangent, x])),
    "hessian": jax.jvp(gradient, (params, x), (params, tangent)),
    "per_example": jax.vmap(gradient, (None, 0))(params, x[:, None]),
    "remat": jax.grad(jax.checkpoint(loss))(params, x),
    "scan": jax.lax.scan(descend, params, length=3)[0],
  }


@functools.cache
def both(case, dtype=jnp.float32):
  """The results of our layer and of flax's, with the same parameters."""
  kernel_size, options = CASES[case]
  x, tangent = data(dtype)
  ours, flax = (kind(5, kernel_size, **options) for kind in (Conv, nn.Conv))
  params = jax.tree.map(lambda a: a.astype(dtype) + 0.1, flax.init(jax.random.key(1), x))
  run = jax.jit(results, static_argnums=0, compiler_options=FAST_COMPILE)
  return run(ours, params, x, tangent), run(flax, params, x, tangent)


def compare(case, transform, tolerance, dtype=jnp.float32):
  ours, flax = (result[transform] for result in both(case, dtype))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(flax), strict=True):
    assert a.dtype == b.dtype == dtype
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_equals_flax(case, transform):
  compare(case, transform, 1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equals_flax_in_float64(x64, transform):
  compare("pads", transform, 1e-12, jnp.float64)


@pytest.mark.parametrize("case", CASES)
def test_same_parameters_and_initialisation(case):
  kernel_size, options = CASES[case]
  ours, flax = (
    kind(5, kernel_size, **options).init(jax.random.key(1), data()[0]) for kind in (Conv, nn.Conv)
  )
  jax.tree.map(np.testing.assert_array_equal, ours, flax)


def gradient_of(layer):
  """Of a scalar, with respect to (parameters, inputs)."""
  return jax.grad(lambda params, x: (layer.apply(params, x) ** 2).mean(), (0, 1))


def test_one_dimension():
  x = data()[0][..., 0]
  ours, flax = Conv(4, (3,)), nn.Conv(4, (3,))
  params = flax.init(jax.random.key(1), x)
  check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(check, gradient_of(ours)(params, x), gradient_of(flax)(params, x))


def check_in_shard_map(layer, x, checked, rtol):
  """Gradients of the parameters on two devices are those on one."""
  params = layer.init(jax.random.key(1), x)
  loss = lambda params, x: (layer.apply(params, x) ** 2).mean()
  mean = lambda value: jax.lax.pmean(value, "data")
  averaged = jax.grad(lambda params, x: mean(loss(params, x)))
  body = averaged if checked else lambda *args: mean(jax.grad(loss)(*args))
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec()}
  mapped = jax.jit(jax.shard_map(body, mesh=mesh, check_vma=checked, **specs))
  check = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6)
  jax.tree.map(check, mapped(params, x), jax.grad(loss)(params, x))


@pytest.mark.parametrize("checked", [True, False])
def test_in_shard_map(checked):
  """With the replication check the gradient of replicated parameters is summed by itself."""
  check_in_shard_map(Conv(5, (3, 3)), data()[0], checked, rtol=1e-5)


@pytest.mark.exhaustive
def test_bfloat16():
  """Computes in bfloat16, leaves the parameters and their gradients in float32."""
  x, _ = data()
  ours, exact = (Conv(5, (3, 3), dtype=dtype) for dtype in ("bfloat16", None))
  params = ours.init(jax.random.key(1), x)
  gradient = lambda layer: jax.grad(lambda p: (layer.apply(p, x) ** 2).mean())(params)
  assert ours.apply(params, x).dtype == jnp.bfloat16
  for a, b in zip(jax.tree.leaves(gradient(ours)), jax.tree.leaves(gradient(exact))):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()), rtol=0)


def test_gradients_in_a_loop_have_the_canonical_layout():
  """What XLA:CPU runs fast inside loops, where it does not rewrite layouts itself."""
  x, _ = data()
  layer = Conv(5, (3, 3))
  params = layer.init(jax.random.key(1), x)
  step = lambda carry, _: (gradient_of(layer)(*carry), None)
  loop = jax.jit(lambda *carry: jax.lax.scan(step, carry, length=3)[0])
  text = loop.lower(params, x).as_text()
  layouts = {line.split("dim_numbers = ")[1].split(",")[0] for line in convolutions(text)}
  assert len(convolutions(text)) == 3 and len(layouts) == 1


def convolutions(text):
  return [line for line in text.splitlines() if "stablehlo.convolution" in line]
