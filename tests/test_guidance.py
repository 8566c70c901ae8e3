"""Guidance against closed forms: conditional laws of Gaussians, components of mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import Gaussian, Mixture, diagonal, rotated

import guidance
import sampling
from errors import ConfigError
from guidance import Condition
from operators import inpainting, super_resolution
from parameterization import make_score_fn
from sampling import SAMPLERS, State, sample, sample_ode, sample_sde, time_grid
from sde_lib import example_keys, make_sde, marginal, sample_prior

PROCESSES = {"vp": {}, "sub_vp": {}, "ve": {"sigma_max": 20.0}, "edm": {}, "rectified": {}}
processes = pytest.mark.parametrize("name", PROCESSES)
LAW = rotated([0.5, -1.0, 0.3, 2.0], [0.2, 1.5, 0.6, 0.05])
X0 = np.array([[1.0, -0.2, 0.9, 1.4]])
MIXTURE = Mixture(
  np.array([[0.2, 0.5, 0.3]]), np.array([[1.0, 0.0], [-1.0, 0.5], [0.3, -2.0]]), 0.1
)
BOX = "box:0,2"  # missing
OPERATORS = {
  "inpainting": lambda: inpainting((4,), BOX),
  "super_resolution": lambda: super_resolution((4,), 2),
}
operators = pytest.mark.parametrize("operator", OPERATORS)


def make(name):
  return make_sde(name, **PROCESSES[name])


def times_of(sde):
  """Two times inside, as multiples of the range of log-SNR."""
  return np.asarray(time_grid(sde, 4, "log_snr"))[1:4:2]


def conditional(law, operator, y, noise_std):
  """N(m, C) of x_0 given y = A x_0 + noise_std n, as a `Gaussian`."""
  covariance = np.asarray(law.basis * law.variances @ law.basis.T)
  a = np.asarray(operator.forward(jnp.eye(4))).T
  gain = covariance @ a.T @ np.linalg.pinv(a @ covariance @ a.T + noise_std**2 * np.eye(len(a)))
  mean = law.mean[0] + gain @ (np.asarray(y)[0] - a @ np.asarray(law.mean[0]))
  variances, basis = np.linalg.eigh(covariance - gain @ a @ covariance)
  return Gaussian(mean[None], np.maximum(variances, 0.0)[None], basis)


@processes
@operators
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_moment_matching_is_the_conditional_score_of_a_gaussian(x64, name, operator, noise_std):
  sde, operator = make(name), OPERATORS[operator]()
  y, x = operator.forward(jnp.asarray(X0)), jax.random.normal(jax.random.key(0), (5, 4))
  exact = conditional(LAW, operator, y, noise_std).noise_fn(sde)
  options = {"covariance": "tweedie", "noise_std": noise_std}
  hook = guidance.posterior_guidance(sde, LAW.noise_fn(sde), operator, **options)
  for t in times_of(sde):
    given = hook(x, t, Condition(jnp.broadcast_to(y, (5, *y.shape[1:]))))
    np.testing.assert_allclose(given, exact(x, t), rtol=1e-6, atol=1e-8)


@processes
@operators
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_pigdm_is_exact_for_isotropic_data(x64, name, operator, noise_std):
  sde, operator, law = make(name), OPERATORS[operator](), diagonal([0.0] * 4, [0.49] * 4)
  y, x = operator.forward(jnp.asarray(X0)), jax.random.normal(jax.random.key(0), (5, 4))
  exact = conditional(law, operator, y, noise_std).noise_fn(sde)
  options = {"data_std": 0.7, "noise_std": noise_std}
  hook = guidance.posterior_guidance(sde, law.noise_fn(sde), operator, **options)
  for t in times_of(sde):
    given = hook(x, t, Condition(jnp.broadcast_to(y, (5, *y.shape[1:]))))
    np.testing.assert_allclose(given, exact(x, t), rtol=1e-6, atol=1e-8)


def class_log_prob(sde):
  """The exact log p(component | x_t)."""

  def log_prob_fn(x, t):
    return jax.nn.log_softmax(MIXTURE._noised(x, *marginal(sde, t))[2])

  return log_prob_fn


def component(k):
  return diagonal(list(MIXTURE.means[k]), [MIXTURE.variance] * 2)


@processes
def test_classifier_guidance_is_the_score_of_the_class(x64, name):
  sde, labels = make(name), jnp.array([0, 2, 1, 2])
  x = jax.random.normal(jax.random.key(1), (4, 2))
  plain = MIXTURE.noise_fn(sde)
  guided = guidance.classifier_guidance(sde, plain, class_log_prob(sde))
  twice = guidance.classifier_guidance(sde, plain, class_log_prob(sde), scale=2.0)
  for t in times_of(sde):
    exact = jnp.stack([component(int(k)).noise_fn(sde)(x, t)[i] for i, k in enumerate(labels)])
    np.testing.assert_allclose(guided(x, t, labels), exact, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(twice(x, t, labels), 2 * exact - plain(x, t), rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(guided(x, t, None), plain(x, t))


def two_branches(sde):
  """The exact conditional and, for label 3, unconditional noise, and the calls that it gets."""
  calls, of_class = [], [component(k).noise_fn(sde) for k in range(3)]

  def noise_fn(x, t, labels):
    calls.append(x.shape)
    parts = [noise(x, t) for noise in of_class]
    return jnp.stack([*parts, MIXTURE.noise_fn(sde)(x, t)])[labels, jnp.arange(len(x))]

  return noise_fn, calls


@processes
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_classifier_free_guidance_is_its_formula_by_one_call(name, scale):
  sde, labels = make(name), jnp.array([0, 2, 1, 2])
  x = jax.random.normal(jax.random.key(1), (4, 2))
  noise_fn, calls = two_branches(sde)
  guided = guidance.classifier_free(sde, noise_fn, null_label=3, scale=scale)
  for t in times_of(sde):
    t = jnp.full(4, t)
    conditional, free = noise_fn(x, t, labels), noise_fn(x, t, jnp.full(4, 3))
    del calls[:]
    np.testing.assert_array_equal(guided(x, t, labels), (1 + scale) * conditional - scale * free)
    assert calls == [(8, 2)]


def test_classifier_free_guidance_is_conditional_outside_its_interval():
  sde, labels, x = make("vp"), jnp.array([0, 1]), jnp.ones((2, 2))
  noise_fn, _ = two_branches(sde)
  interval = {"low": 0.5, "high": 2.0}
  guided = guidance.classifier_free(sde, noise_fn, null_label=3, scale=4.0, **interval)
  for level, inside in ((0.4, False), (0.6, True), (1.9, True), (2.1, False)):
    t = jnp.full(2, sampling.time_of_log_snr(sde, -2 * np.log(level)))
    same = np.allclose(guided(x, t, labels), noise_fn(x, t, labels), atol=1e-6)
    assert same == (not inside)


def with_variance(noise_fn):
  """The noise function of a network that predicts v too: here its first input value."""
  both = lambda x, t, labels=None: (noise_fn(x, t, labels), x[:, :1])
  predicts = lambda *at: both(*at)[0]
  predicts.with_variance = both
  return predicts


def test_the_predicted_variance_passes_every_hook():
  sde, x, labels = make("vp"), jax.random.normal(jax.random.key(0), (3, 2)), jnp.array([0, 1, 2])
  operator = inpainting((2,), "box:0,1")
  plain, two = with_variance(MIXTURE.noise_fn(sde)), with_variance(two_branches(sde)[0])
  condition = Condition(operator.forward(x))
  for hook, labels_ in (
    (guidance.classifier_guidance(sde, plain, class_log_prob(sde)), labels),
    (guidance.classifier_free(sde, two, null_label=3), labels),
    (guidance.null_space(sde, plain, operator), condition),
    (guidance.posterior_guidance(sde, plain, operator), condition),
  ):
    noise, v = jax.jit(hook.with_variance)(x, 0.3, labels_)
    np.testing.assert_array_equal(v, x[:, :1])
    np.testing.assert_array_equal(noise, jax.jit(hook)(x, 0.3, labels_))


@processes
@operators
def test_predicted_data_agree_with_the_measurement_in_the_null_space_form(x64, name, operator):
  sde, operator, x = make(name), OPERATORS[operator](), jax.random.normal(jax.random.key(0), (3, 4))
  y = jnp.broadcast_to(operator.forward(jnp.asarray(X0)), operator.forward(x).shape)
  t = times_of(sde)[0]
  plain = LAW.noise_fn(sde)
  hook = guidance.null_space(sde, plain, operator)
  data = lambda noise: sampling.data_from_noise(sde, x, noise, t)
  given, before = data(hook(x, t, Condition(y))), data(plain(x, t))
  np.testing.assert_allclose(operator.forward(given), y, atol=1e-10)
  null = lambda x: x - operator.pseudo_inverse(operator.forward(x))
  np.testing.assert_allclose(null(given), null(before), atol=1e-10)


def replaced_step(sde, t, s, n, wrap=guidance.replacement, **options):
  """One replacing step of n examples that are all at the same x at time t."""
  operator = inpainting((4,), BOX)
  y = jnp.broadcast_to(operator.forward(jnp.asarray(X0)), (n, 4))
  step = wrap(sde, sampling.ancestral(sde), operator, y, **options)
  x = jnp.broadcast_to(jnp.array([[0.3, -0.4, 0.2, 0.1]]), (n, 4))
  counted = sampling._Counted(LAW.noise_fn(sde), None)
  return step(example_keys(jax.random.key(3), n), counted, State(x, x), t, s), counted.calls


@processes
def test_row_79_what_is_measured_is_noised_to_the_end_of_the_step(x64, name):
  sde = make(name)
  t, s = times_of(sde)
  state, _ = replaced_step(sde, t, s, 20_000)
  alpha, sigma = marginal(sde, s)
  known = np.asarray(state.x)[:, 2:]
  np.testing.assert_allclose(known.mean(0), alpha * X0[0, 2:], atol=4 * sigma / np.sqrt(20_000))
  np.testing.assert_allclose(known.std(0), np.full(2, sigma), rtol=0.03)


def test_row_78_the_mean_of_a_step_holds_no_noise(x64):
  sde = make("ve")
  t, s = times_of(sde)
  state, _ = replaced_step(sde, t, s, 50)
  np.testing.assert_allclose(state.mean - state.mean[:1], 0.0, atol=1e-12)
  np.testing.assert_allclose(state.mean[:, 2:], np.repeat(X0[:, 2:], 50, 0), atol=1e-12)
  assert (np.asarray(state.x).std(0) > 0.5 * float(marginal(sde, s)[1])).all()


def test_row_80_the_start_is_noised_too(x64):
  sde, operator, n = make("vp"), inpainting((4,), BOX), 20_000
  keys, y = example_keys(jax.random.key(0), n), jnp.broadcast_to(jnp.asarray(X0), (n, 4))
  y = 50 * operator.forward(y)
  prior = sample_prior(keys, sde, (n, 4))
  other = example_keys(jax.random.key(1), n)
  x = guidance.noised_measurement(other, sde, operator, prior, y, sde.t_max)
  np.testing.assert_array_equal(x[:, :2], prior[:, :2])
  alpha, sigma = marginal(sde, sde.t_max)
  np.testing.assert_allclose(x[:, 2:].mean(0), 50 * alpha * X0[0, 2:], atol=4 / np.sqrt(n))
  np.testing.assert_allclose(x[:, 2:].std(0), np.full(2, sigma), rtol=0.03)


def test_repaint_with_one_resampling_is_replacement_and_each_costs_an_evaluation(x64):
  sde = make("vp")
  once, calls = replaced_step(sde, 0.5, 0.4, 50, guidance.repaint, num_resamplings=1)
  plain, _ = replaced_step(sde, 0.5, 0.4, 50)
  spread = lambda state: (state.x - state.mean)[:, :2].std()
  assert calls == 1
  np.testing.assert_allclose(once.mean, plain.mean, atol=1e-12)
  np.testing.assert_allclose(spread(once), spread(plain), rtol=0.3)
  assert replaced_step(sde, 0.5, 0.4, 3, guidance.repaint, num_resamplings=7)[1] == 7
  with pytest.raises(ConfigError, match="num_resamplings = 0"):
    replaced_step(sde, 0.5, 0.4, 3, guidance.repaint, num_resamplings=0)


def test_repaint_noises_back_by_the_forward_process(x64, monkeypatch):
  """With a step that forgets where it was, x_t has the law of q(x_t | x_s) alone."""
  sde, n, seen = make("sub_vp"), 20_000, []
  operator = inpainting((4,), BOX)
  y = jnp.zeros((n, 4))

  def to_one(key, noise_fn, state, t, s):
    seen.append(state.x)
    ones = jnp.ones_like(state.x)
    return State(ones, ones)

  monkeypatch.setattr(guidance, "repeat", lambda body, count, carry, _: body(0, carry))
  step = guidance.repaint(sde, to_one, operator, y, num_resamplings=2)
  start = State(y, y)
  step(example_keys(jax.random.key(0), n), None, start, 0.6, 0.5)
  (alpha_t, sigma_t), (alpha_s, sigma_s) = marginal(sde, 0.6), marginal(sde, 0.5)
  keep = alpha_t / alpha_s
  x = np.asarray(seen[1])[:, :2]
  np.testing.assert_allclose(x.mean(0), np.full(2, keep), atol=0.02)
  np.testing.assert_allclose(x.var(0), np.full(2, sigma_t**2 - (keep * sigma_s) ** 2), rtol=0.05)


def test_dps_is_its_gradient_by_the_evaluation_of_the_step(x64):
  """Of N(0, v I) data: E[x_0 | x] = g x, so the distance has the gradient -g (y - g x) / |.|."""
  sde, operator, v = make("vp"), inpainting((4,), BOX), 0.49
  law, calls = diagonal([0.0] * 4, [v] * 4), []

  def noise_fn(x, t, labels=None):
    calls.append(1)
    return law.noise_fn(sde)(x, t)

  x, t, s = jax.random.normal(jax.random.key(0), (3, 4)), 0.5, 0.4
  y = operator.forward(jnp.asarray(X0) + x)
  plain = sampling.ancestral(sde)
  keys = example_keys(jax.random.key(1), 3)
  step = guidance.dps(sde, plain, operator, y, step_size=0.7)
  counted = sampling._Counted(noise_fn, None)
  state = step(keys, counted, State(x, x), t, s)
  assert counted.calls == len(calls) == 1
  alpha, sigma = marginal(sde, t)
  g = alpha * v / (alpha**2 * v + sigma**2)
  error = y - operator.forward(g * x)
  gradient = -g * error / jnp.linalg.norm(error, axis=1, keepdims=True)
  before = plain(keys, counted, State(x, x), t, s)
  np.testing.assert_allclose(state.x, before.x - 0.7 * gradient, atol=1e-10)
  np.testing.assert_allclose(state.mean, before.mean - 0.7 * gradient, atol=1e-10)


def test_conjugate_gradients_solve_each_example(x64):
  rng = np.random.default_rng(0)
  roots = rng.normal(size=(3, 4, 4))
  matrices = jnp.asarray(roots @ roots.swapaxes(1, 2) * np.array([1.0, 100.0, 0.01])[:, None, None])
  b = jnp.asarray(rng.normal(size=(3, 4)))
  times = lambda v: jnp.einsum("bij,bj->bi", matrices, v)
  solution = guidance._conjugate_gradients(times, b, 12)
  np.testing.assert_allclose(
    solution, jnp.linalg.solve(matrices, b[:, :, None])[:, :, 0], rtol=1e-6
  )
  keep = jnp.array([[1.0, 1.0, 0.0, 0.0]])
  least = guidance._conjugate_gradients(lambda v: 4 * keep * v, keep * b, 12)
  np.testing.assert_allclose(least, keep * b / 4, atol=1e-12)


def test_systematic_resampling_keeps_the_expected_counts():
  weights = jnp.array([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])
  keys = lambda i: example_keys(jax.random.key(i), 2)
  counts = np.zeros((2, 4))
  for i in range(400):
    ancestors, after = guidance._resampled(keys(i), jnp.log(weights), jnp.array(True))
    counts += np.stack([np.bincount(row, minlength=4) for row in np.asarray(ancestors)])
    np.testing.assert_array_equal(after, 0.0)
  np.testing.assert_allclose(counts / 400, 4 * weights, atol=0.06)
  ancestors, after = guidance._resampled(keys(0), jnp.log(weights), jnp.array(False))
  np.testing.assert_array_equal(ancestors, np.tile(np.arange(4), (2, 1)))  # effective sizes 2.9, 4
  np.testing.assert_array_equal(after, jnp.log(weights))
  uneven = jnp.log(jnp.array([[0.97, 0.01, 0.01, 0.01]]))
  ancestors, after = guidance._resampled(keys(0)[:1], uneven, jnp.array(False))
  assert (np.asarray(ancestors)[0, :3] == 0).all()
  np.testing.assert_array_equal(after, 0.0)


def test_smc_weighs_the_proposal_by_the_model(x64):
  """The recorded ratio is log N(x_s; model) - log N(x_s; proposal) of the move that was made."""
  sde, operator, n = make("vp"), inpainting((4,), BOX), 6
  x, t, s = jax.random.normal(jax.random.key(0), (n, 4)), 0.5, 0.4
  y = jnp.broadcast_to(operator.forward(jnp.asarray(X0)), (n, 4))
  step = guidance.smc(sde, operator, y, num_particles=1)
  counted = sampling._Counted(LAW.noise_fn(sde), None)
  state = step(example_keys(jax.random.key(1), n), counted, State(x, x), t, s)
  data = LAW.denoise(x, *marginal(sde, t))
  mean, std = sampling.posterior(sde, x, data, t, s)
  square = lambda centre: (((state.x - centre) / std) ** 2).sum(1)
  ratio = -0.5 * square(mean) + 0.5 * square(state.mean)
  np.testing.assert_allclose(state.memory.ratio, ratio, rtol=1e-8)
  assert np.abs(np.asarray(state.mean - mean)).max() > 1e-3


def exact_hook(sde):
  return guidance.posterior_guidance(
    sde, LAW.noise_fn(sde), inpainting((4,), BOX), covariance="tweedie"
  )


def condition_of(n):
  return Condition(jnp.broadcast_to(inpainting((4,), BOX).forward(jnp.asarray(X0)), (n, 4)))


def draws(kind, sde, n, first=0):
  """Conditional draws first .. first + n - 1 by a sampler or a solve."""
  key, shape, given = jax.random.key(2), (n, 4), {"labels": condition_of(n), "first_index": first}
  score_fn = make_score_fn(sde, exact_hook(sde))
  if kind == "ode":
    return sample_ode(key, sde, score_fn, shape, rtol=1e-6, atol=1e-6, **given)[0]
  if kind == "sde":
    return sample_sde(key, sde, score_fn, shape, num_steps=60, spacing="log_snr", **given)[0]
  step, times = SAMPLERS[kind](sde), time_grid(sde, 60, "log_snr")
  return sample(key, sde, exact_hook(sde), shape, step=step, times=times, **given)[0]


@pytest.mark.parametrize("kind", ["ode", "sde", "ancestral", "unipc", "edm", "predictor_corrector"])
def test_a_hook_is_taken_by_every_kind_of_sampler(kind):
  sde, n = make("vp"), 2000
  x = np.asarray(jax.jit(lambda: draws(kind, sde, n))())
  law = conditional(LAW, inpainting((4,), BOX), inpainting((4,), BOX).forward(jnp.asarray(X0)), 0.0)
  std = np.sqrt(np.diag(law.basis * law.variances @ law.basis.T))
  np.testing.assert_allclose(x[:, 2:], np.repeat(X0[:, 2:], n, 0), atol=0.02)
  wide = 4 / np.sqrt(n) + (0.15 if kind == "predictor_corrector" else 0.03)
  assert (np.abs(x.mean(0) - law.mean[0])[:2] < wide * std[:2]).all()
  assert (np.abs(x.std(0)[:2] / std[:2] - 1) < wide + 0.05).all()


def test_an_example_does_not_depend_on_its_batch_mates(x64):
  sde = make("vp")
  many = jax.jit(lambda: draws("ancestral", sde, 8))()
  alone = jax.jit(lambda: draws("ancestral", sde, 1, 5))()
  np.testing.assert_allclose(alone[0], many[5], rtol=1e-9)


def test_row_85_replacement_runs_with_every_sampler():
  """And leaves what is known bit-equal; fresh noise enters it at every step."""
  sde, operator, n = make("vp"), inpainting((4,), BOX), 3
  condition = condition_of(n)
  options = {"annealed_langevin": {"step_lr": 1e-8, "num_steps": 2}}
  for name in SAMPLERS:
    step = SAMPLERS[name](sde, **options.get(name, {}))
    step = guidance.replacement(sde, step, operator, condition.measurement)
    hook, times = (
      guidance.null_space(sde, LAW.noise_fn(sde), operator),
      time_grid(sde, 3, "log_snr"),
    )
    key, given = jax.random.key(0), {"step": step, "times": times, "labels": condition}
    x, _ = sample(key, sde, hook, (n, 4), **given)
    x = guidance.consistent(operator, x, condition.measurement)
    np.testing.assert_array_equal(np.asarray(x)[:, 2:], np.float32(np.repeat(X0[:, 2:], n, 0)))
    assert np.isfinite(x).all()
