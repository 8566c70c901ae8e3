"""The noise-conditional classifiers: sizes, shapes, and the gradient that guides a sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.classifier import FourierEmbedding, Model, WideBlock
from models.layers import adm

TINY = {
  "wide_resnet": {"depth": 10, "widen": 1},
  "positional": {"depth": 10, "widen": 1, "embedding": "positional"},
  "adm_encoder": {
    "architecture": "adm_encoder",
    "nf": 8,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (4,),
    "num_head_channels": 4,
    "dropout": 0.5,
  },
  "mlp": {"architecture": "mlp", "hidden": (8, 8)},
}
# quick to compile, slow to run
QUICK = {"xla_backend_optimization_level": "0"}
IMAGENET = {"architecture": "adm_encoder", "num_classes": 1000}
X = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
NOISE = jnp.array([0.1, -2.0, 3.0])


def parameters(model, shape):
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]))[
    "params"
  ]


@functools.cache
def network(kind, **options):
  """(random parameters, the compiled network)."""
  model, rng = Model(num_classes=4, **TINY[kind] | options), np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
  params = jax.tree.map(draw, parameters(model, X.shape))
  apply = functools.partial(model.apply, {"params": params})
  return params, jax.jit(apply, static_argnums=2, compiler_options=QUICK)


@pytest.mark.parametrize(
  "size, options, count",
  [
    (32, {}, 38_913_242),
    (32, {"embedding": "positional"}, 38_913_242 - 128),
    (64, IMAGENET, 65_438_568),
    (256, IMAGENET | {"ch_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2}, 54_096_360),
  ],
)
def test_number_of_parameters(size, options, count):
  leaves = jax.tree.leaves(parameters(Model(**options), (1, size, size, 3)))
  assert sum(leaf.size for leaf in leaves) == count


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (2, 12, 20, 3)])
def test_logits_of_any_image(kind, shape):
  model = Model(num_classes=4, **TINY[kind])
  out, _ = jax.eval_shape(
    model.init_with_output, jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0])
  )
  assert out.shape == (shape[0], 4)
  assert out.dtype == jnp.float32


def test_logits_of_vectors_and_sequences():
  model = Model(num_classes=4, **TINY["mlp"])
  for shape in ((3, 2), (3, 16, 1)):
    init = functools.partial(model.init_with_output, jax.random.key(0))
    assert jax.eval_shape(init, jnp.zeros(shape), NOISE)[0].shape == (3, 4)
  with pytest.raises(ValueError, match=r"'wide_resnet' is for images .* take 'mlp'"):
    parameters(Model(), (3, 2))


@pytest.mark.parametrize("kind", ["wide_resnet", "adm_encoder", "mlp"])
def test_the_gradient_of_a_class_reaches_every_pixel(kind):
  variables = {"params": network(kind)[0]}
  logits = functools.partial(Model(num_classes=4, **TINY[kind]).apply, variables)
  log_prob = lambda x: jax.nn.log_softmax(logits(x, NOISE))[:, 2].sum()
  gradient = jax.jit(jax.grad(log_prob), compiler_options=QUICK)(X)
  assert np.isfinite(gradient).all()
  assert (gradient != 0).all()


@pytest.mark.parametrize("kind", TINY)
def test_the_classifier_is_told_the_noise(kind):
  _, classify = network(kind)
  changed = np.abs(classify(X, NOISE) - classify(X, NOISE[::-1])).max(1) > 1e-3
  assert changed.tolist() == [True, False, True]


def test_a_wide_resnet_is_blind_to_scale_and_brightness():
  _, classify = network("wide_resnet")
  np.testing.assert_allclose(classify(X, NOISE), classify(3 * X + 1, NOISE), rtol=1e-3, atol=1e-3)


def test_a_flat_image_has_finite_logits():
  _, classify = network("wide_resnet")
  assert np.isfinite(classify(jnp.ones_like(X), NOISE)).all()


def test_the_frequencies_are_not_trained():
  embedding = FourierEmbedding()
  params = {"frequencies": jnp.linspace(-30, 30, 128)}
  gradient = jax.grad(lambda p: embedding.apply({"params": p}, NOISE)[:, 3].sum())(params)
  assert not gradient["frequencies"].any()


def test_the_shortcut_of_a_wide_block_averages_and_pads():
  """Without convolutions a block is its shortcut."""
  block, told = WideBlock(32, 2), jnp.zeros((3, 5))
  x = jnp.broadcast_to(X, (3, 8, 8, 16))
  params = jax.eval_shape(block.init, jax.random.key(0), x, told)["params"]
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
  out = jax.jit(block.apply)({"params": zeros}, x, told)
  np.testing.assert_allclose(out[..., :16], x.reshape(3, 4, 2, 4, 2, 16).mean((2, 4)), atol=1e-6)
  assert not out[..., 16:].any()


def test_attention_pooling_sees_order_through_the_positions_only():
  pool = adm.AttentionPool(2, 4)
  x = jax.random.normal(jax.random.key(2), (3, 8, 8, 4))
  params = jax.jit(pool.init)(jax.random.key(0), x)["params"]
  apply = jax.jit(pool.apply)
  flipped = lambda p: np.abs(apply({"params": p}, x) - apply({"params": p}, x[:, ::-1]))
  assert flipped(params).max() > 1e-4
  assert flipped(params | {"positions": jnp.zeros((1, 65, 4))}).max() < 1e-5


def test_dropout_acts_only_while_training():
  _, classify = network("adm_encoder")
  rngs = {"dropout": jax.random.key(0)}
  trained = classify(X, NOISE, True, rngs=rngs)
  assert (np.abs(trained - classify(X, NOISE)).max(1) > 1e-3).all()


@pytest.mark.exhaustive
def test_bfloat16_is_for_the_computation_only():
  params, classify = network("adm_encoder", dtype="bfloat16")
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
  out, exact = classify(X, NOISE), network("adm_encoder")[1](X, NOISE)
  assert out.dtype == jnp.float32
  assert 0 < np.linalg.norm(out - exact) / np.linalg.norm(exact) < 0.1


@pytest.mark.parametrize(
  "options, size, message",
  [
    ({"architecture": "resnet"}, 8, "'resnet'; legal: wide_resnet, adm_encoder"),
    ({"embedding": "sine"}, 8, "'sine'; legal: fourier, positional"),
    ({"depth": 12}, 8, "depth 12 is not 6 n \\+ 4"),
    ({}, 10, "multiple of 4; nearest to 10: 8 or 12"),
    (TINY["adm_encoder"], 9, "multiple of 2; nearest to 9: 8 or 10"),
  ],
)
def test_options_that_cannot_be(options, size, message):
  with pytest.raises(ValueError, match=message):
    parameters(Model(**options), (1, size, size, 1))
