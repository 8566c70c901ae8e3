"""The conversion table; score, noise and data of laws with closed forms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PAPER, Bits, Mixture, diagonal, empirical, rotated
from flax import linen as nn

import parameterization
from errors import ConfigError
from parameterization import C_NOISE, OUTPUTS, make_noise_fn
from sde_lib import SDE, make_sde, marginal, perturb

LAWS = {
  "gaussian": diagonal([1.0, -2.0, 0.5], [0.3, 1.0, 2.0]),
  "full covariance": rotated([1.0, -2.0, 0.5], [0.1, 1.0, 2.0]),
  "low rank": rotated([1.0, -2.0, 0.5], [0.0, 1.0, 0.0]),
  "mixture": Mixture(np.array([[0.8, 0.2]]), np.array([[5.0, 5, 0], [-5, -5, 1]]), 1.0),
  "empirical": empirical(np.random.default_rng(0).normal(size=(5, 3))),
  "bits": Bits(np.array([[0.1, 0.5, 0.7]])),
}
laws = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
names = pytest.mark.parametrize("name", PAPER)

# What a perfect network of each output predicts at (alpha, sigma, data, noise)
TRUTH = {
  "noise": lambda alpha, sigma, data, noise: noise,
  "score": lambda alpha, sigma, data, noise: -noise / sigma,
  "scaled_score": lambda alpha, sigma, data, noise: -noise,
  "data": lambda alpha, sigma, data, noise: data,
  "v": lambda alpha, sigma, data, noise: alpha * noise - sigma * data,
  "velocity": lambda alpha, sigma, data, noise: noise - data,
  "edm": lambda alpha, sigma, data, noise: _karras_f(sigma / alpha, data, noise),
}


def _karras_f(r, data, noise, sigma_data=0.7):
  """The training target of F, Karras et al. 2022, eq. 7-8 and table 1."""
  c_skip = sigma_data**2 / (r**2 + sigma_data**2)
  c_out = r * sigma_data / np.sqrt(r**2 + sigma_data**2)
  return (data - c_skip * (data + r * noise)) / c_out


class Answer(nn.Module):
  """A network that returns `answer(x, c_noise, labels, train)`."""

  answer: Callable

  @nn.compact
  def __call__(self, x, c_noise, labels, train):
    return self.answer(x, c_noise, labels, train)


def noise_of(sde, answer, x, t, output="noise", c_noise="sigma", labels=None, **options):
  noise_fn = make_noise_fn(sde, Answer(answer), {}, output=output, c_noise=c_noise, **options)
  return noise_fn(x, t, labels)


def column(v):
  return np.asarray(v, np.float64)[:, None]


def truth_and_guess(sde, paper, output):
  """The true noise in float64 and that of a perfect network, at eight times."""
  data, noise = np.random.default_rng(0).normal(size=(2, 8, 5))
  t = jnp.linspace(0.01, 0.99, 8)
  alpha, sigma = (column(c(np.asarray(t, np.float64))) for c in (paper.alpha, paper.sigma))
  answer = jnp.asarray(TRUTH[output](alpha, sigma, data, noise))
  x = jnp.asarray(alpha * data + sigma * noise)
  return noise, noise_of(sde, lambda *_: answer, x, t, output, sigma_data=0.7)


@names
@pytest.mark.parametrize("output", OUTPUTS)
def test_perfect_network_gives_the_noise(x64, output, name):
  noise, guess = truth_and_guess(make_sde(name), PAPER[name], output)
  np.testing.assert_allclose(guess, noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("output", OUTPUTS)
def test_perfect_network_gives_the_noise_in_float32(output):
  noise, guess = truth_and_guess(make_sde("vp"), PAPER["vp"], output)
  assert guess.dtype == jnp.float32
  np.testing.assert_allclose(guess, noise, rtol=0, atol=2e-5 if output == "data" else 1e-6)


def test_velocity_is_that_of_the_rectified_path(x64):
  """On x_t = (1 - t) data + t noise the velocity noise - data is dx/dt."""
  sde = SDE(lambda t: jnp.log1p(-t), jnp.log, 1e-3, 1 - 1e-3, 1.0)
  data, noise = (jnp.asarray(z) for z in np.random.default_rng(0).normal(size=(2, 4, 3)))
  t = jnp.array([0.1, 0.4, 0.6, 0.9])
  x, velocity = jax.jvp(lambda t: perturb(sde, data, noise, t), (t,), (jnp.ones(4),))
  guess = noise_of(sde, lambda *_: velocity, x, t, "velocity")
  np.testing.assert_allclose(guess, noise, rtol=0, atol=1e-13)


def test_edm_network_sees_unit_variance_and_log_r_over_four(x64):
  sde, t = make_sde("vp"), jnp.linspace(0.01, 0.99, 8)
  r = column(np.exp(-0.5 * PAPER["vp"].log_snr(np.asarray(t))))
  y = np.random.default_rng(0).normal(size=(8, 5))
  x = jnp.asarray(column(PAPER["vp"].alpha(np.asarray(t))) * y)
  seen = []
  noise_of(
    sde, lambda *a: seen.extend(a) or a[0], x, t, output="edm", c_noise="log_sigma4", sigma_data=0.7
  )
  np.testing.assert_allclose(seen[0], y / np.sqrt(r**2 + 0.49), rtol=1e-12)
  np.testing.assert_allclose(seen[1], np.log(r[:, 0]) / 4, rtol=1e-12)


@pytest.mark.parametrize("output", ["noise", "score", "scaled_score", "v", "edm", "velocity"])
def test_float32_score_keeps_its_digits_at_small_sigma(output):
  """At sigma = 1e-3; a hub of predicted data loses a factor alpha / sigma there."""
  sde, paper, t = make_sde("vp"), PAPER["vp"], jnp.full(64, 1e-5)
  rng = np.random.default_rng(0)
  data, noise = (
    rng.uniform(-1, 1, (64, 1)),
    rng.choice([-1, 1], (64, 1)) * rng.uniform(1, 2, (64, 1)),
  )
  alpha, sigma = (column(c(np.asarray(t, np.float64))) for c in (paper.alpha, paper.sigma))
  answer = jnp.asarray(TRUTH[output](alpha, sigma, data, noise))
  x = jnp.asarray(alpha * data + sigma * noise)
  guess = noise_of(sde, lambda *_: answer, x, t, output, sigma_data=0.7)
  score = parameterization.score_from_noise(sde, guess, t)
  np.testing.assert_allclose(score, -noise / sigma, rtol=1e-6)


@pytest.mark.parametrize("t", [0.3, [0.1, 0.5, 0.9]])
@pytest.mark.parametrize("c_noise", C_NOISE)
def test_network_is_told_the_time(x64, c_noise, t):
  paper, trained = PAPER["vp"], jnp.linspace(0.0, 1.0, 11)
  sde = SDE(make_sde("vp").log_alpha, make_sde("vp").log_sigma, 1e-5, 1.0, 1.0, trained)
  times = np.broadcast_to(t, 3)
  expected = {
    "t999": 999 * times,
    "index": np.round(10 * times),
    "log_sigma": np.log(paper.sigma(times)),
    "log_sigma4": np.log(paper.sigma(times) / paper.alpha(times)) / 4,
    "log_snr": paper.log_snr(times),
    "sigma": paper.sigma(times),
  }
  expected["index_from_noise"] = len(sde.times) - 1 - expected["index"]
  told = noise_of(
    sde, lambda x, c, *_: x + c[:, None], jnp.zeros((3, 1)), jnp.asarray(t), c_noise=c_noise
  )
  np.testing.assert_allclose(told[:, 0], expected[c_noise], rtol=1e-12)


def test_network_with_twice_the_channels_predicts_the_variance(x64):
  sde, x = make_sde("vp"), jnp.ones((2, 3))
  v = jnp.broadcast_to(jnp.array([-1, 0, 1]), x.shape)
  double = lambda x, *_: jnp.concatenate([2 * x, v], axis=1)
  for answer, expected in ((double, [0, 0.5, 1]), (lambda x, *_: 2 * x, None)):
    noise_fn = make_noise_fn(sde, Answer(answer), {}, output="v", c_noise="t999")
    noise, v = noise_fn.with_variance(x, 0.4)
    np.testing.assert_array_equal(noise_fn(x, 0.4), noise)
    np.testing.assert_allclose(noise, noise_of(sde, lambda x, *_: 2 * x, x, 0.4, "v"))
    assert v is None if expected is None else (v == jnp.array([expected] * 2)).all()


def test_index_is_the_nearest_training_time():
  sde = SDE(jnp.zeros_like, jnp.zeros_like, 0.0, 1.0, 1.0, jnp.array([0.0, 0.1, 1.0]))
  told = C_NOISE["index"](sde, jnp.array([0.04, 0.06, 0.5, 0.56]))
  np.testing.assert_array_equal(told, [0.0, 1.0, 1.0, 2.0])


def test_labels_and_train_reach_the_network():
  x, seen = jnp.zeros((2, 1)), []
  record = lambda x, c, labels, train: seen.append((labels, train)) or x
  noise_of(make_sde("vp"), record, x, 0.5, labels=jnp.array([3, 4]), train=True)
  noise_of(make_sde("vp"), record, x, 0.5)
  np.testing.assert_array_equal(seen[0][0], [3, 4])
  assert [train for _, train in seen] == [True, False] and seen[1][0] is None


def test_params_and_rngs_reach_the_network():
  model = nn.Sequential([lambda x, *_: x, nn.Dense(1), nn.Dropout(0.5, deterministic=False)])
  x = jnp.ones((64, 1))
  params = {"layers_1": {"kernel": jnp.full((1, 1), 3.0), "bias": jnp.zeros(1)}}
  noise_fn = make_noise_fn(
    make_sde("vp"),
    model,
    params,
    output="noise",
    c_noise="sigma",
    rngs={"dropout": jax.random.key(0)},
  )
  assert set(np.unique(noise_fn(x, 0.5))) == {0.0, 6.0}


@pytest.mark.parametrize(
  "field, options",
  [("output", {"output": "epsilon"}), ("c_noise", {"c_noise": "time"})],
)
def test_unknown_name_lists_the_legal_ones(field, options):
  with pytest.raises(ConfigError, match=f"parameterization.{field} = ") as error:
    noise_of(make_sde("vp"), lambda x, *_: x, jnp.zeros((1, 1)), 0.5, **options)
  legal = {"output": OUTPUTS, "c_noise": C_NOISE}[field]
  assert all(repr(name) in str(error.value) for name in legal)


@laws
def test_score_is_the_gradient_of_log_prob(x64, law):
  x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 3)))
  alpha, sigma = jnp.linspace(1.0, 0.1, 7), jnp.linspace(0.3, 2.0, 7)
  gradient = jax.jit(jax.grad(lambda x: law.log_prob(x, alpha, sigma).sum()))(x)
  score = jax.jit(law.score)(x, alpha, sigma)
  np.testing.assert_allclose(score, gradient, rtol=1e-11, atol=1e-12)


@laws
def test_score_noise_and_data_agree(x64, law):
  """score = -noise / sigma and E[x_0 | x_t] = (x_t - sigma noise) / alpha."""
  sde = make_sde("sub_vp")
  x, t = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3))), jnp.linspace(0.2, 0.9, 4)

  @jax.jit
  def ours_and_exact(x, t):
    noise = law.noise_fn(sde)(x, t)
    score = parameterization.make_score_fn(sde, law.noise_fn(sde))(x, t)
    data = parameterization.data_from_noise(sde, x, noise, t)
    return (score, data), (law.score_fn(sde)(x, t), law.denoise(x, *marginal(sde, t)))

  for ours, exact in zip(*ours_and_exact(x, t)):
    np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-12)
