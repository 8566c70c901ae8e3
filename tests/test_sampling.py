"""Samplers on Gaussian data: steps are affine in (x, noise), so moments are propagated exactly."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PAPER, diagonal

import sampling
from dynamics import SOLVERS
from errors import ConfigError
from sampling import SAMPLERS, SDE_SOLVERS, State, ancestral, euler_maruyama, time_grid
from sde_lib import example_keys, fold_in, make_sde, sample_prior

names = pytest.mark.parametrize("name", PAPER)
MEAN, VARIANCE = 1.5, 0.3
LAW = diagonal([MEAN], [VARIANCE])


def euler_maruyama_closed_form(paper, t, s, m=MEAN, v=VARIANCE):
  """(a, b, c) of x_s = a x_t + b + c noise; the score is -(x - alpha m) / (alpha^2 v + sigma^2)."""
  pull = paper.g_squared(t) / paper.variance(t, v)
  a = 1 - (t - s) * (paper.f(t) + pull)
  return a, (t - s) * pull * paper.alpha(t) * m, np.sqrt((t - s) * paper.g_squared(t))


def ancestral_closed_form(paper, t, s, variance, m=MEAN, v=VARIANCE):
  """The same of a draw from q(x_s | x_t, x_0 = E[x_0 | x_t]), by x_t | x_s ~ N(k x_s, between)."""
  k = paper.alpha(t) / paper.alpha(s)
  between = paper.sigma(t) ** 2 - k**2 * paper.sigma(s) ** 2
  shrink = paper.sigma(s) ** 2 / paper.sigma(t) ** 2
  to_data = paper.alpha(s) * between / paper.sigma(t) ** 2
  gain = paper.alpha(t) * v / paper.variance(t, v)
  a, b = k * shrink + to_data * gain, to_data * m * (1 - gain * paper.alpha(t))
  return a, b, np.sqrt(between * {"posterior": shrink, "beta": 1.0}[variance])


# name: (SDE -> Step, (paper, t, s) -> (a, b, c))
STEPS = {
  "euler_maruyama": (euler_maruyama, euler_maruyama_closed_form),
  "posterior": (ancestral, lambda *a: ancestral_closed_form(*a, "posterior")),
  "beta": (
    lambda sde: ancestral(sde, variance="beta"),
    lambda *a: ancestral_closed_form(*a, "beta"),
  ),
}
steps = pytest.mark.parametrize("method", STEPS)


@pytest.fixture
def affine(monkeypatch):
  """Reads (a, b, c) off a step from times t to s [n]: x_t = 0, 1, 0 and noise = 0, 0, 1."""

  def read(sde, step, law, t, s):
    with monkeypatch.context() as patch:
      patch.setattr(sampling, "normal", lambda key, shape: jnp.array([[0.0], [0.0], [1.0]]))
      x = jnp.array([[0.0], [1.0], [0.0]])
      run = lambda t, s: step(None, law.noise_fn(sde), State(x, x), t, s).x[:, 0]
      b, one, noisy = np.asarray(jax.jit(jax.vmap(run, out_axes=1))(t, s))
    return one - b, b, noisy - b

  return read


def propagate(coefficients, mean, variance):
  """Mean and variance after the steps (a, b, c), one row a step."""
  moments = []
  for a, b, c in zip(*coefficients):
    mean, variance = a * mean + b, a**2 * variance + c**2
    moments.append((mean, variance))
  return np.array(moments)


def even_steps(sde, num_steps):
  """(t, s) of each of `num_steps` equal steps."""
  times = np.linspace(sde.t_max, sde.t_min, num_steps + 1)
  return times[:-1], times[1:]


def uneven_steps(sde, num_steps):
  """The same for steps that are equal in log-SNR."""
  times = np.asarray(jax.jit(lambda: time_grid(sde, num_steps, "log_snr"))())
  return times[:-1], times[1:]


@steps
@names
def test_moments_follow_the_closed_form_recursion(x64, affine, name, method):
  sde, paper, (make_step, closed_form) = make_sde(name), PAPER[name], STEPS[method]
  t, s = uneven_steps(sde, 20)
  ours = affine(sde, make_step(sde), LAW, t, s)
  expected = closed_form(paper, t, s)
  np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)
  start = 0.0, sde.prior_std**2
  np.testing.assert_allclose(propagate(ours, *start), propagate(expected, *start), rtol=1e-9)


@names
def test_posterior_variance_is_exact_for_a_point_mass(x64, affine, name):
  """From the exact law at t_max, seven coarse steps give N(alpha c, sigma^2) at every time."""
  sde, paper = make_sde(name), PAPER[name]
  t, s = even_steps(sde, 7)
  coefficients = affine(sde, ancestral(sde), diagonal([MEAN], [0.0]), t, s)
  moments = propagate(coefficients, paper.alpha(t[0]) * MEAN, paper.sigma(t[0]) ** 2)
  exact = np.stack([paper.alpha(s) * MEAN, paper.sigma(s) ** 2], axis=1)
  np.testing.assert_allclose(moments, exact, rtol=1e-9)


def test_beta_variance_is_exact_for_standard_normal_data(x64, affine):
  sde = make_sde("vp")
  step = ancestral(sde, variance="beta")
  coefficients = affine(sde, step, diagonal([0.0], [1.0]), *even_steps(sde, 7))
  moments = propagate(coefficients, 0.0, 1.0)
  np.testing.assert_allclose(moments, [[0.0, 1.0]] * 7, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
  "name, method, v",
  [
    ("vp", "euler_maruyama", VARIANCE),
    ("sub_vp", "euler_maruyama", VARIANCE),
    (
      "ve",
      "euler_maruyama",
      1e-4,
    ),  # the error's first order integrates to zero where v >> sigma_min^2
    ("vp", "posterior", VARIANCE),
    ("vp", "beta", VARIANCE),
    ("ve", "posterior", 1e-4),
  ],
)
def test_weak_order_is_one(x64, affine, name, method, v):
  """The error of the variance at t_min against the number of steps, from the exact law at t_max."""
  sde, paper, step = make_sde(name), PAPER[name], STEPS[method][0]
  ends, num_steps = np.array([sde.t_min, sde.t_max]), 500 * 2 ** np.arange(4)
  end, start = paper.variance(ends, v)
  grids = [even_steps(sde, int(n)) for n in num_steps]
  t, s = np.concatenate(grids, axis=1)
  coefficients = np.array(affine(sde, step(sde), diagonal([0.0], [v]), t, s))
  runs = np.split(coefficients, np.cumsum(num_steps)[:-1], axis=1)
  errors = [abs(propagate(run, 0.0, start)[-1, 1] - end) for run in runs]
  slope = np.polyfit(np.log(num_steps), np.log(errors), 1)[0]
  assert abs(slope + 1) < 0.1


@steps
def test_sample_runs_the_steps_of_the_grid(x64, monkeypatch, method):
  """With every noise set to 1 a sample is a number: the recursion's, for each way to end."""
  sde, paper, (make_step, closed_form) = make_sde("sub_vp"), PAPER["sub_vp"], STEPS[method]
  monkeypatch.setattr(sampling, "normal", lambda key, shape: jnp.ones(shape))
  t, s = uneven_steps(sde, 9)
  x = 0.7
  for a, b, c in zip(*closed_form(paper, t, s)):
    mean, x = a * x + b, a * x + b + c
  end = paper.alpha(1e-5), paper.sigma(1e-5)
  tweedie = float(LAW.denoise(jnp.full((1, 1), x), *end)[0, 0])
  law = jax.random.key(0), sde, LAW.noise_fn(sde), (1, 1)
  start = {"init": jnp.full((1, 1), 0.7)}
  options = {"step": make_step(sde), "times": jnp.append(t, s[-1]), **start}
  run = lambda: [
    sampling.sample(*law, denoise=denoise, **options)[0][0, 0]
    for denoise in (None, "mean", "tweedie")
  ]
  np.testing.assert_allclose(jax.jit(run)(), [x, mean, tweedie], rtol=1e-9)


def test_sample_uses_fresh_noise_at_every_step_and_example():
  sde, noises = make_sde("vp"), []

  def step(key, noise_fn, state, t, s):
    noise = sampling.normal(key, state.x.shape)
    jax.debug.callback(lambda z: noises.append(np.asarray(z)), noise)
    return State(noise, noise)

  options = {"step": step, "times": time_grid(sde, 4, "time")}
  prior = sampling.sample_trajectory(jax.random.key(0), sde, lambda *_: _, (3, 2), **options)[0]
  jax.effects_barrier()
  assert len(np.unique([prior, *noises])) == 5 * 3 * 2


def test_trajectory_holds_every_state_of_sample():
  sde, times = make_sde("vp"), time_grid(make_sde("vp"), 4, "time")
  law = jax.random.key(0), sde, LAW.noise_fn(sde), (3, 1)
  run = jax.jit(
    lambda: (
      sampling.sample_trajectory(*law, step=euler_maruyama(sde), times=times),
      sampling.sample(*law, step=euler_maruyama(sde), times=times)[0],
      sampling.sample(*law, step=euler_maruyama(sde), times=times[:-1], denoise=None)[0],
    )
  )
  states, end, before = run()
  assert states.shape == (5, 3, 1)
  np.testing.assert_allclose(states[-2:], [before, end], rtol=1e-6)


def twice(key, noise_fn, state, t, s):
  """A step of two evaluations."""
  return State(state.x + noise_fn(state.x, t) + noise_fn(state.x, s), state.x)


@pytest.mark.parametrize(
  "make_step, denoise, evaluations",
  [
    (ancestral, "tweedie", 6),
    (lambda sde: twice, "mean", 10),
  ],
)
def test_sample_counts_its_evaluations(executions, make_step, denoise, evaluations):
  sde = make_sde("vp")
  noise_fn = lambda x, t, labels: executions.mark(x)
  options = {"step": make_step(sde), "times": time_grid(sde, 5, "time"), "denoise": denoise}
  _, nfe = jax.jit(lambda key: sampling.sample(key, sde, noise_fn, (2, 1), **options))(
    jax.random.key(0)
  )
  assert nfe == executions.count() == evaluations


@pytest.mark.parametrize("sampler", ["euler_maruyama", "ancestral"])
def test_samples_do_not_depend_on_the_split_into_batches(sampler):
  """Examples 2 to 4 of a batch of five, and of a batch of three that starts with example 2."""
  sde = make_sde("vp")
  noise_fn = lambda x, t, labels: LAW.noise_fn(sde)(x - labels[:, None], t)
  options = {"step": SAMPLERS[sampler](sde), "times": time_grid(sde, 4, "time")}
  run = lambda labels, first_index: sampling.sample(
    jax.random.key(0),
    sde,
    noise_fn,
    (len(labels), 1),
    labels=labels,
    first_index=first_index,
    **options,
  )[0]
  whole, part = jax.jit(run)(jnp.arange(5), 0), jax.jit(run)(jnp.arange(2, 5), 2)
  np.testing.assert_allclose(part, whole[2:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", sorted(SDE_SOLVERS.keys() - {"euler", "heun"}))
def test_sample_sde_keys_its_examples_and_counts_its_evaluations(executions, solver):
  """Examples 2 to 4 of two overlapping batches; all examples are evaluated at once."""
  sde = make_sde("vp")
  score_fn = lambda x, t, labels: labels[:, None] - executions.mark(x)
  options = {"solver": solver, "num_steps": 5}
  run = jax.jit(
    lambda labels, first_index: sampling.sample_sde(
      jax.random.key(0), sde, score_fn, (5, 1), labels=labels, first_index=first_index, **options
    )
  )
  whole, nfe = run(jnp.arange(5), 0)
  assert nfe == executions.count() >= 5
  part, _ = run(jnp.arange(2, 7), 2)
  np.testing.assert_allclose(part[:3], whole[2:], rtol=1e-6, atol=1e-6)
  relabelled, _ = run(5 * jnp.arange(5), 0)
  np.testing.assert_array_equal((abs(relabelled - whole) > 0.1)[:, 0], np.arange(5) > 0)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_sample_ode_is_the_closed_form_flow_of_the_prior_draw(x64, executions, name):
  """Examples 3 and 4 of the key, whose prior draws the other samplers share."""
  sde, key = make_sde(name), jax.random.key(0)
  prior = sample_prior(fold_in(example_keys(key, 2, 3), 0), sde, (2, 1))
  options = {"solver": "dopri8", "rtol": 1e-9, "atol": 1e-9, "first_index": 3}
  score_fn = lambda x, t, labels: LAW.score_fn(sde)(executions.mark(x), t)
  x, nfe = sampling.sample_ode(key, sde, score_fn, (2, 1), **options)
  np.testing.assert_allclose(x, LAW.flow(sde, prior, sde.t_max, sde.t_min), rtol=0, atol=1e-6)
  assert nfe == executions.count() > 10


def test_sample_ode_never_returns_a_truncated_sample():
  sde = make_sde("vp")
  x, _ = sampling.sample_ode(jax.random.key(0), sde, LAW.score_fn(sde), (2, 1), max_steps=3)
  assert jnp.isnan(x).all()


def reverse_sde_closed_form(paper, solver, times):
  """(a, b, c) of Euler and Heun steps of the reverse SDE; Heun's stages share the noise."""
  t, s = times[:-1], times[1:]
  pull = [paper.g_squared(u) / paper.variance(u, VARIANCE) for u in (t, s)]
  slope = [-(paper.f(u) + p) for u, p in zip((t, s), pull)]
  shift = [p * paper.alpha(u) * MEAN for u, p in zip((t, s), pull)]
  g, h = [np.sqrt(paper.g_squared(u)) for u in (t, s)], t - s
  a, b, c = 1 + h * slope[0], h * shift[0], np.sqrt(h) * g[0]
  if solver == "euler":
    return a, b, c
  return (
    1 + h * (slope[0] + slope[1] * a) / 2,
    h * (shift[0] + shift[1] + slope[1] * b) / 2,
    np.sqrt(h) * (g[0] + g[1] + h * slope[1] * g[0]) / 2,
  )


class UnitNoise(diffrax.AbstractPath):
  """Stands in for a Brownian path: the increment over h is sqrt(h)."""

  t0 = t1 = None

  def evaluate(self, t0, t1=None, left=True, use_levy=False):
    return jnp.sqrt(t1 - t0) * jnp.ones(1)


@pytest.mark.parametrize("solver, evaluations", [("euler", 9), ("heun", 18)])
def test_sample_sde_runs_its_scheme(x64, monkeypatch, executions, solver, evaluations):
  """With unit noise a sample is a number: that of the recursion."""
  sde, paper = make_sde("sub_vp"), PAPER["sub_vp"]
  monkeypatch.setattr(diffrax, "UnsafeBrownianPath", lambda *_, **__: UnitNoise())
  score_fn = lambda x, t, labels: LAW.score_fn(sde)(executions.mark(x), t)
  options = {"solver": solver, "num_steps": 9, "init": jnp.full((1, 1), 0.7)}
  x, nfe = sampling.sample_sde(jax.random.key(0), sde, score_fn, (1, 1), **options)
  steps = zip(*reverse_sde_closed_form(paper, solver, np.linspace(sde.t_max, sde.t_min, 10)))
  expected = functools.reduce(lambda x, step: step[0] * x + step[1] + step[2], steps, 0.7)
  np.testing.assert_allclose(x, [[expected]], rtol=1e-9)
  assert nfe == executions.count() == evaluations


def test_sample_sde_draws_the_data():
  """5,000 samples by 256 Heun steps: the scheme's moments (bias 6e-5) within 4 standard errors."""
  sde, n = make_sde("vp"), 5000
  coefficients = reverse_sde_closed_form(PAPER["vp"], "heun", np.linspace(1.0, 1e-5, 257))
  mean, variance = propagate(coefficients, 0.0, 1.0)[-1]
  run = lambda key: sampling.sample_sde(key, sde, LAW.score_fn(sde), (n, 1), num_steps=256)[0]
  x = jax.jit(run)(jax.random.key(0))
  assert abs(np.sqrt(variance / VARIANCE) - 1) < 1e-4
  assert abs(x.mean() - mean) < 4 * np.sqrt(variance / n)
  assert abs(x.std() / np.sqrt(variance) - 1) < 4 / np.sqrt(2 * n)


@names
@pytest.mark.parametrize("spacing", ["time", "log_snr", "karras"])
def test_time_grid_decreases_from_t_max_to_t_min(name, spacing):
  sde = make_sde(name)
  times = jax.jit(lambda: time_grid(sde, 100, spacing))()
  assert times.shape == (101,) and (jnp.diff(times) < 0).all()
  assert times[0] == np.float32(sde.t_max) and times[-1] == np.float32(sde.t_min)


@names
def test_spacings(x64, name):
  sde, paper, u = make_sde(name), PAPER[name], np.linspace(0, 1, 12)
  most, least = paper.log_snr(np.array([sde.t_min, sde.t_max]))
  between = lambda low, high: high + u * (low - high)
  at = lambda spacing: np.asarray(jax.jit(lambda: time_grid(sde, 11, spacing))())
  np.testing.assert_allclose(at("time"), between(sde.t_min, sde.t_max), atol=1e-15)
  np.testing.assert_allclose(paper.log_snr(at("log_snr")), between(most, least), rtol=1e-9)
  low, high = np.exp(-0.5 * np.array([most, least]) / 7)
  r = np.exp(-0.5 * paper.log_snr(at("karras")))
  np.testing.assert_allclose(r, between(low, high) ** 7, rtol=1e-9)


def test_one_step_grid_is_the_two_ends():
  np.testing.assert_array_equal(time_grid(make_sde("ve"), 1, "karras"), [1.0, 0.0])


BAD = {
  "spacing": (lambda sde, args: time_grid(sde, 5, "linear"), sampling.SPACINGS),
  "num_steps": (lambda sde, args: time_grid(sde, 0, "time"), ["from 1 up"]),
  "variance": (lambda sde, args: ancestral(sde, variance="small"), ["posterior", "beta"]),
  "ode solver": (lambda sde, args: sampling.sample_ode(*args, solver="rk45"), SOLVERS),
  "sde solver": (lambda sde, args: sampling.sample_sde(*args, solver="em"), SDE_SOLVERS),
  "denoise": (
    lambda sde, args: sampling.sample(*args, step=twice, times=jnp.ones(2), denoise="yes"),
    ["mean", "tweedie", "None"],
  ),
}


@pytest.mark.parametrize("call, legal", BAD.values(), ids=BAD)
def test_unusable_options_list_the_legal_ones(call, legal):
  sde = make_sde("vp")
  with pytest.raises(ConfigError) as error:
    call(sde, (jax.random.key(0), sde, LAW.noise_fn(sde), (1, 1)))
  assert all(name in str(error.value) for name in legal)
