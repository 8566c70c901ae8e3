"""The table of exactness: its closed forms, its error bars, and what the table says of the
methods.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import Mixture as Isotropic
from analytic import rotated
from scipy.special import logsumexp

from errors import ConfigError
from evaluation import conditional_exactness as table
from evaluation.conditional_exactness import EXACT, LAWS, METHODS, PROCESSES, make_problem
from parameterization import data_from_noise
from sde_lib import make_sde, marginal, posterior

N, STEPS = 4096, 100
MOMENT = "moment matching"
GAUSSIAN = ("Gaussian", "inpainting"), ("Gaussian", "super-resolution"), ("images", "colorization")
NOISY = "inpainting with noise 0.3"
# of 100 ancestral steps with an exact score, as the rows of `EXACT` have it
MEAN_TOLERANCE, COVARIANCE_TOLERANCE = 0.03, 0.2


def log_density(law, x):
  """log of sum_k weights_k N(x; means_k, covariances_k) in numpy, but for a constant."""
  away = x[:, None] - law.means[None]
  square = np.einsum("bki,kij,bkj->bk", away, np.linalg.inv(law.covariances), away)
  log_det = np.linalg.slogdet(law.covariances)[1]
  return logsumexp(np.log(law.weights) - 0.5 * (square + log_det), axis=1)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_scores_are_those_of_the_laws(x64, process):
  sde, x = make_sde(process, **PROCESSES[process]), jax.random.normal(jax.random.key(0), (5, 4))
  full = rotated([0.5, -1.0, 0.3, 2.0], [0.2, 1.5, 0.6, 0.05])
  law = LAWS["mixture"]
  round_ = law._replace(covariances=np.tile(0.1 * np.eye(4), (3, 1, 1)))
  for t in (0.01, 0.3, 0.9):
    exact = full.noise_fn(sde)(x, t)
    np.testing.assert_allclose(table.noise_fn(LAWS["Gaussian"], sde)(x, t), exact, rtol=1e-9)
    exact = Isotropic(law.weights[None], law.means, 0.1).noise_fn(sde)(x, t)
    np.testing.assert_allclose(table.noise_fn(round_, sde)(x, t), exact, rtol=1e-9, atol=1e-12)


def test_the_class_probability_has_the_gradient_of_the_scores(x64):
  """sigma grad log p(k | x_t) = noise of the law - noise of the class; label 3 is no class."""
  sde, law = make_sde("sub_vp"), LAWS["mixture"]
  x, labels = jax.random.normal(jax.random.key(0), (4, 4)), jnp.array([0, 1, 2, 3])
  by_class = table.noise_fn(law, sde, classes=True)(x, 0.4, labels)
  free = table.noise_fn(law, sde)(x, 0.4)
  sigma = marginal(sde, 0.4)[1]
  for k in range(3):
    log_prob = lambda x, k=k: table.class_log_prob(law, sde)(x, 0.4)[:, k].sum()
    gradient = jax.grad(log_prob)(x)[k]
    np.testing.assert_allclose(sigma * gradient, free[k] - by_class[k], rtol=1e-8, atol=1e-10)
    own = table.noise_fn(table.component(law, k), sde)(x, 0.4)[k]
    np.testing.assert_allclose(by_class[k], own, rtol=1e-9)
  np.testing.assert_allclose(by_class[3], free[3], rtol=1e-9)


@pytest.mark.parametrize("law", ["Gaussian", "mixture"])
def test_the_conditional_law_is_bayes_rule(law):
  problem = make_problem(law, NOISY)
  given, basis = table.conditional(problem)
  x = np.random.default_rng(0).normal(size=(50, 4))
  measured = np.array([1, 1, 0, 0]) * x
  log_likelihood = -0.5 * ((problem.measurement - measured) ** 2).sum(1) / problem.noise_std**2
  rest = log_density(problem.law, x) + log_likelihood - log_density(given, x)
  np.testing.assert_allclose(rest, np.full(50, rest[0]), rtol=1e-5)
  np.testing.assert_array_equal(basis, np.eye(4))


@pytest.mark.parametrize(
  "problem", [*GAUSSIAN, ("mixture", "inpainting"), ("mixture", "super-resolution")]
)
def test_without_noise_it_is_the_limit_of_little_noise(problem):
  problem = make_problem(*problem)
  given, basis = table.conditional(problem)
  near, _ = table.conditional(problem._replace(noise_std=1e-4))
  for exact, limit in zip(given, near):
    np.testing.assert_allclose(exact, limit, atol=1e-5)
  forward = lambda x: np.asarray(problem.operator.forward(jnp.asarray(x, jnp.float32)))
  draws = table.draws(given, 100).reshape(-1, *problem.shape)
  np.testing.assert_allclose(forward(draws) - problem.measurement[None], 0.0, atol=1e-5)
  moved = forward(basis.T.reshape(-1, *problem.shape))
  np.testing.assert_allclose(moved, 0.0, atol=1e-6)
  assert len(moved) == len(given.means[0]) - np.linalg.matrix_rank(forward_matrix(problem))


def forward_matrix(problem):
  d = len(problem.law.means[0])
  units = jnp.eye(d, dtype=jnp.float32).reshape(d, *problem.shape)
  return np.asarray(problem.operator.forward(units)).reshape(d, -1)


def test_the_mixture_leaves_two_modes_open():
  for measurement in ("inpainting", "super-resolution"):
    weights = table.conditional(make_problem("mixture", measurement))[0].weights
    assert 0.2 < weights[0] < 0.8 and 0.2 < weights[1] < 0.8 and weights[2] < 1e-3


def test_error_bars_are_those_of_independent_populations():
  """Of repeated sets of exact draws: the spread of the estimates is the standard error."""
  law, n, sets = LAWS["mixture"], 1024, 200
  values, bars = [], []
  for seed in range(sets):
    x = 1.3 * np.repeat(table.draws(law, n // 4, seed), 4, axis=0) + 0.3
    posterior = np.asarray(jax.nn.softmax(table.components(law, jnp.asarray(x))[0]))[:, 1]
    *numbers, standard_errors = table.errors_of(x, law, np.eye(4), posterior, 4)
    values.append(numbers)
    bars.append(standard_errors)
  np.testing.assert_allclose(np.mean(bars, 0), np.std(values, 0), rtol=0.2)


def test_errors_are_in_coordinates_of_unit_covariance():
  """A shift along an eigenvector by its std is 1; twice the covariance is 1."""
  law, n = LAWS["Gaussian"], 200_000
  mean, covariance = table.moments(law)
  variances, basis = np.linalg.eigh(covariance)
  x = mean + np.sqrt(2) * (table.draws(law, n) - mean) + np.sqrt(variances[0]) * basis[:, 0]
  errors = table.errors_of(x, law, np.eye(4), np.ones(n))
  np.testing.assert_allclose([errors.mean, errors.covariance], [1.0, 1.0], rtol=0.02)


@functools.cache
def solved(law, measurement, process, method):
  """(the row, the draws) of a method, short."""
  problem = make_problem(law, measurement)
  x, nfe, identity = table.solve(process, problem, METHODS[method], N, STEPS)
  given = *table.conditional(problem), problem.law, identity, METHODS[method].particles
  return table.make_row((problem.name, process, method), nfe, x, *given), x


def row(method, law="Gaussian", measurement="inpainting", process="vp"):
  return solved(law, measurement, process, method)[0]


def assert_exact(row):
  """Within four standard errors and the error of the steps."""
  assert row.mean_error < 4 * row.mean_se + MEAN_TOLERANCE
  assert row.covariance_error < 4 * row.covariance_se + COVARIANCE_TOLERANCE
  assert abs(row.weight - row.weight_exact) < 4 * row.weight_se + MEAN_TOLERANCE


def above(row, other):
  """Whether both errors of a row are above those of another, by four standard errors."""
  apart = lambda a, b, *se: a - b > 4 * np.hypot(*se)
  return apart(row.mean_error, other.mean_error, row.mean_se, other.mean_se) and apart(
    row.covariance_error, other.covariance_error, row.covariance_se, other.covariance_se
  )


@pytest.mark.parametrize("problem", [*GAUSSIAN, ("Gaussian", NOISY)])
def test_moment_matching_is_exact_on_a_gaussian(problem):
  """The draws are those of the exact conditional score, one by one."""
  found, x = solved(*problem, "vp", MOMENT)
  np.testing.assert_allclose(x, solved(*problem, "vp", EXACT)[1], atol=5e-3)
  assert_exact(found)


@pytest.mark.parametrize("process", ["sub_vp", "ve", "edm"])
def test_moment_matching_is_exact_for_every_process(process):
  assert_exact(row(MOMENT, process=process))


def test_replacement_is_biased_and_repaint_less():
  """The mean is off by 0.4 of a standard deviation and the covariance by 0.7 of itself."""
  plain, repaint = row("replacement"), row("RePaint (20 times)")
  assert abs(plain.mean_error - 0.39) < 4 * plain.mean_se + 0.02
  assert abs(plain.covariance_error - 0.70) < 4 * plain.covariance_se + 0.05
  assert above(plain, row(EXACT)) and above(plain, repaint)
  assert repaint.mean_error > 4 * repaint.mean_se
  assert repaint.evaluations == 20 * plain.evaluations


def law_of_the_chain(method, problem, num_steps):
  """Mean and covariance of the missing half that the affine steps lead to, carried on exactly."""
  sde, times = table.process_and_times("vp", num_steps)
  y, noise_fn = problem.measurement[:2], table.noise_fn(problem.law, sde)

  @jax.jit
  def ends(t, s):
    x = jnp.concatenate([jnp.zeros((1, 4)), jnp.eye(4)])
    data = data_from_noise(sde, x, noise_fn(x, t), t)
    data = data.at[:, :2].set(jnp.asarray(y)[None]) if method == "null space" else data
    return *posterior(sde, x, data, t, s), *marginal(sde, s)

  mean, covariance = np.zeros(4), np.eye(4)
  for t, s in itertools.pairwise(times):
    x, std, alpha, sigma = map(np.asarray, ends(t, s))
    matrix = (x[1:] - x[0]).T
    mean, covariance = x[0] + matrix @ mean, matrix @ covariance @ matrix.T
    last = mean[2:], covariance[2:, 2:]
    covariance = covariance + std**2 * np.eye(4)
    if method == "replacement":
      mean[:2], covariance[:2], covariance[:, :2] = alpha * y, 0.0, 0.0
      covariance[:2, :2] = sigma**2 * np.eye(2)
  return last


@pytest.mark.parametrize("method", ["replacement", "null space"])
def test_the_bias_is_that_of_the_affine_chain(method):
  """With few steps, when the noise of what is known matters most."""
  n = 2**15
  problem = make_problem("Gaussian", "inpainting")
  mean, covariance = law_of_the_chain(method, problem, 8)
  x = table.solve("vp", problem, METHODS[method], n, 8)[0][:, 2:]
  z = np.linalg.solve(np.linalg.cholesky(covariance), (x - mean).T)
  np.testing.assert_allclose(z.mean(1), 0.0, atol=4 / np.sqrt(n))
  np.testing.assert_allclose(np.cov(z), np.eye(2), atol=4 * np.sqrt(2 / n))


def test_smc_becomes_exact_with_particles():
  one, four, many = (row(f"SMC ({p})") for p in ("1 particle", "4 particles", "64 particles"))
  falls = lambda a, b: a.mean_error - b.mean_error > 4 * np.hypot(a.mean_se, b.mean_se)
  assert falls(one, four) and falls(one, many)
  assert one.mean_error > 2 * four.mean_error > 3 * many.mean_error
  assert_exact(many)


def test_smc_finds_the_weights_of_the_modes():
  biased, found = (
    row(name, "mixture") for name in ("Pi-GDM", f"SMC ({table.MOST_PARTICLES} particles)")
  )
  assert_exact(row(EXACT, "mixture"))
  assert_exact(found)
  assert biased.weight_exact - biased.weight > 0.3 > 20 * biased.weight_se


@pytest.mark.parametrize("method", [MOMENT, "SMC (64 particles)"])
def test_a_noisy_measurement(method):
  assert_exact(row(method, measurement=NOISY))
  biased = row("Pi-GDM", measurement=NOISY)
  assert biased.mean_error > 4 * biased.mean_se + 0.1


def test_what_is_measured_holds():
  assert row("replacement").identity == row(MOMENT).identity == 0.0
  assert row(MOMENT, "images", "colorization").identity <= 1e-6
  assert row(MOMENT, "Gaussian", "super-resolution").identity <= 1e-6


@pytest.mark.parametrize("process", PROCESSES)
def test_class_guidance_draws_the_law_of_the_class(process):
  rows = {row.method: row for row in table.class_rows(process, N // 2, STEPS)}
  exact, free = rows["classifier (scale 1)"], rows["classifier-free (scale 0)"]
  for found in (exact, free):
    assert found.weight >= 0.999 and found.weight_exact == 1.0
    assert_exact(found)
  np.testing.assert_allclose(exact[4:8], free[4:8], atol=2e-3)  # draw by draw the same
  assert rows["classifier-free (scale 1)"].identity == free.identity == 0.0
  sharper = rows["classifier (scale 2)"]
  assert sharper.weight >= 0.999 and sharper.mean_error > exact.mean_error + 4 * sharper.mean_se


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
  problem = make_problem("mixture", "inpainting")
  few = lambda n: table.problem_rows(problem, "vp", [EXACT], n, 3)
  monkeypatch.setattr(table, "table", few)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "docs").mkdir()
  monkeypatch.setattr("sys.argv", ["conditional_exactness", "512"])
  table.main()
  printed = capsys.readouterr().out.splitlines()
  text = (tmp_path / "docs" / "conditional_exactness.csv").read_text().splitlines()
  fields = [line.split(",") for line in text]
  assert {len(line) for line in fields} == {len(table.Row._fields)}
  assert [line[2] for line in fields] == ["method", "exact draws", EXACT]
  assert f"{float(fields[2][4]):.3f}" in printed[-1] and EXACT in printed[-1]
  monkeypatch.setattr("sys.argv", ["conditional_exactness", "100"])
  with pytest.raises(ConfigError, match="multiple of 512"):
    table.main()
