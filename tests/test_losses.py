"""The objective on Gaussian data in closed form, weightings and time samplers by quadrature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PAPER, diagonal
from scipy import stats

import losses
from errors import ConfigError
from losses import LOSS_AWARE, TIME_SAMPLERS, WEIGHTINGS
from parameterization import data_from_noise, score_from_noise
from sde_lib import log_snr, make_sde, marginal, perturb

names = pytest.mark.parametrize("name", PAPER)
LAW = diagonal([1.5, -0.5], [0.3, 2.0])


def smallest_error(paper, t, variances=(0.3, 2.0)):
  """min E||noise_hat - noise||^2 at time t: the summed variance of the noise given x_t."""
  kept = [paper.alpha(t) ** 2 * v / paper.variance(t, v) for v in variances]
  return np.sum(kept, axis=0)


def quadrature(low=0.0):
  """Gauss-Legendre nodes and weights on [low, 1], in panels that shrink towards `low`."""
  edges = low + (1 - low) * np.concatenate(
    [[0], np.geomspace(1e-9, 1 / 16, 30), np.linspace(1 / 16, 1, 16)[1:]]
  )
  x, w = np.polynomial.legendre.leggauss(12)
  width = np.diff(edges)[:, None]
  return (edges[:-1, None] + width * (x + 1) / 2).ravel(), (width * w / 2).ravel()


@names
@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
def test_exact_noise_prediction_has_the_smallest_error(x64, monkeypatch, name, t):
  """The expectation over (x_0, noise) by Gauss-Hermite quadrature, exact for a quadratic."""
  nodes, weights = np.polynomial.hermite_e.hermegauss(2)
  first, second = (grid.reshape(-1, 1) for grid in np.meshgrid(nodes, nodes))
  x0 = LAW.mean + np.sqrt(LAW.variances) * first
  monkeypatch.setattr(losses, "normal", lambda key, shape: jnp.broadcast_to(second, shape))
  sde = make_sde(name)
  error = losses.noise_error(jax.random.key(0), sde, LAW.noise_fn(sde), jnp.asarray(x0), t)
  mean = error @ np.outer(weights, weights).ravel() / weights.sum() ** 2
  np.testing.assert_allclose(mean, smallest_error(PAPER[name], np.array(t)), rtol=1e-10)


@pytest.mark.parametrize(
  "name, sampler", [("vp", "uniform"), ("sub_vp", "importance"), ("ve", "importance")]
)
def test_denoising_loss_estimates_its_integral(name, sampler):
  """The mean over 20,000 examples: the integral of the smallest error, within 4 standard errors."""
  sde, n = make_sde(name), 20_000
  options = {
    "weighting": WEIGHTINGS["elbo"],
    "time_sampler": losses.independent(TIME_SAMPLERS[sampler]),
  }
  loss = jax.jit(lambda key, x0: losses.denoising_loss(key, sde, LAW.noise_fn(sde), x0, **options))
  value = loss(jax.random.key(1), LAW.sample(jax.random.key(0), n))
  t, weights = quadrature(sde.t_min)
  paper = PAPER[name]
  rate = paper.g_squared(t) / paper.sigma(t) ** 2
  expected = weights @ (0.5 * rate * smallest_error(paper, t)) / (sde.t_max - sde.t_min)
  assert value.shape == (n,)
  assert abs(value.mean() - expected) < 4 * value.std() / np.sqrt(n)


@names
def test_weightings(x64, name):
  sde, paper = make_sde(name), PAPER[name]
  t = np.linspace(0.01, 1.0, 5)
  rate = paper.g_squared(t) / paper.sigma(t) ** 2
  for weighting, expected in {"simple": np.ones(5), "likelihood": rate, "elbo": rate / 2}.items():
    np.testing.assert_allclose(WEIGHTINGS[weighting](sde, jnp.asarray(t)), expected, rtol=1e-10)


@names
def test_uniform_times(x64, name):
  sde, u = make_sde(name), jnp.linspace(0.0, 1.0, 5)
  t, ratio = TIME_SAMPLERS["uniform"](sde, u)
  np.testing.assert_allclose(t, sde.t_min + np.asarray(u) * (1 - sde.t_min), rtol=1e-14)
  np.testing.assert_array_equal(ratio, np.ones(5))


@names
def test_importance_times_are_uniform_in_log_snr(x64, name):
  sde, paper = make_sde(name), PAPER[name]
  u = np.linspace(0.0, 1.0, 101)
  t, _ = TIME_SAMPLERS["importance"](sde, jnp.asarray(u))
  most, least = paper.log_snr(np.array([sde.t_min, sde.t_max]))
  np.testing.assert_allclose(paper.log_snr(np.asarray(t)), most + (least - most) * u, atol=1e-8)


@names
def test_importance_density_is_proportional_to_the_likelihood_weight(x64, name):
  """The second output is uniform density / density: its inverse is g^2 / sigma^2 over its mean."""
  sde, paper = make_sde(name), PAPER[name]
  t, ratio = TIME_SAMPLERS["importance"](sde, jnp.linspace(0.0, 1.0, 101))
  rate = paper.g_squared(np.asarray(t)) / paper.sigma(np.asarray(t)) ** 2
  most, least = paper.log_snr(np.array([sde.t_min, sde.t_max]))
  mean_rate = (most - least) / (sde.t_max - sde.t_min)
  np.testing.assert_allclose(1 / ratio, rate / mean_rate, rtol=1e-9)


@names
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_time_samplers_estimate_the_same_integral(x64, name, weighting):
  sde, (u, weights) = make_sde(name), quadrature()

  def expectation(sampler):
    t, ratio = TIME_SAMPLERS[sampler](sde, jnp.asarray(u))
    error = smallest_error(PAPER[name], np.asarray(t))
    return weights @ np.asarray(ratio * WEIGHTINGS[weighting](sde, t) * error)

  kink = 1e-3 if weighting == "min_snr" else 1e-6
  np.testing.assert_allclose(expectation("importance"), expectation("uniform"), rtol=kink)


@pytest.mark.parametrize("name, t", [("edm", 0.3), ("vp", 0.2)])
def test_weightings_are_the_published_ones_for_the_noise(x64, name, t):
  """Each paper's loss of data, score or noise, term by term, is w times the noise's error."""
  sde, rng = make_sde(name), np.random.default_rng(0)
  x0, noise, guess = (jnp.asarray(rng.normal(size=(4, 3))) for _ in range(3))
  t = jnp.full(4, t)
  alpha, sigma = (np.asarray(c) for c in marginal(sde, t))
  x, r, snr = perturb(sde, x0, noise, t), sigma / alpha, (alpha / sigma) ** 2
  of_data = np.sum((data_from_noise(sde, x, guess, t) - x0) ** 2, axis=1)
  of_noise = np.sum((guess - noise) ** 2, axis=1)
  of_score = np.sum((score_from_noise(sde, guess, t) + noise / sigma[:, None]) ** 2, axis=1)
  rate = np.asarray(losses.log_snr_rate(sde, t))
  expected = {
    "edm": ({"sigma_data": 0.7}, (r**2 + 0.7**2) / (r * 0.7) ** 2 * of_data),
    "min_snr": ({"gamma": 2.0}, np.minimum(snr, 2.0) * of_data),
    "sigmoid": ({"bias": 1.0}, 0.5 * rate * np.e / (1 + np.e / snr) * of_data),
    "power": ({"p": 1.5}, 0.5 * sigma**1.5 * of_score),
  }
  for weighting, (options, value) in expected.items():
    w = WEIGHTINGS[weighting](sde, t, **options)
    np.testing.assert_allclose(w * of_noise, value, rtol=1e-9, err_msg=weighting)


def test_weightings_by_hand(x64):
  """EDM at sigma 0.3: (0.09 + 0.25) / 0.25; its loss bounds SNR 1 / 0.09 = 11.1 to 5; sigmoid with
  bias log(1 / 0.09) is a half of the ELBO's 1 / sigma; NCSN's lambda = sigma^2 leaves a half.
  """
  sde, t = make_sde("edm"), jnp.array(0.3)
  by_hand = {"edm": 1.36, "min_snr": 0.45, "power": 0.5}
  for name, value in by_hand.items():
    np.testing.assert_allclose(WEIGHTINGS[name](sde, t), value, rtol=1e-12)
  half = WEIGHTINGS["sigmoid"](sde, t, bias=np.log(1 / 0.09))
  np.testing.assert_allclose([half, WEIGHTINGS["elbo"](sde, t)], [0.5 / 0.3, 1 / 0.3], rtol=1e-12)


def test_the_loss_of_edm(x64):
  """E over ln sigma of lambda(sigma) ||D(y; sigma) - x_0||^2 (Karras et al. 2022, eq. 2 and 8) on
  the same noise: no density ratio.
  """
  sde, x0, key = make_sde("edm"), LAW.sample(jax.random.key(0), 5), jax.random.key(3)
  sampler = losses.independent(TIME_SAMPLERS["log_normal"])
  draw = {"weighting": WEIGHTINGS["edm"], "time_sampler": sampler}
  ours = losses.denoising_loss(key, sde, LAW.noise_fn(sde), x0, **draw)
  keys = losses.example_keys(key, 5)
  sigma = sampler(losses.fold_in(keys, 0), sde)[0]
  x = x0 + sigma[:, None] * losses.normal(losses.fold_in(keys, 1), x0.shape)
  error = ((LAW.denoise(x, jnp.ones(5), sigma) - x0) ** 2).sum(1)
  np.testing.assert_allclose(ours, (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error, rtol=1e-9)


@pytest.mark.parametrize("name, p_mean", [("edm", -1.2), ("vp", 0.3)])
def test_log_normal_times_have_the_truncated_law(x64, name, p_mean):
  sde, u = make_sde(name), np.linspace(0.0, 1.0, 41)
  t, ratio = TIME_SAMPLERS["log_normal"](sde, jnp.asarray(u), p_mean=p_mean, p_std=1.5)
  low, high, reached = (
    stats.norm.cdf(-0.5 * np.asarray(log_snr(sde, end)), p_mean, 1.5)
    for end in (sde.t_min, sde.t_max, t)
  )
  np.testing.assert_allclose((reached - low) / (high - low), u, atol=1e-9)
  np.testing.assert_array_equal(ratio, 1.0)
  np.testing.assert_allclose([t[0], t[-1]], [sde.t_min, sde.t_max], rtol=1e-6)


def test_log_normal_times_are_inside_in_float32():
  u = jnp.array([0.0, 1e-7, 0.5, 1 - 2.0**-24])
  for name in ("edm", "vp", "rectified"):
    sde = make_sde(name)
    t = np.asarray(TIME_SAMPLERS["log_normal"](sde, u, p_mean=3.0, p_std=0.2)[0])
    assert (np.diff(t) >= 0).all() and t[0] >= np.float32(sde.t_min) and t[-1] <= sde.t_max


def test_levels_are_equally_likely():
  """Each level from its share of [0, 1), also at the last number below 1."""
  for n in (2, 7, 1000, 4000):
    sde = make_sde("ddpm", num_steps=n, beta_max=min(0.02, 10 / n))
    u = (jnp.arange(3 * n) + 0.5) / (3 * n)
    t, ratio = TIME_SAMPLERS["levels"](sde, u)
    np.testing.assert_array_equal(t, np.repeat(np.float32(sde.times), 3))
    np.testing.assert_array_equal(ratio, 1.0)
    last = TIME_SAMPLERS["levels"](sde, jnp.array([1 - 2.0**-24]))[0]
    np.testing.assert_array_equal(last, np.float32(sde.times[-1:]))


def test_continuous_time_has_no_levels():
  with pytest.raises(ConfigError, match="'ddpm'"):
    TIME_SAMPLERS["levels"](make_sde("vp"), jnp.zeros(1))


HISTORIES = pytest.mark.parametrize(
  "sde", [make_sde("ncsn", num_scales=5), make_sde("vp")], ids=["levels", "time"]
)


def centres(sde):
  """A time in each bin of the history of losses."""
  ends = sde.t_max - sde.t_min
  return sde.t_min + ends * (np.arange(100) + 0.5) / 100 if sde.times is None else sde.times


def fed(sde, num_rounds, scale=lambda i: 1.0 + i % 7):
  """The history after `num_rounds` losses scale(bin) * (1 + round) in each bin."""
  history, t = losses.init_history(sde), jnp.asarray(centres(sde))
  level = scale(np.arange(len(t)))
  for i in range(num_rounds):
    history = losses.update_history(history, sde, t, jnp.asarray(level * (1.0 + i)))
  return history, level


@HISTORIES
def test_history_is_a_ring_of_the_newest_losses(x64, sde):
  """Against ten-long queues, in batches in which many examples share a bin; NaN is left out."""
  rng, bins = np.random.default_rng(0), len(centres(sde))
  update = jax.jit(lambda *given: losses.update_history(given[0], sde, *given[1:]))
  history, queues, counts = losses.init_history(sde), [[] for _ in range(bins)], np.zeros(bins)
  for size in (64, 1, 40, 64):
    index, loss = rng.integers(0, 3, size), rng.normal(size=size)
    loss[rng.random(size) < 0.1] = np.nan
    history = update(history, jnp.asarray(centres(sde)[index]), jnp.asarray(loss))
    for i, value in zip(index, loss):
      if np.isfinite(value):
        queues[i], counts[i] = [*queues[i], value][-10:], counts[i] + 1
  np.testing.assert_array_equal(history.counts, counts)
  for i in range(3):
    np.testing.assert_allclose(np.sort(history.losses[i]), np.sort(queues[i]))
    assert history.losses[i, int(counts[i] - 1) % 10] == pytest.approx(queues[i][-1])


@HISTORIES
def test_loss_aware_times_are_uniform_until_every_bin_is_full(x64, sde):
  u = jnp.linspace(0.0, 0.999, 13)
  before = "uniform" if sde.times is None else "levels"
  expected, _ = TIME_SAMPLERS[before](sde, u)
  for history in (fed(sde, 9)[0], losses.init_history(sde)):
    t, ratio = TIME_SAMPLERS[LOSS_AWARE](sde, u, history=history)
    np.testing.assert_allclose(t, expected, rtol=1e-12)
    np.testing.assert_allclose(ratio, 1.0, rtol=1e-12)


@HISTORIES
def test_loss_aware_times_have_the_law_of_the_second_moments(x64, sde):
  """Probability 0.999 sqrt(E loss^2) / sum + 0.001 / bins, counted on a fine grid; the ratio is
  uniform / density, so that the mean of anything is that over uniform times.
  """
  history, level = fed(sde, 12)
  bins, p = len(level), 0.999 * level / level.sum() + 0.001 / len(level)
  n = 200_000
  quantile = jax.jit(lambda u: TIME_SAMPLERS[LOSS_AWARE](sde, u, history=history))
  t, ratio = (np.asarray(c) for c in quantile((jnp.arange(n) + 0.5) / n))
  continuous = np.floor((t - sde.t_min) / (sde.t_max - sde.t_min) * 100)
  index = (continuous if sde.times is None else np.rint(t * bins) - 1).astype(int)
  np.testing.assert_allclose(np.bincount(index, minlength=bins) / n, p, atol=2 / n)
  np.testing.assert_allclose(ratio, 1 / (bins * p[index]), rtol=1e-9)
  uniform = (np.arange(n) + 0.5) / n * (sde.t_max - sde.t_min) + sde.t_min
  mean = np.sin(3 * (uniform if sde.times is None else sde.times)).mean()
  np.testing.assert_allclose((ratio * np.sin(3 * t)).mean(), mean, atol=1e-4)


def test_loss_aware_times_reduce_the_variance(x64):
  """CATALOGUE row 60: of a loss whose scale differs from level to level, with the same mean."""
  sde = make_sde("ncsn", num_scales=8)
  history, level = fed(sde, 10, lambda i: 3.0**i)
  quantiles = {
    "levels": TIME_SAMPLERS["levels"],
    "aware": functools.partial(TIME_SAMPLERS[LOSS_AWARE], history=history),
  }
  values = {}
  for name, quantile in quantiles.items():
    t, ratio = quantile(sde, (jnp.arange(100_000) + 0.5) / 100_000)
    values[name] = np.asarray(ratio) * level[np.rint(np.asarray(t) * 8).astype(int) - 1]
  assert values["aware"].mean() == pytest.approx(values["levels"].mean(), rel=1e-4)
  assert values["aware"].std() < 0.05 * values["levels"].std()


@pytest.mark.parametrize("p", [0.0, 2.0])
def test_ncsn_loss_over_levels(x64, monkeypatch, p):
  """CATALOGUE rows 24, 25: the mean over levels of lambda(sigma) times the least level loss, 1/2
  sum_i v_i / (sigma^2 (v_i + sigma^2)), each level as often as its neighbours.
  """
  sde = make_sde("ncsn", num_scales=6)
  nodes = np.array([-1.0, 1.0])  # of the two-point rule for a normal law
  first, second, u = (
    c.ravel() for c in np.meshgrid(nodes, nodes, (np.arange(6) + 0.5) / 6, indexing="ij")
  )
  x0 = LAW.mean + jnp.sqrt(LAW.variances) * first[:, None]
  noise = jnp.asarray(np.stack([second, second], 1))
  monkeypatch.setattr(losses, "normal", lambda key, shape: noise)
  sampler = lambda keys, sde: TIME_SAMPLERS["levels"](sde, jnp.asarray(u))
  power = functools.partial(WEIGHTINGS["power"], p=p)
  draw = {"weighting": power, "time_sampler": sampler}
  loss = losses.denoising_loss(jax.random.key(0), sde, LAW.noise_fn(sde), x0, **draw)
  sigma, v = np.geomspace(0.01, 1.0, 6)[:, None], np.array([0.3, 2.0])
  least = 0.5 * (sigma**p * v / (sigma**2 * (v + sigma**2))).sum(1).mean()
  np.testing.assert_allclose(loss.mean(), least, rtol=1e-8)


def test_the_denoising_loss_is_one_network_call_and_no_loop():
  """CATALOGUE row 26: no adversary and no sampling in training."""
  sde, calls = make_sde("ve"), []
  noise_fn = lambda x, t, labels: calls.append(0) or x
  sampler = losses.independent(TIME_SAMPLERS["uniform"])
  draw = {"weighting": WEIGHTINGS["power"], "time_sampler": sampler}
  loss = lambda x0: losses.denoising_loss(jax.random.key(0), sde, noise_fn, x0, **draw)
  program = str(jax.make_jaxpr(loss)(jnp.zeros((4, 2))))
  assert len(calls) == 1 and "while" not in program and "scan" not in program


def stratified_u(key, index, total):
  """The numbers in [0, 1) that a stratified sampler hands to its quantile function."""
  return losses.stratified(lambda sde, u: u, key, index, total)(None, None)


def test_stratified_times_cover_each_stratum_once():
  for seed in range(5):
    u = stratified_u(jax.random.key(seed), jnp.arange(16), 16)
    np.testing.assert_array_equal(np.sort(np.floor(u * 16)), np.arange(16))


def test_stratified_draws_are_uniform():
  """The first example's u over 2,000 keys: every tenth of [0, 1] equally often."""
  keys = jax.random.split(jax.random.key(0), 2000)
  first = jax.vmap(lambda key: stratified_u(key, jnp.arange(4), 4)[0])(keys)
  counts = np.histogram(first, np.linspace(0, 1, 11))[0]
  assert (abs(counts - 200) < 4 * np.sqrt(200 * 0.9)).all()


def test_stratified_slices_agree_with_the_whole():
  sde, key, total = make_sde("vp"), jax.random.key(0), 8
  quantile = TIME_SAMPLERS["importance"]
  times = jax.jit(lambda index: losses.stratified(quantile, key, index, total)(None, sde))
  whole, parts = times(jnp.arange(8)), [times(jnp.arange(i, i + 2)) for i in (0, 2, 4, 6)]
  np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


def test_losses_do_not_depend_on_the_batch_size():
  sde, x0 = make_sde("vp"), LAW.sample(jax.random.key(0), 7)
  options = {
    "weighting": WEIGHTINGS["likelihood"],
    "time_sampler": losses.independent(TIME_SAMPLERS["importance"]),
  }
  key, noise_fn = jax.random.key(1), LAW.noise_fn(sde)
  loss = jax.jit(lambda x0: losses.denoising_loss(key, sde, noise_fn, x0, **options))
  np.testing.assert_allclose(loss(x0[:3]), loss(x0)[:3], rtol=1e-6)


def test_labels_reach_the_noise_function():
  """At x_0 = 0 the noise is x / sigma, so the label is the error."""
  sde, x0 = make_sde("vp"), jnp.zeros((2, 3))
  noise_fn = lambda x, t, labels: x / marginal(sde, t)[1] + labels[:, None]
  error = losses.noise_error(jax.random.key(0), sde, noise_fn, x0, 0.5, jnp.array([0, 2]))
  np.testing.assert_allclose(error, [0, 12], rtol=1e-5, atol=1e-10)
