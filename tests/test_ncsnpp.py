"""NCSN++ and DDPM++: published sizes, filters against their definition, every combination of
options.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import fir, unet
from models.ncsnpp import OPTIONS, Model

DDPMPP = {"fir": False, "progressive_input": "none", "embedding_type": "positional"}
POSITIONAL, DEEP = {"embedding_type": "positional"}, {"num_res_blocks": 8}
SKIPS = {"progressive": "output_skip", "progressive_input": "input_skip"}
AT_256 = SKIPS | {"num_res_blocks": 2, "ch_mult": (1, 1, 2, 2, 2, 2, 2)}
AT_1024 = SKIPS | {"nf": 16, "num_res_blocks": 1, "ch_mult": (1, 2, 4, 8, 16, 32, 32, 32)}
TINY = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
X = jnp.linspace(0, 1, 2 * 64 * 3).reshape(2, 8, 8, 3)
TIME = jnp.array([-1.0, 0.7])


def parameters(model, shape=X.shape):
  args = jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0])
  return jax.eval_shape(model.init, *args)["params"]


def random_parameters(model):
  """Random ones: the initial ones give zero."""
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
  return jax.tree.map(draw, parameters(model))


# compiling takes most of the time here
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@functools.cache
def network(**options):
  """(params, apply) of a tiny network, compiled."""
  model = Model(**(TINY | options))
  return random_parameters(model), quick_jit(model.apply, static_argnums=4)


def output(x=X, c_noise=TIME, labels=None, **options):
  params, apply = network(**options)
  return apply({"params": params}, x, c_noise, labels)


@pytest.mark.parametrize(
  "size, options, count",
  [
    (32, DDPMPP, 61_804_419),
    (32, DDPMPP | DEEP, 106_632_579),
    (32, {}, 62_758_915),
    (32, POSITIONAL, 62_693_251),
    (32, DEEP, 107_587_075),
    (32, POSITIONAL | DEEP, 107_521_411),
    (256, AT_256, 65_574_549),
    (1024, AT_1024, 105_785_896),
  ],
)
def test_number_of_parameters(size, options, count):
  leaves = jax.tree.leaves(parameters(Model(**options), (1, size, size, 3)))
  assert sum(leaf.size for leaf in leaves) == count


def upfirdn(x, taps, up, down, pad):
  """Definition, on [h, w]: zeros between, zeros around, convolution in two dimensions, thinning."""
  stuffed = np.zeros([n * up for n in x.shape])
  stuffed[::up, ::up] = x
  padded, k = np.pad(stuffed, pad), len(taps)
  kernel = np.outer(taps, taps)[::-1, ::-1]
  rows, columns = (n - k + 1 for n in padded.shape)
  full = [
    [(padded[i : i + k, j : j + k] * kernel).sum() for j in range(columns)] for i in range(rows)
  ]
  return np.array(full)[::down, ::down]


@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 1), (1, 2, 1), (1, 2, 3, 4, 7)])
@pytest.mark.parametrize(
  "up, down, pad", [(2, 1, (2, 1)), (1, 2, (1, 1)), (1, 1, (2, 2)), (3, 2, (4, 3))]
)
def test_filter_is_its_definition(taps, up, down, pad):
  x = np.random.default_rng(0).normal(size=(6, 8))
  ours = fir.upfirdn(jnp.asarray(x)[None, :, :, None], np.array(taps), up=up, down=down, pad=pad)
  np.testing.assert_allclose(
    ours[0, :, :, 0], upfirdn(x, taps, up, down, pad), rtol=1e-5, atol=1e-4
  )


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3, 3, 1), (1, 2, 1)])
def test_resampling_keeps_constants_and_adjoint(kernel):
  """Inside, away from the zeros outside, a constant stays; down is up transposed over 4."""
  constant = jnp.ones((1, 8, 8, 1))
  inside = lambda x: x[:, 2:-2, 2:-2]
  np.testing.assert_allclose(inside(fir.upsample(constant, kernel)), 1, rtol=1e-6)
  np.testing.assert_allclose(fir.downsample(constant, kernel)[:, 1:-1, 1:-1], 1, rtol=1e-6)
  small, large = (jax.random.normal(jax.random.key(n), (1, n, n, 1)) for n in (4, 8))
  if len(kernel) % 2 == 0:  # an odd filter has no centre between two pixels
    up, down = fir.upsample(small, kernel), fir.downsample(large, kernel)
    np.testing.assert_allclose((up * large).sum(), 4 * (small * down).sum(), rtol=1e-4)


def test_without_filter_it_is_nearest_neighbour_and_mean():
  nearest = X.repeat(2, axis=1).repeat(2, axis=2)
  np.testing.assert_array_equal(fir.upsample(X), nearest)
  np.testing.assert_allclose(fir.downsample(nearest), X, rtol=1e-6)


def resampler(kind, kernel):
  module = kind(features=4, fir_kernel=kernel)
  params = module.init(jax.random.key(0), X)["params"]
  return module.apply({"params": params}, X), params["Conv_0"]["kernel"]


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3, 3, 1)])
def test_up_convolution_filters_after_a_transposed_convolution(kernel):
  """StyleGAN2's fused form: zeros between, convolution, then the filter, borders included."""
  ours, weight = resampler(unet.Upsample, kernel)
  layout = ("NHWC", "HWIO", "NHWC")
  spread = jax.lax.conv_general_dilated(
    X, weight, (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2), dimension_numbers=layout
  )
  excess = len(kernel) - 4
  pad = ((excess + 1) // 2 + 1, excess // 2 + 1)
  fused = fir.upfirdn(spread, 2 * np.array(kernel) / sum(kernel), pad=pad)
  np.testing.assert_allclose(ours, fused, atol=1e-5)


def test_down_convolution_filters_before_or_after_convolving():
  ours, weight = resampler(unet.Downsample, (1, 3, 3, 1))
  layout = ("NHWC", "HWIO", "NHWC")
  convolved = jax.lax.conv_general_dilated(X, weight, (1, 1), "SAME", dimension_numbers=layout)
  after = fir.downsample(convolved, (1, 3, 3, 1))
  assert ours.shape == after.shape == (2, 4, 4, 4)
  np.testing.assert_allclose(ours[:, 1:-1, 1:-1], after[:, 1:-1, 1:-1], atol=1e-5)


CHOICES = [  # how the resampled input joins matters to "input_skip" alone
  choice
  for choice in itertools.product(*OPTIONS.values())
  if "input_skip" in choice or "sum" in choice
]


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
def test_every_combination_has_the_shape_of_its_input(choice):
  model = Model(**TINY, **dict(zip(OPTIONS, choice)))
  out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), X, TIME)
  assert (out.shape, out.dtype) == (X.shape, jnp.float32)


COMBINATIONS = itertools.product(OPTIONS["progressive"], OPTIONS["progressive_input"])


@pytest.mark.parametrize("number, choice", [*enumerate(COMBINATIONS)])
def test_combinations_run(number, choice):
  names = ("progressive_combine", "resblock_type", "embedding_type")
  options = {name: OPTIONS[name][number // 2**i % 2] for i, name in enumerate(names)}
  out = output(progressive=choice[0], progressive_input=choice[1], **options)
  assert np.isfinite(out).all()
  assert np.std(out) > 0.01


@pytest.mark.parametrize("name", OPTIONS)
def test_an_unknown_option_lists_the_legal_ones(name):
  with pytest.raises(ValueError, match=f"{name} = 'no' is not one of {OPTIONS[name][0]}"):
    parameters(Model(**TINY, **{name: "no"}))


def test_frequencies_have_no_gradient():
  model = Model(**(TINY | {"ch_mult": (1,), "attn_resolutions": ()}))
  loss = lambda p: (model.apply({"params": p}, X[:, :4, :4], TIME) ** 2).sum()
  gradients = quick_jit(jax.grad(loss))(random_parameters(model))
  frequencies = gradients["FourierEmbedding_0"].pop("frequencies")
  np.testing.assert_array_equal(frequencies, 0)
  assert frequencies.shape == (8,)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def differ(a, b):
  """Which examples differ by more than rounding."""
  return (np.abs(a - b) > 1e-3).any((1, 2, 3)).tolist()


def test_the_network_is_told_noise_and_class():
  labels = jnp.array([0, 1])
  plain = output(labels=labels, num_classes=2)
  assert differ(plain, output(c_noise=TIME.at[1].add(0.1), labels=labels, num_classes=2)) == [
    False,
    True,
  ]
  assert differ(plain, output(labels=jnp.array([1, 1]), num_classes=2)) == [True, False]
  unlabelled = output(num_classes=2)
  np.testing.assert_array_equal(unlabelled, output(labels=jnp.array([2, 2]), num_classes=2))
  assert differ(plain, unlabelled) == [True, True]


def test_a_network_blind_to_noise_gives_the_same_at_every_level():
  np.testing.assert_array_equal(
    output(conditional=False), output(c_noise=TIME[::-1], conditional=False)
  )


def test_data_that_are_not_centered_are_mapped():
  np.testing.assert_allclose(output(centered=False), output(2 * X - 1), atol=1e-5)


def test_dropout_acts_only_while_training():
  params, apply = network(dropout=0.5)
  train = lambda n: apply(
    {"params": params}, X, TIME, None, True, rngs={"dropout": jax.random.key(n)}
  )
  assert differ(train(0), train(1)) == [True, True]
  assert differ(output(dropout=0.5), output(dropout=0.1)) == [False, False]


@pytest.mark.exhaustive
def test_low_precision_computes_close_and_stays_float32_outside():
  low, exact = output(dtype="bfloat16"), output()
  assert low.dtype == jnp.float32
  assert all(
    p.dtype == jnp.float32 for p in jax.tree.leaves(parameters(Model(**TINY, dtype="bfloat16")))
  )
  error = np.abs(low - exact).max() / np.abs(exact).max()
  assert 1e-4 < error < 0.1


@pytest.mark.exhaustive
@pytest.mark.parametrize("resblock_type", OPTIONS["resblock_type"])
def test_recomputed_activations_change_nothing(resblock_type):
  """Same names, same outputs, same gradients, dropout included."""
  options = {"ch_mult": (1,), "attn_resolutions": (), "dropout": 0.5}
  model = Model(**(TINY | options), resblock_type=resblock_type)
  params, rngs = random_parameters(model), {"dropout": jax.random.key(0)}

  def value_and_gradient(remat):
    apply = model.clone(remat=remat).apply
    square = lambda p: (apply({"params": p}, X[:, :4, :4], TIME, None, True, rngs=rngs) ** 2).mean()
    step = jax.value_and_grad(square)
    assert ("remat" in str(jax.make_jaxpr(step)(params))) == remat
    return quick_jit(step)(params)

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, value_and_gradient(True), value_and_gradient(False))
