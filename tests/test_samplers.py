"""Every sampler on every process, against the flow and the moments of a Gaussian in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import Mixture, diagonal

import sampling
from errors import ConfigError
from sampling import SAMPLERS, State, sample, time_grid
from sde_lib import (
  example_keys,
  fold_in,
  log_snr,
  make_sde,
  marginal,
  posterior,
  sample_prior,
)

LAW = diagonal([0.3, -0.2], [0.25, 1.5])
PROCESSES = {
  "vp": {"t_min": 1e-3},
  "sub_vp": {"t_min": 1e-2},
  "ve": {},
  "cosine": {"t_min": 1e-3},
  "edm": {},
  "rectified": {"t_min": 1e-2, "t_max": 0.99},
}
processes = pytest.mark.parametrize("name", PROCESSES)
three = pytest.mark.parametrize("name", ["vp", "ve", "rectified"])


def flow_error(sde, step, num_steps, law=LAW):
  """(largest error against the closed-form flow of the same prior draws, network evaluations)."""
  start = sample_prior(jax.random.key(0), sde, (4, 2))
  times = time_grid(sde, num_steps, "log_snr")
  x, nfe = sample(
    jax.random.key(1), sde, law.noise_fn(sde), (4, 2), step=step, times=times, init=start
  )
  return float(jnp.abs(x - law.flow(sde, start, sde.t_max, sde.t_min)).max()), int(nfe)


@three
@pytest.mark.parametrize(
  ("sampler", "options", "order", "cost"),
  [
    ("ddim", {}, 1, 1),
    ("dpm_solver", {"order": 1}, 1, 1),
    ("dpm_solver", {}, 2, 1),
    ("edm", {}, 2, 2),
    ("unipc", {}, 3, 1),
  ],
)
def test_deterministic_samplers_converge_at_their_order(x64, name, sampler, options, order, cost):
  sde = make_sde(name, **PROCESSES[name])
  step = SAMPLERS[sampler](sde, **options)
  (coarse, _), (fine, nfe) = flow_error(sde, step, 160), flow_error(sde, step, 320)
  assert np.log2(coarse / fine) == pytest.approx(order, abs=0.1)
  assert nfe == 320 * cost


@pytest.fixture
def moments(x64, monkeypatch):
  """Variance at t_min of a run on N(0, v), which is linear in the start and in each step's noise.

  Example 0 starts from 1 without noise, example k from 0 with unit noise at step k alone.
  """

  def variance(sde, step, num_steps, v):
    b = num_steps + 1
    with monkeypatch.context() as patch:
      patch.setattr(sampling, "fold_in", lambda key, i: jnp.asarray(i))
      unit = lambda i, shape: jnp.where(jnp.arange(b) == i, 1.0, 0.0)[:, None]
      patch.setattr(sampling, "normal", unit)
      law, start = diagonal([0.0], [v]), jnp.zeros((b, 1)).at[0].set(1.0)
      times, key = time_grid(sde, num_steps, "log_snr"), jax.random.key(0)
      run = {"step": step, "times": times, "denoise": None, "init": start}
      response = sample(key, sde, law.noise_fn(sde), (b, 1), **run)[0][:, 0]
    alpha, sigma = marginal(sde, sde.t_max)
    return float(response[0] ** 2 * (alpha**2 * v + sigma**2) + (response[1:] ** 2).sum())

  return variance


@three
@pytest.mark.parametrize(
  ("sampler", "options", "order"),
  [
    ("reverse_diffusion", {}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("dpm_solver", {"order": 1, "eta": 1.0}, 1),
    ("dpm_solver", {"eta": 1.0}, 2),
  ],
)
def test_stochastic_samplers_converge_at_their_weak_order(moments, name, sampler, options, order):
  sde, v = make_sde(name, **PROCESSES[name]), 0.3
  alpha, sigma = marginal(sde, sde.t_min)
  exact = float(alpha**2 * v + sigma**2)
  step = SAMPLERS[sampler](sde, **options)
  coarse, fine = (abs(moments(sde, step, n, v) - exact) for n in (320, 640))
  assert np.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def one_step(sde, step, t=0.6, s=0.5, key=3):
  x = jax.random.normal(jax.random.key(9), (3, 2))
  return step(jax.random.key(key), LAW.noise_fn(sde), State(x, x), jnp.asarray(t), jnp.asarray(s))


def test_ddim_with_eta_one_is_ancestral_and_so_is_the_first_order_sde_solver(x64):
  sde = make_sde("vp")
  expected = one_step(sde, sampling.ancestral(sde))
  for step in (sampling.ddim(sde, eta=1.0), sampling.dpm_solver(sde, order=1, eta=1.0)):
    for a, b in zip(one_step(sde, step)[:2], expected[:2]):
      np.testing.assert_allclose(a, b, atol=1e-12)


def test_first_order_solver_is_ddim(x64):
  sde = make_sde("cosine")
  a, b = (one_step(sde, step) for step in (sampling.ddim(sde), sampling.dpm_solver(sde, order=1)))
  np.testing.assert_allclose(a.x, b.x, atol=1e-12)


def test_vp_expressed_as_ve_gives_the_same_samples(x64):
  """y = x / alpha at r = sigma / alpha is the same process, so the same steps in log-SNR."""
  vp, edm = make_sde("vp", t_min=1e-3), None
  ends = [float(jnp.exp(-0.5 * log_snr(vp, t))) for t in (vp.t_min, vp.t_max)]
  edm = make_sde("edm", sigma_min=ends[0], sigma_max=ends[1])
  start = jax.random.normal(jax.random.key(0), (4, 2))
  for name in ("ddim", "edm", "dpm_solver", "unipc"):
    ends = []
    for sde in (vp, edm):
      scaled = start * marginal(sde, sde.t_max)[0] * edm.t_max
      run = {"step": SAMPLERS[name](sde), "times": time_grid(sde, 12, "log_snr"), "init": scaled}
      x, _ = sample(jax.random.key(1), sde, LAW.noise_fn(sde), (4, 2), **run)
      ends.append(x / marginal(sde, sde.t_min)[0])
    np.testing.assert_allclose(*ends, rtol=1e-8)


def test_edm_with_18_levels_costs_35_evaluations():
  sde = make_sde("edm")
  run = {"step": sampling.edm(sde), "times": time_grid(sde, 17, "karras"), "denoise": "tweedie"}
  _, nfe = sample(jax.random.key(0), sde, LAW.noise_fn(sde), (2, 2), **run)
  assert nfe == 35


def test_churn_keeps_the_law(x64):
  """Noise added and removed again: with fine steps the variance is still that of the data."""
  sde, law = make_sde("edm", sigma_min=0.01), diagonal([0.0] * 400, [0.3] * 400)
  step = sampling.edm(sde, gamma=0.05)
  run = {"step": step, "times": time_grid(sde, 150, "karras")}
  x, nfe = sample(jax.random.key(0), sde, law.noise_fn(sde), (100, 400), **run)
  assert float((x**2).mean()) == pytest.approx(0.3 + 0.01**2, rel=4 * np.sqrt(2 / 40_000))
  assert nfe == 300


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_runs_from_a_jit_and_draws_the_same_alone(sampler):
  """Example i depends on (key, i) alone; the corrector is asked for norms per example."""
  sde = make_sde("vp", t_min=1e-3)
  options = {"predictor_corrector": {"per_example": True}, "annealed_langevin": {"num_steps": 2}}
  step = SAMPLERS[sampler](sde, **options.get(sampler, {}))

  def draw(first, n):
    run = {"step": step, "times": time_grid(sde, 6, "log_snr"), "first_index": first}
    return sample(jax.random.key(0), sde, LAW.noise_fn(sde), (n, 2), **run)[0]

  together = jax.jit(draw, static_argnums=1)(0, 4)
  alone = jnp.concatenate([draw(i, 1) for i in range(4)])
  np.testing.assert_allclose(together, alone, rtol=2e-4, atol=2e-5)


# Langevin


def stationary_variance(size, v=1.0):
  """Of x + size / 2 score + sqrt(size) z on N(0, v): CATALOGUE row 13."""
  return v / (1 - size / (4 * v))


def test_langevin_has_the_variance_of_its_discretised_chain(x64):
  x = jax.random.normal(jax.random.key(0), (40_000, 1))
  y = sampling.langevin(jax.random.key(1), lambda x: -x, x, step_size=0.1, num_steps=200)
  assert stationary_variance(0.1) == pytest.approx(1.0256, abs=1e-4)
  assert float(y.var()) == pytest.approx(1.0256, rel=4 * np.sqrt(2 / 40_000))


def test_langevin_conventions_differ_by_a_factor_two(x64):
  x, key = jnp.ones((3, 1)), jax.random.key(0)
  a = sampling.langevin_step(key, -x, x, 0.2, "report")
  b = sampling.langevin_step(key, -x, x, 0.1, "code")
  np.testing.assert_allclose(a.x, b.x)
  np.testing.assert_allclose([a.mean, b.mean], 0.9)


TOY = Mixture(np.array([[0.8, 0.2]]), np.array([[5.0, 5.0], [-5.0, -5.0]]), 1.0)


def share_of_the_upper_mode(x):
  return float((x.sum(1) > 0).mean())


def test_langevin_loses_the_weights_of_the_modes():
  """CATALOGUE row 18: a uniform start fills the basin x + y > -log(4) / 10, of area 0.5086."""
  x = jax.random.uniform(jax.random.key(0), (4_000, 2), minval=-8, maxval=8)
  y = sampling.langevin(jax.random.key(1), TOY.score, x, step_size=0.1, num_steps=1000)
  assert share_of_the_upper_mode(y) == pytest.approx(0.511, abs=4 * np.sqrt(0.25 / 4_000))


def test_annealed_langevin_recovers_them():
  """CATALOGUE row 28: sigma from 20 to 1 in 10 levels, 100 steps each, eps 0.1 gives 0.783."""
  sde = make_sde("ncsn", sigma_max=20.0, sigma_min=1.0, num_scales=10)
  times = time_grid(sde, 9, "trained")
  # the toy's eps is that of eq. 4: half of it in the convention of the code
  step = sampling.annealed_langevin(sde, step_lr=0.05, num_steps=100)
  init = jax.random.uniform(jax.random.key(0), (4_000, 2), minval=-8, maxval=8)
  run = {"step": step, "times": jnp.append(times[0], times), "init": init, "denoise": None}
  x, nfe = sample(jax.random.key(1), sde, TOY.noise_fn(sde), (4_000, 2), **run)
  assert nfe == 1000
  assert share_of_the_upper_mode(x) == pytest.approx(0.783, abs=4 * np.sqrt(0.17 / 4_000))


def test_snr_of_the_ald_corrector_reproduces_the_published_step_sizes(x64):
  """CATALOGUE row 27: snr = sqrt(step_lr / 2) / sigma_L, both through one step."""
  for step_lr, snr in ((2e-5, 0.316), (6.2e-6, 0.176), (3.3e-6, 0.128), (1.8e-6, 0.095)):
    assert np.sqrt(step_lr / 2) / 0.01 == pytest.approx(snr, abs=5e-4)
    sde = make_sde("ve", sigma_max=1.0)
    exact_snr = np.sqrt(step_lr / 2) / 0.01
    options = {"predictor": "none", "corrector": "ald", "snr": exact_snr}
    corrected = one_step(sde, sampling.predictor_corrector(sde, **options))
    annealed = one_step(sde, sampling.annealed_langevin(sde, step_lr, num_steps=1))
    np.testing.assert_allclose(corrected.mean, annealed.mean, rtol=1e-12)


@processes
def test_corrector_leaves_the_law_invariant_but_for_its_step_bias(x64, name):
  """CATALOGUE row 73, at one time: the chain with step 2 a has variance v / (1 - 2 a / (4 v))."""
  sde = make_sde(name, **PROCESSES[name])
  time = jnp.asarray(0.5 * (sde.t_min + sde.t_max))
  law, (alpha, sigma) = diagonal([0.0], [0.3]), marginal(sde, time)
  v, snr = float(alpha**2 * 0.3 + sigma**2), 0.3
  options = {"predictor": "none", "corrector": "ald", "snr": snr, "num_corrector_steps": 60}
  step = sampling.predictor_corrector(sde, **options)
  x = np.sqrt(v) * jax.random.normal(jax.random.key(0), (20_000, 1))
  y = step(jax.random.key(1), law.noise_fn(sde), State(x, x), time, time).x
  expected = stationary_variance(4 * float((snr * sigma) ** 2), v)
  assert float(y.var()) == pytest.approx(expected, rel=5 * np.sqrt(2 / 20_000))


def test_predictor_corrector_counts_its_network_calls():
  sde = make_sde("sub_vp")
  for options, cost in (({}, 2), ({"predictor": "none"}, 1), ({"num_corrector_steps": 3}, 4)):
    step = sampling.predictor_corrector(sde, **options)
    run = {"step": step, "times": time_grid(sde, 5, "time")}
    x, nfe = sample(jax.random.key(0), sde, LAW.noise_fn(sde), (2, 2), **run)
    assert nfe == 5 * cost and jnp.isfinite(x).all()


def test_langevin_corrector_averages_norms_over_the_batch_or_not(x64):
  """The step 2 (snr ||z|| / ||score||)^2 read back from the change of the noise-free part."""
  sde = make_sde("ve")
  noise_fn, t = LAW.noise_fn(sde), jnp.asarray(0.4)
  x = jax.random.normal(jax.random.key(9), (3, 2))
  score = -noise_fn(x, t) / marginal(sde, t)[1]
  read = {}
  for per_example in (False, True):
    options = {"predictor": "none", "snr": 0.2, "per_example": per_example}
    step = sampling.predictor_corrector(sde, **options)
    state = step(jax.random.key(0), noise_fn, State(x, x), t, t)
    read[per_example] = (((state.mean - x) / score)[:, 0], state.x - state.mean)
  size, noise = read[True]
  z, g = noise / jnp.sqrt(2 * size)[:, None], jnp.linalg.norm(score, axis=1)
  np.testing.assert_allclose(size, 2 * (0.2 * jnp.linalg.norm(z, axis=1) / g) ** 2, rtol=1e-10)
  mean_size = 2 * (0.2 * jnp.linalg.norm(z, axis=1).mean() / g.mean()) ** 2
  np.testing.assert_allclose(read[False][0], mean_size, rtol=1e-10)


TEMPERED = {
  "euler_maruyama": {},
  "reverse_diffusion": {},
  "ancestral": {},
  "ddim": {"eta": 0.7},
  "dpm_solver": {"eta": 1.0},
  "annealed_langevin": {"num_steps": 1},
  "predictor_corrector": {"corrector": "ald"},
}


@pytest.mark.parametrize("sampler", TEMPERED)
def test_temperature_scales_all_the_noise_of_a_step(x64, sampler):
  """A step is affine in its noise, so at temperature 1/2 it lies half way to temperature 0."""
  sde, make_step = make_sde("vp"), SAMPLERS[sampler]
  cold, half, full = (
    one_step(sde, make_step(sde, **TEMPERED[sampler], temperature=T)).x for T in (0.0, 0.5, 1.0)
  )
  default = one_step(sde, make_step(sde, **TEMPERED[sampler])).x
  np.testing.assert_allclose(half, 0.5 * (cold + full), rtol=1e-12)
  np.testing.assert_array_equal(default, full)
  assert jnp.abs(full - cold).min() > 1e-3
  other_key = one_step(sde, make_step(sde, **TEMPERED[sampler], temperature=0.0), key=4).x
  np.testing.assert_array_equal(other_key, cold)


@processes
def test_learned_variance_at_its_optimum_is_exact(moments, name):
  """CATALOGUE rows 47 and 53: with the optimal variance, beta~ + c^2 Var(x_0 | x_t), seven coarse
  steps on N(0, v) give the data's variance; with either published choice they do not.
  """
  sde, v = make_sde(name, **PROCESSES[name]), 0.3
  times = time_grid(sde, 7, "log_snr")
  law = diagonal([0.0], [v])

  def optimal(x, t, labels):
    s = times[jnp.argmin(jnp.abs(times - t)) + 1]
    (alpha, sigma), (alpha_s, sigma_s) = marginal(sde, t), marginal(sde, s)
    forward = sigma**2 - (alpha / alpha_s * sigma_s) ** 2  # of x_t given x_s
    posterior = forward * (sigma_s / sigma) ** 2
    spread = v * sigma**2 / (alpha**2 * v + sigma**2)  # of x_0 given x_t
    variance = posterior + (alpha_s * forward / sigma**2) ** 2 * spread
    fraction = jnp.log(variance / posterior) / (2 * jnp.log(sigma / sigma_s))
    return law.noise_fn(sde)(x, t), jnp.full_like(x, fraction)

  class Learned:
    with_variance = staticmethod(lambda x, t: optimal(x, t, None))

  alpha, sigma = marginal(sde, sde.t_min)
  exact, errors = float(alpha**2 * v + sigma**2), {}
  for variance in ("learned", "posterior", "beta"):
    step = sampling.ancestral(sde, variance)
    told = lambda key, noise_fn, *rest, step=step: step(key, Learned, *rest)
    run = told if variance == "learned" else step
    errors[variance] = abs(moments(sde, run, 7, v) / exact - 1)
  assert errors["learned"] < 1e-9
  assert min(errors["posterior"], errors["beta"]) > 1e-3


def test_clipped_data_stay_in_the_range(x64):
  """The mean is that of q(x_s | x_t, x_0) with the predicted data clipped to [-1, 1]."""
  sde, t, s = make_sde("vp"), 0.6, 0.5
  x = 6 * jax.random.normal(jax.random.key(9), (3, 2))
  noise = LAW.noise_fn(sde)(x, t)
  alpha, sigma = marginal(sde, t)
  data = jnp.clip((x - sigma * noise) / alpha, -1, 1)
  assert (jnp.abs(data) == 1).any() and (jnp.abs(data) < 1).any()
  state = State(x, x)
  run = lambda clip: sampling.ancestral(sde, clip=clip)(
    jax.random.key(0), LAW.noise_fn(sde), state, jnp.asarray(t), jnp.asarray(s)
  )
  np.testing.assert_allclose(run(True).mean, posterior(sde, x, data, t, s)[0], rtol=1e-12)
  assert jnp.abs(run(True).mean - run(False).mean).max() > 0.1


def test_learned_variance_needs_a_network_that_learned_it():
  sde = make_sde("vp")
  run = {"step": sampling.ancestral(sde, "learned"), "times": time_grid(sde, 5, "time")}
  with pytest.raises(ConfigError) as error:
    sample(jax.random.key(0), sde, LAW.noise_fn(sde), (2, 2), **run)
  assert "variance = 'learned'" in str(error.value) and "beta, posterior" in str(error.value)


def test_starts(x64):
  """A named draw at times[0]; the key decides it, its scale is that of the level."""
  sde, key, shape = make_sde("ve", sigma_max=20.0), jax.random.key(0), (500, 4)
  keep = lambda key, noise_fn, state, t, s: state
  for cut in (0, 30):
    times = time_grid(sde, 60, "time")[cut:]
    scale = marginal(sde, times[0])[1] / sde.prior_std
    run = {"step": keep, "times": times, "denoise": None}
    draw = lambda run=run, **kind: sample(key, sde, LAW.noise_fn(sde), shape, **run, **kind)[0]
    prior = sample_prior(fold_in(example_keys(key, 500), 0), sde, shape)
    np.testing.assert_allclose(draw(), scale * prior)
    uniform = draw(init="uniform") / scale
    assert -1 <= uniform.min() < -0.99 and 0.99 < uniform.max() <= 1
    assert float(uniform.var()) == pytest.approx(1 / 3, rel=4 * np.sqrt(0.8 / 2000))
    np.testing.assert_allclose(draw(init="unit_uniform") / scale, 0.5 * (1 + uniform), atol=1e-12)
    np.testing.assert_array_equal(draw(init=prior), prior)


@pytest.mark.parametrize(
  "times", [[1.0], [1.1, 0.5], [1.0, 0.5, 0.6], [1.0, -0.1], [1.0, float("nan")]]
)
def test_grids_that_leave_the_interval_or_turn_back_are_refused(times):
  sde = make_sde("vp")
  run = {"step": sampling.ddim(sde), "times": jnp.asarray(times)}
  with pytest.raises(ConfigError, match=r"times = .*\n  legal: 2 or more times"):
    sample(jax.random.key(0), sde, LAW.noise_fn(sde), (2, 2), **run)


def test_latents_are_interpolated_along_the_arc(x64):
  """Ends exactly, equal angles between neighbours, norms kept; parallel latents on a line."""
  a = jnp.array([[3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
  b = jnp.array([[0.0, 0.0, 3.0, 0.0], [2.0, 2.0, 0.0, 0.0]])
  path = sampling.interpolate(a.reshape(2, 2, 2), b.reshape(2, 2, 2), 5)
  assert path.shape == (5, 2, 2, 2)
  path = path.reshape(5, 2, 4)
  np.testing.assert_allclose(path[0], a, atol=1e-15)
  np.testing.assert_allclose(path[-1], b, atol=1e-15)
  np.testing.assert_allclose(jnp.linalg.norm(path[:, 0], axis=1), 3.0)
  np.testing.assert_allclose((path[1:, 0] * path[:-1, 0]).sum(1), 9 * np.cos(np.pi / 8))
  np.testing.assert_allclose(path[:, 1, 0], [1.0, 1.25, 1.5, 1.75, 2.0])


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda sde: sampling.dpm_solver(sde, order=4), ["order = 4", "1 or 2"]),
    (lambda sde: sampling.predictor_corrector(sde, predictor="x"), ["predictor", "'ddim'"]),
    (lambda sde: sampling.predictor_corrector(sde, corrector="x"), ["corrector", "'ald'"]),
    (lambda sde: sampling.ancestral(sde, "small"), ["variance", "'learned'", "'posterior'"]),
    (
      lambda sde: sampling.langevin_step(jax.random.key(0), jnp.ones(1), jnp.ones(1), 1.0, "x"),
      ["convention", "'report'"],
    ),
    (lambda sde: time_grid(sde, 9, "trained"), ["spacing = 'trained'", "levels"]),
    (lambda sde: time_grid(make_sde("ncsn"), 10, "trained"), ["spacing = 'trained'", "has 10"]),
  ],
)
def test_unusable_options_are_named(call, words):
  with pytest.raises(ConfigError) as error:
    call(make_sde("vp"))
  assert all(word in str(error.value) for word in words), str(error.value)
