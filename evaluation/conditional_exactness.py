"""Guidance against closed-form conditional laws: python -m evaluation.conditional_exactness
[samples].

A Gaussian, a mixture and small colour images with their exact scores: the mean, the covariance and
the weight of a mode of every method of `guidance`, beside as many draws of the law itself (the
floor) and the exact conditional score in the same sampler (its discretisation). Prints the table
and writes docs/conditional_exactness.csv.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import guidance
import settings
from errors import check
from guidance import Condition
from operators import Operator, make_operator
from parameterization import NoiseFn
from sampling import ancestral, predictor_corrector, sample, time_grid
from sde_lib import SDE, example_keys, expand, make_sde, marginal, sample_prior

NUM_SAMPLES, NUM_STEPS, NUM_BLOCKS = 8192, 200, 32
MOST_PARTICLES = 256
QUICK = {"xla_backend_optimization_level": "1"}  # most of a row's time is its compile
PROCESSES = {
  "vp": {"t_min": 1e-4},
  "sub_vp": {"t_min": 1e-3},  # below, sigma(t) is near the rounding of x in float32
  "ve": {"sigma_max": 20.0},
  "edm": {},
}


@functools.cache
def process_and_times(name: str, num_steps: int) -> tuple[SDE, jax.Array]:
  """A process of `PROCESSES` and its grid."""
  sde = make_sde(name, **PROCESSES[name])
  return sde, time_grid(sde, num_steps, "log_snr")


class Mixture(NamedTuple):
  """sum_k weights_k N(means_k, covariances_k): [k], [k, D], [k, D, D] in float64."""

  weights: np.ndarray
  means: np.ndarray
  covariances: np.ndarray


def gaussian(mean, covariance) -> Mixture:
  """A mixture of one component."""
  return Mixture(np.ones(1), np.array([mean]), np.array([covariance]))


def component(law: Mixture, k: int) -> Mixture:
  """The law given the k-th class."""
  return gaussian(law.means[k], law.covariances[k])


def moments(law: Mixture) -> tuple[np.ndarray, np.ndarray]:
  """Mean [D] and covariance [D, D]."""
  mean = law.weights @ law.means
  away = law.means - mean
  return mean, np.tensordot(law.weights, law.covariances, 1) + (law.weights * away.T) @ away


def draws(law: Mixture, n: int, seed: int = 0) -> np.ndarray:
  """n exact draws [n, D]."""
  stream = np.random.default_rng(seed)
  k = stream.choice(len(law.weights), n, p=law.weights)
  variances, bases = np.linalg.eigh(law.covariances)
  roots = bases * np.sqrt(np.maximum(variances, 0))[:, None]
  return law.means[k] + np.einsum("nij,nj->ni", roots[k], stream.normal(size=law.means[k].shape))


def components(law: Mixture, x, alpha=1.0, sigma=0.0) -> tuple[jax.Array, jax.Array]:
  """Of x = alpha x_0 + sigma noise [b, D]: the joint log-density with each class, but for a
  constant, [b, k], and its gradient in x [b, k, D].
  """
  alpha, sigma = (jnp.reshape(c, (-1, 1, 1)) for c in (alpha, sigma))
  variances, bases = np.linalg.eigh(law.covariances)
  variances = alpha**2 * jnp.asarray(np.maximum(variances, 0))[None] + sigma**2
  bases = jnp.asarray(bases)
  away = x[:, None] - alpha * jnp.asarray(law.means)[None]
  along = jnp.einsum("bki,kij->bkj", away, bases, precision="highest")
  square = (along**2 / variances + jnp.log(variances)).sum(2)
  slope = -jnp.einsum("bkj,kij->bki", along / variances, bases, precision="highest")
  return jnp.log(jnp.asarray(law.weights))[None] - 0.5 * square, slope


def class_log_prob(law: Mixture, sde: SDE) -> Callable:
  """(x, t) -> log p(class | x_t) [b, k]."""
  return lambda x, t: jax.nn.log_softmax(components(law, x, *marginal(sde, t))[0])


def noise_fn(law: Mixture, sde: SDE, classes: bool = False) -> NoiseFn:
  """The exact noise prediction; with `classes` that of the component of the label, k for none."""

  def noise(x, t, labels=None):
    logits, slopes = components(law, x.reshape(len(x), -1), *marginal(sde, t))
    if classes:
      k = logits.shape[1]
      meant = (labels[:, None] == jnp.arange(k)[None]) | (labels[:, None] == k)
      logits = jnp.where(meant, logits, -jnp.inf)
    score = (jax.nn.softmax(logits)[:, :, None] * slopes).sum(1)
    return -expand(marginal(sde, t)[1], x) * score.reshape(x.shape)

  return noise


class Problem(NamedTuple):
  """Draws of `law`, examples of `shape`, given y = A x_0 + noise_std n [*m]."""

  name: str
  law: Mixture
  shape: tuple[int, ...]
  operator: Operator
  measurement: np.ndarray
  noise_std: float = 0.0


def conditional(problem: Problem) -> tuple[Mixture, np.ndarray]:
  """The law of x_0 given y, and a basis [D, d] of the directions that y leaves open.

  Each component is conditioned as a Gaussian; its weight is multiplied by its density of y.
  """
  law, d, rank_tolerance = problem.law, problem.law.means.shape[1], 1e-5
  units = jnp.asarray(np.eye(d).reshape(d, *problem.shape), jnp.float32)
  matrix = np.asarray(problem.operator.forward(units), np.float64).reshape(d, -1).T
  left, gains, right = np.linalg.svd(matrix)
  rank = (gains > rank_tolerance).sum()
  a = gains[:rank, None] * right[:rank]
  error = left[:, :rank].T @ problem.measurement.ravel() - law.means @ a.T
  cross = law.covariances @ a.T
  variance = a @ cross + problem.noise_std**2 * np.eye(rank)
  weighted = np.linalg.solve(variance, error[:, :, None])
  evidence = -0.5 * ((error * weighted[:, :, 0]).sum(1) + np.linalg.slogdet(variance)[1])
  weights = law.weights * np.exp(evidence - evidence.max())
  means = law.means + (cross @ weighted)[:, :, 0]
  lost = cross @ np.linalg.solve(variance, cross.swapaxes(1, 2))
  basis = np.eye(d) if problem.noise_std else right[rank:].T
  return Mixture(weights / weights.sum(), means, law.covariances - lost), basis


class Method(NamedTuple):
  """Noise function and step of a method, the size of its populations (0 of independent draws), and
  whether it starts from the noised measurement.
  """

  noise_fn: Callable  # (sde, problem) -> NoiseFn
  step: Callable = lambda sde, problem, y: ancestral(sde)  # y [n, *m]
  particles: int = 0
  replaces: bool = False


def _unconditional(sde, problem):
  return noise_fn(problem.law, sde)


def _exact(sde, problem):
  return noise_fn(conditional(problem)[0], sde)


def _null_space(sde, problem):
  return guidance.null_space(sde, _unconditional(sde, problem), problem.operator)


def _posterior(covariance):
  def hook(sde, problem):
    iterations = {"num_iterations": problem.measurement.size + 1}
    options = {"covariance": covariance, "noise_std": problem.noise_std} | iterations
    return guidance.posterior_guidance(
      sde, _unconditional(sde, problem), problem.operator, **options
    )

  return hook


def _wrapped(wrapper, inner=ancestral, **options):
  return lambda sde, problem, y: wrapper(sde, inner(sde), problem.operator, y, **options)


def _smc(particles):
  def step(sde, problem, y):
    options = {"num_particles": particles, "noise_std": problem.noise_std}
    return guidance.smc(sde, problem.operator, y, **options)

  return Method(_unconditional, step, particles)


def _replacement(wrapper, **options):
  return Method(_null_space, _wrapped(wrapper, **options), replaces=True)


EXACT = "exact conditional score"
METHODS = {
  EXACT: Method(_exact),
  f"{EXACT} (predictor-corrector)": Method(_exact, lambda sde, *_: predictor_corrector(sde)),
  "null space": Method(_null_space),
  "replacement": _replacement(guidance.replacement),
  "replacement (predictor-corrector)": _replacement(
    guidance.replacement, inner=predictor_corrector
  ),
  "RePaint (5 times)": _replacement(guidance.repaint, num_resamplings=5),
  "RePaint (20 times)": _replacement(guidance.repaint, num_resamplings=20),
  "DPS (step 0.1)": Method(_unconditional, _wrapped(guidance.dps, step_size=0.1)),
  "DPS (step 0.3)": Method(_unconditional, _wrapped(guidance.dps, step_size=0.3)),
  "DPS (step 1)": Method(_unconditional, _wrapped(guidance.dps, step_size=1.0)),
  "Pi-GDM": Method(_posterior("isotropic")),
  "moment matching": Method(_posterior("tweedie")),
  "SMC (1 particle)": _smc(1),
  **{f"SMC ({particles} particles)": _smc(particles) for particles in (4, 16, 64, MOST_PARTICLES)},
}
BRIEF = (EXACT, "replacement", "Pi-GDM", "moment matching", "SMC (64 particles)")
OF_NOISY = (EXACT, "Pi-GDM", "moment matching", *(name for name in METHODS if "SMC" in name))


def solve(process: str, problem: Problem, method: Method, n: int, num_steps: int = NUM_STEPS):
  """(n draws [n, D] by the method, network evaluations, max |A x - y| where y has no noise)."""
  operator, keys = problem.operator, example_keys(jax.random.key(0), n)
  sde, times = process_and_times(process, num_steps)
  times = jnp.append(times, times[-1]) if method.particles else times
  y = jnp.asarray(np.tile(problem.measurement, (n, *[1] * problem.measurement.ndim)), jnp.float32)
  init = sample_prior(keys, sde, (n, *problem.shape))
  if method.replaces:
    others = example_keys(jax.random.key(1), n)
    init = guidance.noised_measurement(others, sde, operator, init, y, sde.t_max)
  guided = method.noise_fn(sde, problem)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(keys, init, y):
    given = {"step": method.step(sde, problem, y), "times": times, "labels": Condition(y)}
    x, nfe = sample(keys, sde, guided, init.shape, init=init, **given)
    x = x if problem.noise_std else guidance.consistent(operator, x, y)
    return x.reshape(n, -1), nfe, jnp.abs(operator.forward(x) - y).max()

  x, nfe, error = jax.device_get(run(keys, init, y))
  return x, int(nfe), None if problem.noise_std else float(error)


class Errors(NamedTuple):
  """Errors of draws in coordinates in which their law has covariance I: |mean|, |covariance - I| /
  sqrt(d) in the Frobenius norm, and the weight of a mode; the standard error of each.
  """

  mean: float
  covariance: float
  weight: float
  standard_errors: tuple[float, float, float]


def errors_of(
  x: np.ndarray, law: Mixture, basis: np.ndarray, posterior: np.ndarray, particles: int = 0
) -> Errors:
  """Of draws x [n, D], populations of consecutive `particles`, against the law along the basis.
  The standard error of a norm that is zero but for chance is too large, not too small.

  Args:
    posterior: probability of the mode at each draw [n]; its mean is the weight.
  """
  mean, covariance = moments(law)
  root = np.linalg.cholesky(basis.T @ covariance @ basis)
  z = np.linalg.solve(root, basis.T @ (x - mean).T).T
  d = z.shape[1]
  products = (z[:, :, None] * z[:, None]).reshape(len(z), -1)
  features = np.concatenate([np.ones((len(z), 1)), z, products, posterior[:, None]], 1)
  populations = features.reshape(-1, max(particles, 1), features.shape[1]).sum(1)
  blocks = np.array_split(populations, min(NUM_BLOCKS, len(populations)))
  sums = np.stack([block.sum(0) for block in blocks])

  def statistics(total):
    total = total / total[0]
    center, second = total[1 : d + 1], total[d + 1 : -1].reshape(d, d)
    spread = second - np.outer(center, center) - np.eye(d)
    return np.array([np.linalg.norm(center), np.linalg.norm(spread) / np.sqrt(d), total[-1]])

  without = np.stack([statistics(sums.sum(0) - block) for block in sums])
  scale = np.sqrt((len(sums) - 1) / len(sums))  # the jackknife over blocks of populations
  standard_errors = scale * np.sqrt(((without - without.mean(0)) ** 2).sum(0))
  return Errors(*map(float, statistics(sums.sum(0))), tuple(map(float, standard_errors)))


def _laws() -> dict[str, Mixture]:
  stream = np.random.default_rng(0)
  basis = np.linalg.qr(stream.normal(size=(4, 4)))[0]
  full = basis * np.array([0.2, 1.5, 0.6, 0.05]) @ basis.T
  means = [[0.6, -0.2, 1.0, -0.8], [0.2, 0.4, -0.6, 0.9], [-1.5, -1.0, 1.0, -1.2]]
  near = np.array([0.8, 0.5, 0.0])[:, None, None] ** np.abs(np.subtract.outer(range(4), range(4)))
  pixels = 0.5 ** np.abs(np.subtract.outer(range(2), range(2)))
  colours = np.array([[0.3, 0.2, 0.05], [0.2, 0.25, 0.1], [0.05, 0.1, 0.2]])
  image = np.kron(np.kron(pixels, pixels), colours)
  return {
    "Gaussian": gaussian([0.5, -1.0, 0.3, 2.0], full),
    "mixture": Mixture(np.array([0.5, 0.2, 0.3]), np.array(means), 0.1 * near),
    "images": gaussian(np.tile([0.3, 0.0, -0.2], 4), image),
  }


LAWS = _laws()
ASKED = 1  # the class that class guidance asks for, and the mode whose weight is reported
# law: an example that is measured
EXAMPLES = {
  "Gaussian": [1.0, -0.2, 0.9, 1.4],
  "mixture": [0.4, 0.1, 0.2, 0.1],
  "images": [0.5, 0.1, 0.2, -0.3, 0.0, 0.4, 0.2, 0.1, -0.6, 0.6, 0.3, 0.0],
}
# name: (operator, its options, std of the noise of y)
MEASUREMENTS = {
  "inpainting": ("inpainting", {"mask": "box:2,2"}, 0.0),
  "super-resolution": ("super_resolution", {"factor": 2}, 0.0),
  "inpainting with noise 0.3": ("inpainting", {"mask": "box:2,2"}, 0.3),
  "colorization": ("colorization", {}, 0.0),
}


def make_problem(law: str, measurement: str) -> Problem:
  """The example of a law, measured."""
  name, options, noise_std = MEASUREMENTS[measurement]
  shape = (2, 2, 3) if law == "images" else (4,)
  operator = make_operator(name, shape, **options)
  example = jnp.asarray(np.reshape(EXAMPLES[law], (1, *shape)), jnp.float32)
  measured = np.asarray(operator.forward(example)[0], np.float64)
  return Problem(f"{law}: {measurement}", LAWS[law], shape, operator, measured, noise_std)


class Row(NamedTuple):
  """One line of the table; `identity` is the largest error of what holds exactly: known values, A x
  = y, or the formula of classifier-free guidance.
  """

  problem: str
  process: str
  method: str
  evaluations: int
  mean_error: float
  mean_se: float
  covariance_error: float
  covariance_se: float
  weight: float
  weight_se: float
  weight_exact: float
  identity: float | None


def make_row(labels, nfe, x, law, basis, prior, identity=None, particles=0) -> Row:
  """The row of draws x [n, D], against their law; a law of one component has weight 1."""
  mode = min(ASKED, len(prior.weights) - 1)
  posterior = np.asarray(jax.nn.softmax(components(prior, jnp.asarray(x))[0]))[:, mode]
  *values, standard_errors = errors_of(x, law, basis, posterior, particles)
  numbers = [number for pair in zip(values, standard_errors) for number in pair]
  exact = float(law.weights[min(mode, len(law.weights) - 1)])
  return Row(*labels, nfe, *numbers, exact, identity)


def problem_rows(
  problem: Problem, process: str, names, n: int, num_steps: int = NUM_STEPS
) -> Iterator[Row]:
  """The rows of these methods, first that of exact draws."""
  law, basis = conditional(problem)
  against = law, basis, problem.law
  if process == "vp":
    yield make_row((problem.name, "", "exact draws"), 0, draws(law, n), *against)
  for name in names:
    x, nfe, identity = solve(process, problem, METHODS[name], n, num_steps)
    labels = problem.name, process, name
    yield make_row(labels, nfe, x, *against, identity, particles=METHODS[name].particles)


def class_rows(process: str, n: int, num_steps: int = NUM_STEPS) -> Iterator[Row]:
  """Class guidance of the mixture by the exact p(class | x_t), or without a classifier."""
  (sde, times), law = process_and_times(process, num_steps), LAWS["mixture"]
  k = len(law.weights)
  log_prob, labels = class_log_prob(law, sde), jnp.full(n, ASKED)
  by_class = noise_fn(law, sde, classes=True)
  against = component(law, ASKED), np.eye(4), law

  def free_error(w):
    x, t = jax.random.normal(jax.random.key(2), (n, 4)), jnp.linspace(sde.t_min, sde.t_max, n)
    both = jnp.concatenate([labels, jnp.full(n, k)])
    own, none = jnp.split(by_class(jnp.tile(x, (2, 1)), jnp.tile(t, 2), both), 2)
    guided = guidance.classifier_free(sde, by_class, null_label=k, scale=w)(x, t, labels)
    return float(jnp.abs(guided - ((1 + w) * own - w * none)).max())

  @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
  def run(hook):
    given = {"step": ancestral(sde), "times": times, "labels": labels}
    return sample(jax.random.key(0), sde, hook, (n, 4), **given)

  hooks = {}
  for w in (1.0, 2.0):
    hook = guidance.classifier_guidance(sde, noise_fn(law, sde), log_prob, scale=w)
    hooks[f"classifier (scale {w:g})"] = hook, None
  for w in (0.0, 1.0):
    hook = guidance.classifier_free(sde, by_class, null_label=k, scale=w)
    hooks[f"classifier-free (scale {w:g})"] = hook, free_error(w)
  if process == "vp":
    name = f"mixture: class {ASKED}", "", "exact draws"
    yield make_row(name, 0, draws(against[0], n), *against)
  for name, (hook, identity) in hooks.items():
    x, nfe = jax.device_get(run(hook))
    yield make_row((f"mixture: class {ASKED}", process, name), int(nfe), x, *against, identity)


def table(n: int) -> Iterator[Row]:
  """All rows, one by one."""
  for law in ("Gaussian", "mixture"):
    for measurement in ("inpainting", "super-resolution"):
      yield from problem_rows(make_problem(law, measurement), "vp", METHODS, n)
      others = ("sub_vp", "ve", "edm") if measurement == "inpainting" else ()
      for process in others:
        yield from problem_rows(make_problem(law, measurement), process, BRIEF, n)
    yield from problem_rows(make_problem(law, "inpainting with noise 0.3"), "vp", OF_NOISY, n)
  yield from problem_rows(make_problem("images", "colorization"), "vp", BRIEF, n)
  for process in PROCESSES:
    yield from class_rows(process, n)


HEADER = f"""\
{"":<8}{"":<46}{"":>5}{"error of":>11}{"error of":>19}{"weight of the":>19}{"worst of what":>27}
{"process":<8}{"method":<46}{"NFE":>5}{"the mean":>11}{"the covariance":>19}{"second mode":>19}\
{"holds exactly":>27}"""


def line(row: Row) -> str:
  """A row of the printed table."""
  pair = lambda value, se: f"{value:>11.3f} ± {se:.3f}"
  weight = f"{pair(row.weight, row.weight_se)} ({row.weight_exact:.3f})"
  identity = "" if row.identity is None else f"{row.identity:.1e}"
  numbers = pair(row.mean_error, row.mean_se) + pair(row.covariance_error, row.covariance_se)
  shown = weight if "mixture" in row.problem else ""
  return f"{row.process:<8}{row.method:<46}{row.evaluations:>5}{numbers}{shown:<29}{identity:>9}"


def main() -> None:
  """Prints the table and saves it."""
  n = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_SAMPLES
  legal = f"a multiple of {2 * MOST_PARTICLES}: populations of {MOST_PARTICLES} particles"
  check(n > 0 and n % (2 * MOST_PARTICLES) == 0, "samples", n, legal)
  print(f"{n} draws by {NUM_STEPS} steps, errors in coordinates of unit covariance\n{HEADER}")
  rows = []
  for row in table(n):
    if not rows or rows[-1].problem != row.problem:
      print(row.problem)
    print(line(row), flush=True)
    rows.append(row)
  show = lambda v: "" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v)
  text = [",".join(Row._fields), *[",".join(map(show, row)) for row in rows]]
  settings.write_text(Path("docs/conditional_exactness.csv"), "\n".join(text) + "\n")


if __name__ == "__main__":
  main()
