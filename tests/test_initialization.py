"""Draws that are joined are the same draws, and fewer of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from initialization import joined
from models import adm, ddpm, mlp, ncsn, ncsnpp

EXHAUSTIVE = pytest.mark.exhaustive
UNET = {"nf": 8, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (4,)}
NETWORKS = {
  "ddpm": ddpm.Model(**UNET),
  "ncsnpp": ncsnpp.Model(**UNET, remat=True),
  "adm": adm.Model(nf=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(4,), num_classes=3),
  "ncsn": ncsn.Model(nf=4),
  "mlp": mlp.Model(),
}


def compiled(function):
  return (
    jax.jit(function, compiler_options={"xla_backend_optimization_level": "0"}).lower().compile()
  )


@pytest.mark.parametrize(
  "name", [n if n in ("ddpm", "mlp") else pytest.param(n, marks=EXHAUSTIVE) for n in NETWORKS]
)
def test_a_network_begins_with_the_same_parameters(name):
  """To the bit, but for a last one where a sum is fused with its product."""
  inputs = jnp.zeros((1, 2) if name == "mlp" else (1, 8, 8, 1)), jnp.ones(1)
  init = lambda: NETWORKS[name].init(jax.random.key(3), *inputs)["params"]
  plain, ours = compiled(init)(), compiled(lambda: joined(init))()
  assert jax.tree.structure(plain) == jax.tree.structure(ours)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-7), plain, ours)


def test_equal_shapes_are_drawn_once():
  model = nn.Sequential([nn.Dense(5) for _ in range(20)])
  init = lambda: model.init(jax.random.key(0), jnp.zeros((1, 5)))
  loops = [compiled(f).as_text().count(" while(") for f in (init, lambda: joined(init))]
  assert loops == [40, 2], "of threefry: a key and an array each"


def test_keys_that_follow_from_keys_and_other_laws():
  """Draws of one kind of which one needs the other, bounds that differ, and what is no draw."""

  def function():
    key = jax.random.key(0)
    first, second = jax.random.fold_in(key, 1), jax.random.fold_in(jax.random.fold_in(key, 1), 1)
    low = jax.random.uniform(first, (3,), minval=-2.0, maxval=5.0)
    draws = [jax.random.uniform(second, (3,)), jax.random.normal(first, (3,)) + low]
    return {"draws": draws, "int": jax.random.randint(second, (3,), 0, 9), "none": jnp.arange(3)}

  plain, ours = compiled(function)(), compiled(lambda: joined(function))()
  jax.tree.map(np.testing.assert_array_equal, plain, ours)
