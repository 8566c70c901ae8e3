"""What the rows of the project's catalogue of methods ask for and no other test asserts: closed
forms on Gaussians, transfer matrices for the mixture of NCSN's toy, tables of DDPM.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PAPER, Mixture, diagonal, rotated
from flax import linen as nn
from scipy.integrate import solve_ivp
from scipy.stats import norm
from test_parameterization import TRUTH, noise_of

import losses
import sampling
import sde_lib
from checkpoint import Checkpoints
from dynamics import SOLVERS
from evaluation.two_sample import energy_test
from evaluation.validation import validate
from likelihood import DIVERGENCES, log_likelihood
from parameterization import (
  OUTPUTS,
  data_from_noise,
  make_noise_fn,
  make_score_fn,
  score_from_noise,
)
from sampling import SAMPLERS, State, sample, sample_ode, sample_sde, time_grid
from sde_lib import SDES, coefficients, log_snr, make_sde, marginal, posterior, time_of_log_snr
from training import TrainState

TOY = Mixture(np.array([[0.8, 0.2]]), np.array([[5.0, 5.0], [-5.0, -5.0]]), 1.0)
names = pytest.mark.parametrize("name", PAPER)
# for what compiles longer than it runs
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def slope(sizes, errors):
  """Of the line through (log size, log error)."""
  return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def unit_noise(example):
  """A stand-in for `sampling.normal`: 1 for one example of the batch and 0 for the others."""
  return lambda key, shape: jnp.where(jnp.arange(shape[0]) == example, 1.0, 0.0)[:, None]


# Langevin dynamics


@pytest.fixture
def response(x64, monkeypatch):
  """Example 0 of `run(b)` starts from 1, example k has unit noise at the k-th draw alone.

  `draws` is how many draws one step of `sample` makes, 0 for `langevin` itself.
  """

  def read(run, b, draws=0):
    index = lambda key: jax.random.key_data(key)[..., 1].astype(int)
    number = lambda i: jax.random.wrap_key_data(jnp.stack([0 * i, i]).astype(jnp.uint32))

    def fold_in(key, i):
      outer = (index(key) - 1) * draws if draws and not key.ndim else 0
      return number(outer + jnp.asarray(i) + (0 if draws and key.ndim else 1))

    with monkeypatch.context() as patch:
      patch.setattr(sampling, "fold_in", fold_in)
      patch.setattr(sampling, "normal", lambda key, shape: unit_noise(index(key))(key, shape))
      return np.asarray(run(jnp.zeros((b, 1)).at[0].set(1.0)))[:, 0]

  return read


def stationary(a, c):
  """Variance that the recursion x <- a x + c z keeps."""
  return c**2 / (1 - a**2)


def test_langevin_is_the_linear_chain_of_its_score(response):
  """Row 13: on N(0, v) each step is x <- (1 - eps / 2v) x + sqrt(eps) z, to v / (1 - eps / 4v)."""
  v, eps, n = 1.5, 0.1, 30
  run = lambda x: sampling.langevin(
    jax.random.key(0), lambda x: -x / v, x, step_size=eps, num_steps=n
  )
  ours, a = response(run, n + 1), 1 - eps / (2 * v)
  np.testing.assert_allclose(ours[0], a**n, rtol=1e-12)
  np.testing.assert_allclose(ours[1:], np.sqrt(eps) * a ** np.arange(n - 1, -1, -1), rtol=1e-12)
  np.testing.assert_allclose(stationary(a, ours[-1]), v / (1 - eps / (4 * v)), rtol=1e-12)


def test_langevin_is_exact_in_the_limit_of_small_steps_and_long_time(x64, monkeypatch):
  """Row 14: for v = 1 the variance is off by eps / 4 + O(eps^2), and time forgets the start."""
  monkeypatch.setattr(sampling, "normal", lambda key, shape: jnp.array([[0.0], [1.0]]))
  sizes, x = np.geomspace(1e-3, 1e-1, 5), jnp.array([[1.0], [0.0]])
  chains = [sampling.langevin_step(jax.random.key(0), -x, x, eps)[0][:, 0] for eps in sizes]
  bias = np.array([float(stationary(*chain)) - 1 for chain in chains])
  assert slope(sizes, bias) == pytest.approx(1, abs=0.01)
  assert slope(sizes, bias - sizes / 4) == pytest.approx(2, abs=0.01)
  assert bias[0] / sizes[0] == pytest.approx(1 / 4, rel=1e-3)
  a, c = map(float, chains[-1])
  gaps = [a ** (2 * n) * (9 - stationary(a, c)) for n in (100, 200)]  # from a start of variance 9
  assert gaps[0] < 1e-3 and gaps[1] == pytest.approx(gaps[0] ** 2 / (9 - stationary(a, c)))


DIAGONAL = np.ones((1, 2)) / np.sqrt(2)


def transfer(step, u):
  """T[i, j]: mass that one step moves from grid point u_i to u_j, on the diagonal of the toy.

  The score's part along the diagonal depends on u = (x + y) / sqrt(2) alone, so u is a Markov
  chain. `step` [n, 2] -> (x with unit noise, its noise-free part), which give its kernel.
  """
  x, mean = (np.asarray(y) @ DIAGONAL[0] for y in step(jnp.asarray(u[:, None] * DIAGONAL))[:2])
  std = (x - mean)[0] / np.sqrt(2)  # unit noise in both coordinates is sqrt(2) along the diagonal
  density = np.exp(-0.5 * ((u[None] - mean[:, None]) / std) ** 2) / (std * np.sqrt(2 * np.pi))
  return density * (u[1] - u[0])


def uniform_start(u):
  """The mass of u for x uniform on [-8, 8]^2."""
  mass = np.maximum(8 * np.sqrt(2) - np.abs(u), 0)
  return mass / mass.sum()


def langevin_transfer(u, score=TOY.score, size=0.1):
  key = jax.random.key(0)
  return transfer(lambda x: sampling.langevin_step(key, score(x), x, size), u)


@pytest.fixture
def ones(x64, monkeypatch):
  """Every draw of noise is 1."""
  monkeypatch.setattr(sampling, "normal", lambda key, shape: jnp.ones(shape))


def test_langevin_gives_a_mode_the_area_of_its_basin(ones, monkeypatch):
  """Row 18: (5, 5) gets the area 0.5086 of x + y > -log(4) / 10, without noise and with it."""
  area = 1 - (16 - np.log(4) / 10) ** 2 / 2 / 256
  assert area == pytest.approx(0.5086, abs=5e-5)
  u = np.linspace(-18, 18, 361)
  mass, kernel = uniform_start(u), langevin_transfer(u)
  for _ in range(1000):
    mass = mass @ kernel
  assert mass.sum() == pytest.approx(1, abs=1e-9)
  assert mass[u > 0].sum() == pytest.approx(area, abs=5e-4)
  monkeypatch.setattr(sampling, "normal", lambda key, shape: jnp.zeros(shape))
  line = (jnp.arange(64) + 0.5) / 4 - 8
  x = jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)
  run = {"step_size": 0.1, "num_steps": 300}
  end = jax.jit(lambda x: sampling.langevin(jax.random.key(0), TOY.score, x, **run))(x)
  assert float((end.sum(1) > 0).mean()) == pytest.approx(area, abs=1 / 128)
  np.testing.assert_allclose(jnp.abs(end), 5.0, atol=1e-4)


def test_annealed_langevin_gives_the_modes_their_weights(ones):
  """Row 28: sigma 20 to 1 in 10 levels, 100 steps each: 0.783, within 0.02 of 0.8."""
  sde = make_sde("ncsn", sigma_max=20.0, sigma_min=1.0, num_scales=10)
  step = sampling.annealed_langevin(sde, step_lr=0.05, num_steps=1)
  u = np.linspace(-110, 110, 881)
  mass, key = uniform_start(u), jax.random.key(0)
  once = jax.jit(lambda x, s: step(key, TOY.noise_fn(sde), State(x, x), s, s)[:2])
  for level in np.asarray(time_grid(sde, 9, "trained")):
    kernel = transfer(lambda x, s=level: once(x, s), u)
    for _ in range(100):
      mass = mass @ kernel
  assert mass.sum() == pytest.approx(1, abs=1e-4)
  weight = mass[u > 0].sum()
  assert weight == pytest.approx(0.783, abs=0.003) and abs(weight - 0.8) < 0.02


def test_modes_apart_are_left_at_a_rate_exponential_in_the_barrier(ones):
  """Row 19: log rate falls by the barrier; at NCSN's separation no chain leaves in 1000 steps."""
  u, rates, barriers = np.linspace(-9, 9, 361), [], []
  for distance in (2.0, 2.5, 3.0, 3.5, 4.0):
    centre = distance * DIAGONAL
    law = Mixture(np.full((1, 2), 0.5), np.concatenate([centre, -centre]), 1.0)
    kernel, odd = langevin_transfer(u, law.score), np.sign(u)
    for _ in range(200):
      before, odd = odd, kernel @ odd  # the slowest odd function of u
    rates.append(-np.log(odd[240] / before[240]) / 2 / 0.1)
    saddle = law.log_prob(jnp.zeros((1, 2)))
    barriers.append(float((law.log_prob(jnp.asarray(centre)) - saddle)[0]))
    # Kramers: the wells' and the saddle's curvatures are 1 and distance^2 - 1
    kramers = np.sqrt(distance**2 - 1) / (4 * np.pi) * np.exp(-barriers[-1])
    assert rates[-1] == pytest.approx(kramers, rel=0.35)
  fit = np.polyfit(barriers, np.log(rates), 1)
  assert fit[0] == pytest.approx(-0.9, abs=0.1)
  assert np.ptp(np.log(rates) - np.polyval(fit, barriers)) < 0.3
  inside = np.linspace(0, 14, 281)  # absorbed at the midpoint
  stay = np.exp(-0.5 * (inside - np.sqrt(50)) ** 2)
  stay, kernel = stay / stay.sum(), langevin_transfer(inside)
  for _ in range(1000):
    stay = stay @ kernel
  assert stay.sum() == pytest.approx(1, abs=1e-6)


def test_langevin_chains_switch_as_often_as_their_kernel_says(x64):
  """Row 19: 4,000 chains from one of two modes at a distance of 5, 100 steps, 4 standard errors."""
  centre, n = 2.5 * DIAGONAL, 4000
  law = Mixture(np.full((1, 2), 0.5), np.concatenate([centre, -centre]), 1.0)
  x = jnp.asarray(np.repeat(centre, n, axis=0))
  run = {"step_size": 0.1, "num_steps": 100}
  end = jax.jit(lambda x: sampling.langevin(jax.random.key(1), law.score, x, **run))(x)
  u = np.linspace(-9, 9, 361)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampling, "normal", lambda key, shape: jnp.ones(shape))
    kernel = langevin_transfer(u, law.score)
  mass = np.where(np.arange(361) == 230, 1.0, 0.0)  # u = 2.5
  for _ in range(100):
    mass = mass @ kernel
  switched = mass[u < 0].sum() + mass[180] / 2
  assert 0.05 < switched < 0.2
  error = np.sqrt(switched * (1 - switched) / n)
  assert abs(float((end.sum(1) < 0).mean()) - switched) < 4 * error


def test_annealed_langevin_is_the_linear_chain_of_its_levels(response):
  """Row 27: a_i = eps sigma_i^2 / sigma_L^2, each level started from the end of the one before."""
  sde, law = make_sde("ncsn", num_scales=4), diagonal([0.7], [0.3])
  step_lr, n = 2e-5, 3
  step = sampling.annealed_langevin(sde, step_lr, num_steps=n)
  times = time_grid(sde, 3, "trained")
  grid = {"step": step, "times": jnp.append(times[0], times), "denoise": None}

  def run(init):
    draw = lambda x: sample(jax.random.key(0), sde, law.noise_fn(sde), x.shape, init=x, **grid)[0]
    both = jax.jit(lambda x: (draw(x), draw(0 * x)))(init)
    return jnp.concatenate([both[0], both[1][:1]])

  # the last entry is the end without noise from 0, the others carry it as a shift
  ours = response(run, 4 * n + 1, draws=n)
  mean, variance, shift, weights = 0.4, 2.0, 0.0, []
  for sigma in np.geomspace(1, 0.01, 4):
    size = step_lr * (sigma / 0.01) ** 2
    a = 1 - size / (0.3 + sigma**2)
    for _ in range(n):
      mean, shift = a * mean + (1 - a) * 0.7, a * shift + (1 - a) * 0.7
      variance = a**2 * variance + 2 * size
      weights = [a * w for w in weights] + [np.sqrt(2 * size)]
  np.testing.assert_allclose(ours[-1], shift, rtol=1e-10)
  np.testing.assert_allclose(ours[1:-1] - ours[-1], weights, rtol=1e-9)
  start = ours[0] - ours[-1]
  np.testing.assert_allclose(start * 0.4 + ours[-1], mean, rtol=1e-10)
  total = start**2 * 2.0 + ((ours[1:-1] - ours[-1]) ** 2).sum()
  np.testing.assert_allclose(total, variance, rtol=1e-10)


class GaussianNetwork(nn.Module):
  """The noise prediction of N(mean, exp(log_variance)) under VP, from two parameters."""

  @nn.compact
  def __call__(self, x, log_sigma, labels, train):
    mean, log_variance = (
      self.param(n, nn.initializers.zeros, ()) for n in ("mean", "log_variance")
    )
    sigma = jnp.exp(log_sigma)[:, None]
    alpha = jnp.sqrt(-jnp.expm1(2 * log_sigma))[:, None]
    return sigma * (x - alpha * mean) / (alpha**2 * jnp.exp(log_variance) + sigma**2)


@pytest.mark.exhaustive
def test_one_checkpoint_serves_every_sampler(tmp_path):
  """Row 29: saved once, it draws its law by each sampler, whatever the number of steps."""
  params = {"mean": jnp.asarray(0.7), "log_variance": jnp.log(0.25)}
  with Checkpoints(tmp_path) as saved:
    saved.save(1, TrainState(jnp.asarray(1), params, (), (params,)))
  with Checkpoints(tmp_path, read_only=True) as saved:
    params = saved.restore_item(1, "ema0", jax.tree.map(jnp.zeros_like, params))
  sde, n, key = make_sde("vp", t_min=1e-3), 2000, jax.random.key(0)
  options = {"annealed_langevin": {"step_lr": 2e-5, "num_steps": 20}}

  @quick
  def draw(params):
    told = {"output": "noise", "c_noise": "log_sigma"}
    noise_fn = make_noise_fn(sde, GaussianNetwork(), params, **told)
    score_fn, law = make_score_fn(sde, noise_fn), (key, sde, noise_fn, (n, 1))
    ends = {"ode": sample_ode(key, sde, score_fn, (n, 1))[0]}
    ends["sde"] = sample_sde(key, sde, score_fn, (n, 1), num_steps=100)[0]
    for i, name in enumerate(SAMPLERS):
      step = SAMPLERS[name](sde, **options.get(name, {}))
      ends[name] = sample(*law, step=step, times=time_grid(sde, 40 + 3 * i, "log_snr"))[0]
    return ends

  for name, x in draw(params).items():
    assert float(x.mean()) == pytest.approx(0.7, abs=0.05 + 4 * 0.5 / np.sqrt(n)), name
    assert float(x.std()) == pytest.approx(0.5, rel=0.1 + 4 / np.sqrt(2 * n)), name


# DDPM's chain

BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
LEVELS = [1, 2, 9, 99, 499, 999]  # from 0; the level before each is a level too
BETA_TILDE = ((1 - np.roll(ABAR, 1)) / (1 - ABAR) * BETAS)[LEVELS]


def levels(sde):
  """(t, s) of the steps from each of LEVELS to the one before."""
  return (jnp.asarray(np.asarray(sde.times)[np.array(LEVELS) + shift]) for shift in (0, -1))


def test_posterior_of_the_chain_is_that_of_ddpm(x64):
  """Row 44: mu~ and beta~ (Ho et al. 2020, eq. 7) from the betas; at s = 0 the data."""
  sde = make_sde("ddpm")
  one, zero = (jnp.full((len(LEVELS), 1), c) for c in (1.0, 0.0))
  of_data, std = posterior(sde, zero, one, *levels(sde))
  of_x, _ = posterior(sde, one, zero, *levels(sde))
  beta, abar, before = BETAS[LEVELS], ABAR[LEVELS], np.roll(ABAR, 1)[LEVELS]
  np.testing.assert_allclose(of_data[:, 0], np.sqrt(before) * beta / (1 - abar), rtol=1e-10)
  np.testing.assert_allclose(of_x[:, 0], np.sqrt(1 - beta) * (1 - before) / (1 - abar), rtol=1e-10)
  np.testing.assert_allclose(std**2, BETA_TILDE, rtol=1e-10)
  mean, std = posterior(make_sde("vp"), 5 * one, 3 * one, jnp.full(len(LEVELS), 1e-3), 0.0)
  np.testing.assert_array_equal(mean, 3.0)
  np.testing.assert_array_equal(std, 0.0)


@pytest.fixture
def reverse_kernel(x64, monkeypatch):
  """(of x, of noise, std) of mean = of_x x + of_noise noise_hat, of `ancestral` at LEVELS."""

  def read(sde, variance):
    monkeypatch.setattr(sampling, "normal", lambda key, shape: jnp.array([[0.0], [0.0], [1.0]]))
    x, noise = jnp.array([[1.0], [0.0], [0.0]]), jnp.array([[0.0], [1.0], [0.0]])
    step = sampling.ancestral(sde, variance)
    run = lambda t, s: step(None, lambda x, t: noise, State(x, x), t, s).x[:, 0]
    return np.asarray(jax.vmap(run)(*levels(sde))).T

  return read


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_reverse_kernel_of_the_chain_is_that_of_ddpm(reverse_kernel, variance):
  """Rows 46, 47: both forms of eq. 3-15, and sigma_t^2 = beta~_t or beta_t."""
  beta, abar, before = BETAS[LEVELS], ABAR[LEVELS], np.roll(ABAR, 1)[LEVELS]
  of_x, of_noise, std = reverse_kernel(make_sde("ddpm"), variance)
  np.testing.assert_allclose(of_x, 1 / np.sqrt(1 - beta), rtol=1e-10)
  np.testing.assert_allclose(of_noise, -beta / np.sqrt((1 - abar) * (1 - beta)), rtol=1e-10)
  of_data = np.sqrt(before) * beta / (1 - abar)  # mu~(x_t, x_0 = (x_t - sigma noise) / alpha)
  other = np.sqrt(1 - beta) * (1 - before) / (1 - abar) + of_data / np.sqrt(abar)
  np.testing.assert_allclose(of_x, other, rtol=1e-10)
  np.testing.assert_allclose(of_noise, -of_data * np.sqrt((1 - abar) / abar), rtol=1e-10)
  np.testing.assert_allclose(std**2, {"posterior": BETA_TILDE, "beta": beta}[variance], rtol=1e-10)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_divergence_of_a_step_is_the_weighted_error_of_the_noise(reverse_kernel, variance):
  """Rows 45, 49: KL(q || p) = |mu~ - mu|^2 / 2 sigma^2 + C = weight |noise_hat - noise|^2 + C.

  The divergence by quadrature, exact for Gaussians; weight beta^2 / (2 sigma^2 alpha (1 - abar)).
  """
  sde, (x, data) = make_sde("ddpm"), (0.8, -0.3)
  beta, abar = BETAS[LEVELS], ABAR[LEVELS]
  noise, guess = (x - np.sqrt(abar) * data) / np.sqrt(1 - abar), 0.25
  full = lambda c: jnp.full((len(LEVELS), 1), c)
  q_mean, q_std = (np.ravel(c) for c in posterior(sde, full(x), full(data), *levels(sde)))
  of_x, of_noise, std = reverse_kernel(sde, variance)
  p_mean = of_x * x + of_noise * guess
  z, w = np.polynomial.hermite_e.hermegauss(4)
  y = q_mean[:, None] + q_std[:, None] * z
  ratio = -0.5 * z**2 + 0.5 * ((y - p_mean[:, None]) / std[:, None]) ** 2
  divergence = ratio @ w / w.sum() + np.log(std / q_std)
  r = (q_std / std) ** 2
  constant = 0.5 * (r - 1 - np.log(r))
  means = (q_mean - p_mean) ** 2 / (2 * std**2)
  np.testing.assert_allclose(divergence, means + constant, rtol=1e-9, atol=1e-13)
  weight = beta**2 / (2 * std**2 * (1 - beta) * (1 - abar))
  np.testing.assert_allclose(means, weight * (noise - guess) ** 2, rtol=1e-7)
  assert (np.abs(constant) < 1e-9).all() == (variance == "posterior")


def test_the_sum_of_the_divergences_tends_to_the_elbo_weighting(x64):
  """Row 49: N times the weight of a step of 1 / N is g^2 / (2 sigma^2) + O(1 / N)."""
  sde, t, gaps = make_sde("vp"), jnp.array([0.1, 0.5, 0.9]), []
  elbo, (alpha, sigma) = losses.WEIGHTINGS["elbo"](sde, t), marginal(sde, t)
  one, zero = jnp.ones((3, 1)), jnp.zeros((3, 1))
  step = jax.jit(lambda s: posterior(sde, zero, one, t, s))
  for n in (800, 1600, 3200):
    of_data, std = step(t - 1 / n)
    weight = 0.5 * (of_data[:, 0] / std * sigma / alpha) ** 2
    gaps.append(np.abs(np.asarray(n * weight / elbo - 1)))
  np.testing.assert_allclose(np.log2(gaps[0] / gaps[1]), 1, atol=0.05)
  np.testing.assert_allclose(np.log2(gaps[1] / gaps[2]), 1, atol=0.05)


@pytest.mark.parametrize("name", ["ddpm", "ncsn"])
def test_simple_loss_is_the_denoising_score_matching_of_ncsn(x64, name):
  """Row 48: ||noise_hat - noise||^2 = 2 lambda l(sigma), eq. 2-5, lambda = sigma^2 (1 - abar)."""
  sde = make_sde(name, **({"num_steps": 10} if name == "ddpm" else {}))
  t, x0 = jnp.asarray(sde.times), jnp.asarray(np.random.default_rng(0).normal(size=(10, 3)))
  noise_fn = lambda x, t, labels=None: jnp.tanh(x) + jnp.reshape(t, (-1, 1))
  ours = losses.noise_error(jax.random.key(0), sde, noise_fn, x0, t)
  alpha, sigma = (np.asarray(c)[:, None] for c in marginal(sde, t))
  x = alpha * x0 + sigma * sde_lib.normal(jax.random.key(0), x0.shape)
  score = score_from_noise(sde, noise_fn(x, t), t)
  np.testing.assert_allclose(score, -noise_fn(x, t) / sigma, rtol=1e-14)
  matching = 0.5 * np.sum((score + (x - alpha * x0) / sigma**2) ** 2, axis=1)
  np.testing.assert_allclose(ours, 2 * sigma[:, 0] ** 2 * matching, rtol=1e-9)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_every_parameterization_converts_to_every_other(x64, name):
  """Row 46: the data and noise read from one output make another's, and the same noise again."""
  sde, paper = make_sde(name), PAPER[name]
  data, noise = np.random.default_rng(0).normal(size=(2, 4, 3))
  t = np.array([0.05, 0.2, 0.4, 0.6])
  alpha, sigma = paper.alpha(t)[:, None], paper.sigma(t)[:, None]
  x = jnp.asarray(alpha * data + sigma * noise)

  def read(output, data, noise):
    answer = jnp.asarray(TRUTH[output](alpha, sigma, np.asarray(data), np.asarray(noise)))
    return noise_of(sde, lambda *_: answer, x, jnp.asarray(t), output, sigma_data=0.7)

  for first in OUTPUTS:
    once = read(first, data, noise)
    np.testing.assert_allclose(data_from_noise(sde, x, once, jnp.asarray(t)), data, atol=1e-11)
    for second in OUTPUTS:
      again = read(second, data_from_noise(sde, x, once, jnp.asarray(t)), once)
      np.testing.assert_allclose(again, noise, rtol=0, atol=1e-11)


def test_only_the_last_beta_of_the_cosine_chain_is_clipped(x64):
  """Row 55: beta_i = min(1 - abar_i / abar_{i-1}, 0.999), cut at the last step alone."""
  for n in (1000, 4000):
    sde = make_sde("iddpm", num_steps=n)
    abar = np.asarray(marginal(sde, jnp.asarray(sde.times))[0]) ** 2
    cosine = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(abar[:-1], cosine[1:-1] / cosine[0], rtol=1e-9)
    np.testing.assert_allclose(abar[-1], 0.001 * abar[-2], rtol=1e-9)
    assert cosine[-1] / cosine[-2] < 1e-3


# Stochastic differential equations

USERS = {
  "linear VE": lambda: sde_lib.user(jnp.ones_like, jnp.sqrt, t_min=1e-2, t_max=9.0, prior_std=3.0),
  "Ornstein-Uhlenbeck": lambda: sde_lib.user(
    lambda t: jnp.exp(-t),
    lambda t: jnp.sqrt(-jnp.expm1(-2 * t)),
    t_min=1e-2,
    t_max=4.0,
    prior_std=1.0,
  ),
}
users = pytest.mark.parametrize("name", USERS)
# f and g^2 of the same
RATES = {"linear VE": (0.0, 1.0), "Ornstein-Uhlenbeck": (-1.0, 2.0)}


@users
def test_a_user_process_solves_its_moment_equations(x64, name):
  """Row 58: m' = f m, P' = 2 f P + g^2 at 100 times, for an end of time that is not 1."""
  sde = USERS[name]()
  times = np.linspace(sde.t_min, sde.t_max, 100)
  f, g_squared = coefficients(sde, jnp.asarray(times))
  np.testing.assert_allclose(f, RATES[name][0], atol=1e-12)
  np.testing.assert_allclose(g_squared, RATES[name][1], rtol=1e-12)
  alpha, sigma = (np.asarray(c) for c in marginal(sde, jnp.asarray(times)))
  slopes = lambda t, y: [RATES[name][0] * y[0], 2 * RATES[name][0] * y[1] + RATES[name][1]]
  start = [alpha[0], alpha[0] ** 2 * 0.3 + sigma[0] ** 2]
  tight = {"t_eval": times, "method": "DOP853", "rtol": 1e-12, "atol": 1e-14}
  solution = solve_ivp(slopes, (times[0], times[-1]), start, **tight)
  np.testing.assert_allclose(solution.y, [alpha, alpha**2 * 0.3 + sigma**2], rtol=1e-8)


@pytest.mark.parametrize("name", ["ddpm", "ncsn"])
def test_the_tables_solve_their_moment_equations(name):
  """Row 58: between the levels of a chain too, where its logarithms are interpolated."""
  rows = {row.name: row.value for row in validate(SDES[name](), SDES[name], num_steps=5)}
  assert rows["moments, error of the marginals"] < 1e-8


@users
def test_euler_maruyama_steps_by_the_grid(x64, monkeypatch, name):
  """Row 72: x + (t - s) (g^2 score - f x) + sqrt(t - s) g z, on uneven steps from t_max not 1."""
  monkeypatch.setattr(sampling, "normal", lambda key, shape: jnp.ones(shape))
  sde, v = USERS[name](), 0.3
  f, g_squared = RATES[name]
  times = time_grid(sde, 6, "log_snr")
  x, law = 0.7, diagonal([0.0], [v])
  for t, s in zip(np.asarray(times)[:-1], np.asarray(times)[1:]):
    alpha, sigma = (float(c) for c in marginal(sde, t))
    pull = g_squared / (alpha**2 * v + sigma**2) + f
    x = x - (t - s) * pull * x + np.sqrt((t - s) * g_squared)
  run = {"step": sampling.euler_maruyama(sde), "times": times, "denoise": None}
  init = jnp.full((1, 1), 0.7)
  ours, _ = sample(jax.random.key(0), sde, law.noise_fn(sde), (1, 1), init=init, **run)
  np.testing.assert_allclose(ours, [[x]], rtol=1e-10)


@names
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.7])
def test_the_reverse_family_retraces_the_forward_covariance(x64, monkeypatch, name, eta):
  """Row 59: drift f - (1 + eta^2) / 2 g^2 score, noise eta g: P'(t) at every eta.

  The variance after one step of length h from the exact one is the forward P(t - h) but for h^2.
  """
  monkeypatch.setattr(sampling, "normal", unit_noise(1))
  sde, paper, v = make_sde(name), PAPER[name], 0.3
  law, x = diagonal([0.0], [v]), jnp.array([[1.0], [0.0]])
  step = sampling.dpm_solver(sde, order=1, eta=eta)
  end = jax.jit(jax.vmap(lambda t, s: step(None, law.noise_fn(sde), State(x, x), t, s).x[:, 0]))
  t, errors = np.array([0.2, 0.6, 1.0]), []
  for h in (0.002, 0.001):
    a, c = np.asarray(end(t, t - h)).T
    np.testing.assert_allclose(c**2, eta**2 * h * paper.g_squared(t), rtol=0.1, atol=1e-15)
    errors.append(abs((a**2 * paper.variance(t, v) + c**2) / paper.variance(t - h, v) - 1))
  order = np.log2(errors[0] / np.maximum(errors[1], 1e-14))
  assert ((errors[0] < 1e-10) | (abs(order - 2) < 0.15)).all(), (errors, order)


GMM = Mixture(np.array([[0.7, 0.3]]), np.array([[1.0, 0.5], [-1.0, 0.0]]), 0.04)


def gmm_draws(n, law=GMM):
  rng = np.random.default_rng(3)
  centres = np.asarray(law.means)[rng.choice(2, n, p=np.ravel(np.asarray(law.weights)))]
  return centres + np.sqrt(law.variance) * rng.normal(size=(n, 2))


def test_reverse_samples_of_a_mixture_have_its_law():
  """Row 59: 300 samples each by reverse SDEs, against exact draws by a permutation test."""
  sde, n, exact = make_sde("vp", t_min=1e-3), 300, gmm_draws(300)
  score_fn, key = make_score_fn(sde, GMM.noise_fn(sde)), jax.random.key(5)
  times = time_grid(sde, 100, "log_snr")

  @quick
  def draw():
    by_steps = lambda step: sample(key, sde, GMM.noise_fn(sde), (n, 2), step=step, times=times)[0]
    steps = sampling.ancestral(sde), sampling.dpm_solver(sde, eta=1.5)
    return [sample_sde(key, sde, score_fn, (n, 2), num_steps=200)[0], *map(by_steps, steps)]

  for x in draw():
    assert energy_test(np.asarray(x), exact, num_permutations=60)[1] > 0.02
  half = dataclasses.replace(GMM, weights=np.array([[0.5, 0.5]]))
  assert energy_test(gmm_draws(n, half), exact, num_permutations=60)[1] < 0.02


@pytest.mark.parametrize("name", ["vp", "sub_vp"])
def test_importance_times_have_less_variance(x64, name):
  """Row 60: of the likelihood weighting's loss on a Gaussian, over t, with one mean; quadrature."""
  sde, paper, values = make_sde(name, t_min=1e-3), PAPER[name], {}
  nodes, w = np.polynomial.legendre.leggauss(400)
  u = (0.5 * (nodes + 1)) ** 4  # crowded where the weight is large
  w = 0.5 * w * 4 * u**0.75
  for sampler in ("uniform", "importance"):
    weighted = lambda u, quantile=losses.TIME_SAMPLERS[sampler]: (
      (pair := quantile(sde, u))[0],
      pair[1] * losses.WEIGHTINGS["likelihood"](sde, pair[0]),
    )
    t, weight = (np.asarray(c) for c in jax.jit(weighted)(jnp.asarray(u)))
    value = weight * paper.alpha(t) ** 2 * 0.3 / paper.variance(t, 0.3)
    values[sampler] = w @ value, w @ value**2 - (w @ value) ** 2
  np.testing.assert_allclose(values["uniform"][0], values["importance"][0], rtol=1e-6)
  assert values["importance"][1] < values["uniform"][1] / 5


def test_the_variance_of_the_smld_chain_telescopes(x64, monkeypatch):
  """Row 61: x_i = x_{i-1} + sqrt(sigma_i^2 - sigma_{i-1}^2) z, sigma_0 = 0, has variance sigma_i^2.

  The increments are those of `reverse_diffusion` and the integrals of g^2 between the levels.
  """
  monkeypatch.setattr(sampling, "normal", lambda key, shape: jnp.ones(shape))
  sde, sigmas = make_sde("ncsn"), np.geomspace(0.01, 1, 10)
  step, zero = sampling.reverse_diffusion(sde), jnp.zeros((1, 1))
  t = jnp.asarray(sde.times)
  run = lambda t, s: step(None, lambda x, t: 0 * x, State(zero, zero), t, s).x[0, 0]
  increments = np.asarray(jax.vmap(run)(t[1:], t[:-1])) ** 2
  variance = sigmas[0] ** 2 + np.cumsum(increments)
  np.testing.assert_allclose(variance, sigmas[1:] ** 2, rtol=1e-12)
  nodes, weights = np.polynomial.legendre.leggauss(12)
  inside = jnp.asarray(np.arange(1, 10)[:, None] / 10 + (nodes + 1) / 20)
  rate = jax.jit(lambda t: coefficients(sde, t)[1])(inside.ravel()).reshape(9, 12)
  np.testing.assert_allclose(rate @ weights / 20, increments, rtol=1e-9)


def test_ncsn_is_ve_at_its_levels(x64):
  """Row 66: the level i of L is VE's time (i - 1) / (L - 1); one score there."""
  chain, ve = make_sde("ncsn"), make_sde("ve", sigma_max=1.0)
  t = jnp.asarray(chain.times)
  same = time_of_log_snr(ve, log_snr(chain, t))
  np.testing.assert_allclose(same, np.arange(10) / 9, atol=1e-12)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 2)))
  scores = [make_score_fn(sde, TOY.noise_fn(sde))(x, u) for sde, u in ((chain, t), (ve, same))]
  np.testing.assert_allclose(*scores, rtol=1e-9)


def vp_chain(n):
  """DDPM's chain with the betas of `vp` in steps of 1 / n."""
  return make_sde("ddpm", beta_min=0.1 / n, beta_max=20 / n, num_steps=n)


def test_one_network_is_a_discrete_and_a_continuous_model(x64):
  """Row 66: told the same index at the levels, its scores under chain and VP differ by O(1 / N)."""
  x, gaps, sizes = jnp.linspace(-1, 1, 8)[:, None], [], (100, 400)
  for n in sizes:
    chain, last = vp_chain(n), np.arange(1, 9) * n // 8 - 1
    vp, t = dataclasses.replace(make_sde("vp"), times=chain.times), jnp.asarray(chain.times)[last]
    network = lambda x, index, *_, n=n: jnp.sin(x + 3 * index[:, None] / n)
    told = lambda x, index, *_: jnp.broadcast_to(index[:, None], x.shape)
    noises = [noise_of(sde, network, x, t, c_noise="index") for sde in (chain, vp)]
    for sde in (chain, vp):
      np.testing.assert_array_equal(noise_of(sde, told, x, t, c_noise="index")[:, 0], last)
    scores = [score_from_noise(sde, noise, t) for sde, noise in zip((chain, vp), noises)]
    gaps.append(float(jnp.abs(scores[0] / scores[1] - 1).max()))
  assert slope(sizes, gaps) == pytest.approx(-1, abs=0.1)


def test_euler_maruyama_tends_to_ancestral(x64):
  """Row 66: with the same noise EM of VP and the chain's ancestral sampler differ by O(1 / N)."""
  law, gaps, key, sizes = diagonal([0.3], [0.25]), [], jax.random.key(0), (100, 400)
  for n in sizes:
    chain, vp = vp_chain(n), make_sde("vp")
    run = {"times": jnp.linspace(1, 0.1, 9 * n // 10 + 1), "denoise": None}

    @quick
    def ends(chain=chain, vp=vp, run=run):
      steps = (vp, sampling.euler_maruyama(vp)), (chain, sampling.ancestral(chain, variance="beta"))
      return [
        sample(key, sde, law.noise_fn(sde), (500, 1), step=step, **run)[0] for sde, step in steps
      ]

    euler, ancestral = ends()
    gaps.append(float(jnp.sqrt(jnp.mean((euler - ancestral) ** 2))))
  assert slope(sizes, gaps) == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "edm", "rectified"])
def test_corrector_is_the_linear_chain_of_its_step(x64, monkeypatch, name):
  """Row 73: with size 2 (snr sigma)^2 its variance is row 13's exactly, and p_t's as snr -> 0."""
  monkeypatch.setattr(sampling, "normal", unit_noise(1))
  sde = make_sde(name)
  t, law = jnp.asarray(0.5 * (sde.t_min + sde.t_max)), diagonal([0.0], [0.3])
  alpha, sigma = (float(c) for c in marginal(sde, t))
  v, x = alpha**2 * 0.3 + sigma**2, jnp.array([[1.0], [0.0]])
  for snr in (0.3, 1e-3):
    options = {"predictor": "none", "corrector": "ald", "snr": snr}
    step = sampling.predictor_corrector(sde, **options)
    a, c = step(jax.random.key(0), law.noise_fn(sde), State(x, x), t, t).x[:, 0]
    kept = float(stationary(a, c))
    np.testing.assert_allclose(kept, v / (1 - (snr * sigma) ** 2 / v), rtol=1e-9)
  assert kept == pytest.approx(v, rel=2e-6)


@pytest.mark.parametrize(
  ("predictor", "corrector", "num_steps", "cost"),
  [("ancestral", "langevin", 0, 1), ("ddim", "ald", 2, 3), ("none", "langevin", 0, 0)],
)
def test_predictor_and_corrector_count_what_they_run(
  executions, predictor, corrector, num_steps, cost
):
  """Row 73: without corrector an evaluation a step; NFE is what was executed."""
  sde = make_sde("sub_vp")
  noise_fn = lambda x, t, labels: executions.mark(x)
  options = {"corrector": corrector, "num_corrector_steps": num_steps}
  step = sampling.predictor_corrector(sde, predictor, **options)
  run = {"step": step, "times": time_grid(sde, 3, "time")}
  x, nfe = jax.jit(lambda key: sample(key, sde, noise_fn, (2, 1), **run))(jax.random.key(0))
  assert nfe == executions.count() == 3 * cost and jnp.isfinite(x).all()


# The probability flow

LAW = rotated([1.0, -2.0, 0.5], [0.1, 1.0, 2.0])
START = np.random.default_rng(0).normal(size=(4, 3))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_of_the_flow_follows_the_tolerance(x64, solver):
  """Row 74: the largest error against the closed-form flow, for two tolerances."""
  sde, start, rows = make_sde("vp"), jnp.asarray(START), []
  exact = LAW.flow(sde, start, sde.t_max, sde.t_min)
  for tolerance in (1e-3, 1e-6):
    options = {"solver": solver, "rtol": tolerance, "atol": tolerance, "max_steps": 20_000}
    run = lambda z, options=options: sample_ode(
      jax.random.key(0), sde, LAW.score_fn(sde), (4, 3), init=z, **options
    )
    x, nfe = jax.jit(run)(start)
    rows.append((float(jnp.abs(x - exact).max()), int(nfe)))
    assert rows[-1][0] < 50 * tolerance
  assert rows[1][0] < rows[0][0] / 50 and rows[1][1] > rows[0][1]


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_encoding_and_decoding_of_a_gaussian(x64, name):
  """Rows 75, 76: log p and latent in closed form, decoding undoes encoding, VP whitens."""
  sde, x, tight = make_sde(name), jnp.asarray(START), {"rtol": 1e-8, "atol": 1e-8}
  score_fn, key = LAW.score_fn(sde), jax.random.key(0)
  encode = lambda x: log_likelihood(key, sde, score_fn, x, divergence="exact", **tight)
  log_prob, latent, *_ = jax.jit(encode)(x)
  decode = lambda z: sample_ode(key, sde, score_fn, z.shape, init=z, **tight)[0]
  np.testing.assert_allclose(jax.jit(decode)(latent), x, atol=1e-5)
  (alpha, sigma), (small, noise) = (marginal(sde, t) for t in (sde.t_max, sde.t_min))
  basis, mean, v = (np.asarray(c) for c in (LAW.basis, LAW.mean, LAW.variances))
  before, after = small**2 * v + noise**2, alpha**2 * v + sigma**2
  exact = alpha * mean + ((START - small * mean) @ basis * np.sqrt(after / before)) @ basis.T
  np.testing.assert_allclose(latent, exact, atol=1e-6 * sde.prior_std)
  density = sde_lib.prior_log_prob(sde, exact) + 0.5 * np.log(after / before).sum()
  np.testing.assert_allclose(log_prob, density, rtol=0, atol=1e-6)
  if name == "vp":
    white = ((START - mean) @ basis / np.sqrt(v)) @ basis.T
    np.testing.assert_allclose(latent, white, atol=0.02)


# Mean 0 and covariance I, so that the prior fits to third order in alpha(t_max)
ROUND = Mixture(
  np.full((1, 3), 1 / 3), 1.2 * np.array([[0, 1], [0.75**0.5, -0.5], [-(0.75**0.5), -0.5]]), 0.28
)


def test_log_prob_of_a_mixture(x64):
  """Row 75: by the exact trace to 1e-4 nats of the density at t_min, as the row asks."""
  sde, x = make_sde("vp"), jnp.asarray(START[:, :2])
  options = {"divergence": "exact", "rtol": 1e-7, "atol": 1e-7}
  run = lambda x: log_likelihood(jax.random.key(0), sde, ROUND.score_fn(sde), x, **options)
  exact = ROUND.log_prob(x, *marginal(sde, sde.t_min))
  np.testing.assert_allclose(jax.jit(run)(x).log_prob, exact, rtol=0, atol=2e-5)


def test_log_prob_by_probes_is_unbiased(x64, monkeypatch):
  """Row 75: over all signs its mean is the exact value, though each is far off; also as a pair."""
  pairs = jnp.array([[[1.0, 1], [1, 1]], [[1.0, -1], [1, -1]], [[1.0, 1], [1, -1]]])
  number = lambda key: jax.random.key_data(key)[1].astype(int)
  monkeypatch.setitem(DIVERGENCES, "rademacher", lambda key, x, k: pairs[number(key)])
  keys = jax.random.wrap_key_data(jnp.array([[0, 0], [0, 1], [0, 2]], jnp.uint32))
  sde, x = make_sde("vp"), jnp.tile(jnp.array([[0.3, -1.2]]), (3, 1))
  law, tight = rotated([0.5, -0.2], [0.1, 2.0]), {"rtol": 1e-8, "atol": 1e-8}
  run = lambda x: log_likelihood(keys, sde, law.score_fn(sde), x, **tight).log_prob
  one, other, both = np.asarray(jax.jit(run)(x))
  latent = law.flow(sde, x[:1], sde.t_min, sde.t_max)
  exact = sde_lib.prior_log_prob(sde, latent) + law.flow_log_det(sde, sde.t_min, sde.t_max)
  assert abs(one - float(exact[0])) > 0.1
  np.testing.assert_allclose([(one + other) / 2, both], float(exact[0]), rtol=0, atol=1e-6)


PAIR = Mixture(np.array([[0.7, 0.3]]), np.array([[1.0], [-1.0]]), 0.01)


def pair_quantiles(alpha, sigma, n=400):
  """Of the noised law of PAIR, at n midpoints."""
  std = np.sqrt(alpha**2 * 0.01 + sigma**2)
  x = np.linspace(-alpha - 6 * std, alpha + 6 * std, 200_001)
  cdf = 0.7 * norm.cdf(x, alpha, std) + 0.3 * norm.cdf(x, -alpha, std)
  return np.interp((np.arange(n) + 0.5) / n, cdf, x)


def test_work_precision_on_a_mixture(x64):
  """Row 77: error falls with NFE; adaptive steps need fewer than even ones for an equal error.

  In one dimension the flow maps quantiles to quantiles, so the error is the solver's alone.
  """
  sde, key = make_sde("vp", t_min=1e-3), jax.random.key(0)
  quantiles = lambda t: pair_quantiles(*(float(c) for c in marginal(sde, t)))
  start, exact, noise_fn = quantiles(sde.t_max), quantiles(sde.t_min), PAIR.noise_fn(sde)

  def measure(run):
    x, nfe = jax.jit(run)(jnp.asarray(start)[:, None])
    return int(nfe), float(np.sqrt(np.mean((np.asarray(x)[:, 0] - exact) ** 2)))

  def fixed(name, num_steps, spacing):
    run = {"step": SAMPLERS[name](sde), "times": time_grid(sde, num_steps, spacing)}
    return measure(lambda z: sample(key, sde, noise_fn, z.shape, init=z, **run))

  errors = {name: [fixed(name, n, "log_snr")[1] for n in (16, 64)] for name in ("ddim", "unipc")}
  assert errors["ddim"][1] < errors["ddim"][0] / 2 and errors["unipc"][1] < errors["unipc"][0] / 5
  assert errors["unipc"][1] < errors["ddim"][1] / 5
  score_fn, options = PAIR.score_fn(sde), {"rtol": 1e-3, "atol": 1e-3}
  nfe, error = measure(lambda z: sample_ode(key, sde, score_fn, z.shape, init=z, **options))
  cost, even = fixed("edm", 100, "time")
  assert nfe < cost and error < even, (nfe, error, cost, even)
