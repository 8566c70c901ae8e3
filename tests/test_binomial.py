"""The diffusion of bits against 2 x 2 matrices and sums over whole trajectories, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import binomial
from data import Transform
from errors import ConfigError
from likelihood import bits_per_dim
from sampling import State

BETAS = {
  "paper": [1 / 4, 1 / 3, 1 / 2, 1],
  "arbitrary": [0.1, 0.5, 0.03, 0.7],
  "erased": [0.2, 1.0, 0.3],
}
names = pytest.mark.parametrize("name", BETAS)
KEY = jax.random.key(0)


def chain(name, s, t):
  """P[i, j] = q(x_t = j | x_s = i): a product of the kernels of the steps after s, up to t."""
  kernels = [(1 - b) * np.eye(2) + b / 2 for b in BETAS[name][s:t]]
  return np.linalg.multi_dot([np.eye(2), np.eye(2), *kernels])


def pairs(name):
  """Every s < t: two arrays."""
  return np.array(list(itertools.combinations(range(len(BETAS[name]) + 1), 2))).T


def bayes(name, t, s):
  """B[i, k, j] = q(x_s = j | x_t = i, x_0 = k), by a sum over all trajectories from x_0 to x_t."""
  joint = np.zeros((2, 2, 2))
  for path in itertools.product([0, 1], repeat=t + 1):
    steps = [chain(name, i, i + 1)[path[i], path[i + 1]] for i in range(t)]
    joint[path[t], path[0], path[s]] += np.prod(steps)
  return joint / joint.sum(2, keepdims=True)


def cube(num_bits):
  """All values of an example: [2^D, D]."""
  return np.array(list(itertools.product([0, 1], repeat=num_bits)))


def tabulated(table):
  """The network whose P(x_0 = 1 | x_t) is `table` [T + 1, 2^D, D], rows in the order of `cube`."""

  def predict(x, t):
    digits = 2 ** jnp.arange(x.shape[1])[::-1]
    row = jnp.einsum("bd,d->b", x, digits.astype(x.dtype)).astype(int)
    return jnp.asarray(table)[jnp.broadcast_to(t, row.shape), row]

  return predict


def random_table(num_steps, num_bits):
  return np.random.default_rng(0).uniform(0.02, 0.98, (num_steps + 1, 2**num_bits, num_bits))


def law(num_bits):
  """An arbitrary data law over the cube, its bits dependent."""
  weights = np.random.default_rng(1).exponential(size=2**num_bits)
  return weights / weights.sum()


def exact_table(name, data):
  """P(x_0^d = 1 | x_t) under `data`, a law over the cube, for each t = 0 .. T: [T + 1, 2^D, D]."""
  num_bits = int(np.log2(len(data)))
  tables = [cube(num_bits).astype(float)]
  for t in range(1, len(BETAS[name]) + 1):
    joint = data[:, None] * forward(name, 0, t, num_bits)
    tables.append((joint / joint.sum(0)).T @ cube(num_bits))
  return np.stack(tables)


def forward(name, s, t, num_bits):
  """q(x_t | x_s) between whole examples: [2^D, 2^D]."""
  bits = cube(num_bits)
  return chain(name, s, t)[bits[:, None], bits[None]].prod(-1)


def reverse(name, table, t, num_bits):
  """p(x_{t-1} | x_t) between whole examples, [2^D x_t, 2^D x_{t-1}], from Bayes and the network."""
  bits, given = cube(num_bits), bayes(name, t, t - 1)
  rows = []
  for x_t, guess in zip(bits, table[t]):
    one = (1 - guess) * given[x_t, 0, 1] + guess * given[x_t, 1, 1]
    rows.append(np.where(bits, one, 1 - one).prod(1))
  return np.stack(rows)


def enumerated(name, table, num_bits):
  """(bound, NLL) of each x_0 by a sum over every trajectory x_1 .. x_T."""
  n, num_steps = 2**num_bits, len(BETAS[name])
  log_q, log_p = np.zeros((n,) * (num_steps + 1)), np.full((n,) * (num_steps + 1), -np.log(n))
  for t in range(1, num_steps + 1):
    place = [1] * (num_steps + 1)
    place[t - 1] = place[t] = n
    log_q += np.log(forward(name, t - 1, t, num_bits)).reshape(place)
    with np.errstate(divide="ignore"):
      log_p += np.log(reverse(name, table, t, num_bits).T).reshape(place)
  later = tuple(range(1, num_steps + 1))
  return (np.exp(log_q) * (log_q - log_p)).sum(later), -np.log(np.exp(log_p).sum(later))


def bound(name, table, num_bits, key=None):
  x0 = jnp.asarray(cube(num_bits), float)
  process, predict = binomial.Binomial(BETAS[name]), tabulated(table)
  return jax.jit(lambda x0: binomial.variational_bound(key, process, predict, x0))(x0)


def test_schedule_of_the_paper():
  """Each step erases a T-th of the signal and the last leaves none: A_t = 1 - t / T."""
  np.testing.assert_allclose(binomial.uniform_erasure(4).betas, BETAS["paper"], rtol=1e-15)
  process = binomial.uniform_erasure(1000)
  flips = binomial.flip_probability(process, jnp.array([0, 1, 500, 999, 1000]))
  np.testing.assert_allclose(flips, [0, 0.0005, 0.25, 0.4995, 0.5], rtol=1e-6)
  assert float(flips[-1]) == 0.5 and process.num_steps == 1000


@pytest.mark.parametrize("beta", [1e-6, 0.1, 0.5, 1.0])
def test_kernel_leaves_the_fair_coin_invariant(x64, beta):
  """As an average of its rows, and as the image of the probability 1/2."""
  process = binomial.Binomial([beta])
  kernel, fair = jax.jit(lambda x: binomial.transition(process, x, 1, 0))(
    jnp.array([[0.0, 1.0], [0.5, 0.5]])
  )
  np.testing.assert_allclose(kernel, [beta / 2, 1 - beta / 2], rtol=1e-12)
  assert np.asarray(kernel) @ [0.5, 0.5] == pytest.approx(0.5, abs=1e-15)
  np.testing.assert_allclose(fair, 0.5, atol=1e-15)


@names
def test_marginal_is_the_product_of_the_kernels(x64, name):
  """From step 0, from every earlier step, and with one time for each example."""
  process, (s, t) = binomial.Binomial(BETAS[name]), pairs(name)
  x = np.tile([0.0, 1.0], (len(t), 1))
  value = jax.jit(lambda *times: binomial.transition(process, jnp.asarray(x), *times))(t, s)
  expected = [chain(name, *pair)[:, 1] for pair in zip(s, t)]
  np.testing.assert_allclose(value, expected, atol=1e-12)
  keep = np.cumprod([1, *(1 - np.array(BETAS[name]))])[t][:, None]
  value = jax.jit(lambda t: binomial.marginal(process, jnp.asarray(x), t))(t)
  np.testing.assert_allclose(value, x * keep + (1 - keep) / 2, atol=1e-12)


@names
def test_posterior_is_bayes_rule_and_sums_to_one(x64, name):
  """Against sums over trajectories, for every s < t; then the mixture over an uncertain x_0."""
  process, (s, t) = binomial.Binomial(BETAS[name]), pairs(name)
  x_t, x0 = np.tile(cube(2).T[:, None], (1, len(t), 1)).astype(float)
  guess = np.tile([0.2, 0.7, 1.0, 0.4], (len(t), 1))
  expected = np.array([bayes(name, *pair)[..., 1] for pair in zip(t, s)])
  posterior = jax.jit(lambda x_t, x0, t, s=None: binomial.posterior(process, x_t, x0, t, s))
  one = posterior(x_t, x0, t, s)
  np.testing.assert_allclose(one, expected.reshape(-1, 4), atol=1e-12)
  np.testing.assert_allclose(one + posterior(1 - x_t, 1 - x0, t, s), 1, atol=1e-12)
  given_zero, given_one = np.repeat(expected, 2, axis=1).transpose(2, 0, 1)
  mixed = (1 - guess) * given_zero + guess * given_one
  np.testing.assert_allclose(posterior(x_t, guess, t, s), mixed, atol=1e-12)
  previous = posterior(x_t, x0, t)
  np.testing.assert_allclose(previous[s == t - 1], one[s == t - 1], atol=1e-12)


@names
def test_bound_is_above_the_exact_nll(x64, name):
  """Three dependent bits and any network: the bound is the sum over trajectories, term by term a
  divergence, at least -log p(x_0); on average over the data at least the entropy.
  """
  table, data = random_table(len(BETAS[name]), 3), law(3)
  expected, nll = enumerated(name, table, 3)
  terms = bound(name, table, 3)
  assert np.exp(-nll).sum() == pytest.approx(1, abs=1e-12)
  np.testing.assert_allclose(terms.total, expected, rtol=1e-10)
  assert terms.diffusion.shape == (8, len(BETAS[name]) - 1)
  assert all(np.all(np.asarray(term) >= 0) for term in terms)
  assert np.all(expected - nll > 1e-4)
  entropy = -data @ np.log(data)
  assert data @ bound(name, exact_table(name, data), 3).total > entropy + 1e-4


@names
def test_bound_is_exact_where_the_reverse_is(x64, name):
  """One bit and E[x_0 | x_t]: H(data) + KL(q(x_T) || fair coin) on average; -log p(x_0) for each
  x_0 where x_T is a fair coin.
  """
  data = np.array([0.83, 0.17])
  table = exact_table(name, data)
  total = np.asarray(bound(name, table, 1).total)
  last = data @ chain(name, 0, len(BETAS[name]))
  surplus = last @ np.log(2 * last)
  assert data @ total == pytest.approx(-data @ np.log(data) + surplus, abs=1e-12)
  if name != "arbitrary":
    np.testing.assert_allclose(total, -np.log(data), rtol=1e-12)
    np.testing.assert_allclose(enumerated(name, table, 1)[1], -np.log(data), rtol=1e-12)
  assert (surplus > 1e-3) == (name == "arbitrary")


def coin(process, p):
  """E[x_0 | x_t] of independent bits of law Bernoulli(p), `p` a number or one per bit."""

  def predict(x, t):
    p_ = jnp.broadcast_to(jnp.asarray(p, x.dtype), x.shape)
    flip = jnp.broadcast_to(binomial.flip_probability(process, t), x.shape[:1])
    agree = x * (1 - 2 * flip[:, None]) + flip[:, None]
    return p_ * agree / (p_ * agree + (1 - p_) * (1 - agree))

  return predict


def test_bound_of_a_thousand_steps_in_float32():
  """The terms are small differences: the sum of 1000 keeps five digits."""
  process, x0 = binomial.uniform_erasure(1000), jnp.array([[0.0], [1.0]])
  terms = jax.jit(lambda x: binomial.variational_bound(None, process, coin(process, 0.1), x))(x0)
  np.testing.assert_allclose(terms.total, -np.log([0.9, 0.1]), rtol=1e-5)


def test_bound_and_gradient_of_a_saturated_network_are_finite():
  process, x0 = binomial.uniform_erasure(3), jnp.array([[0.0, 1.0, 1.0]])
  wrong = lambda logit: lambda x, t: jax.nn.sigmoid(logit + 0 * x)
  total = lambda logit: binomial.variational_bound(KEY, process, wrong(logit), x0).total.sum()
  both = jax.jit(jax.value_and_grad(total))
  for logit in (-200.0, 200.0):
    value, slope = both(logit)
    assert value > 10 and np.isfinite(value) and np.isfinite(slope)


def test_rare_flips_in_float32():
  """A chance of 1e-9 to have been 0, which 1 - P(1) rounds to zero: the terms of float64."""
  wrong = lambda x, t: jnp.full_like(x, 0.999999)
  terms = []
  for wide in (False, True):
    with jax.enable_x64(wide):
      process = binomial.Binomial([0.02, 2e-7, 1.0])
      run = jax.jit(lambda x: binomial.variational_bound(None, process, wrong, x))  # noqa: B023
      terms.append(np.concatenate([np.ravel(part) for part in run(jnp.zeros((1, 1)))]))
  np.testing.assert_allclose(*terms, rtol=2e-3, atol=1e-7)


def test_bits_per_dim():
  """Fair coins cost one bit each, by the bound and by `bits_per_dim`."""
  process, x0 = binomial.uniform_erasure(3), jnp.asarray(cube(2), jnp.float32)
  fair = coin(process, 0.5)
  total = jax.jit(lambda x: binomial.variational_bound(None, process, fair, x).total)(x0)
  np.testing.assert_allclose(total / (2 * np.log(2)), 1, rtol=1e-6)
  np.testing.assert_allclose(bits_per_dim(-total, 2, Transform(2, -0.5, 1.5)), 1, rtol=1e-6)


def test_bound_by_draws_estimates_the_exact_bound():
  """The mean of 4000 estimates for one x_0: each term within 5 standard errors, of about 0.005."""
  n, table = 4000, random_table(4, 2)
  process, x0 = binomial.Binomial(BETAS["paper"]), jnp.tile(jnp.array([[1.0, 0.0]]), (n, 1))
  draw = jax.jit(lambda k: binomial.variational_bound(k, process, tabulated(table), x0))(KEY)
  exact = jax.tree.map(lambda term: term[2], bound("paper", table, 2))
  for drawn, expected in zip(map(np.asarray, draw), map(np.asarray, exact)):
    error = drawn.std(0) / np.sqrt(n)
    assert np.all(abs(drawn.mean(0) - expected) <= 5 * error + 1e-6)
    assert np.all(error < 0.03)


@names
def test_loss_is_unbiased_for_the_bound(x64, monkeypatch, name):
  """The mean of the loss over every t, and over every x_t by its probability, is the bound."""
  num_steps, n = len(BETAS[name]), 4
  process, table = binomial.Binomial(BETAS[name]), random_table(len(BETAS[name]), 2)
  t, x0, x_t = (grid.ravel() for grid in np.mgrid[1 : num_steps + 1, :n, :n])
  monkeypatch.setattr(binomial, "uniform_steps", lambda key, process, b: jnp.asarray(t))
  monkeypatch.setattr(binomial, "perturb", lambda *_: jnp.asarray(cube(2)[x_t], float))
  data = jnp.asarray(cube(2)[x0], float)
  loss = jax.jit(lambda x: binomial.variational_loss(KEY, process, tabulated(table), x))(data)
  weights = np.array([forward(name, 0, i, 2)[j, k] for i, j, k in zip(t, x0, x_t)]) / num_steps
  mean = (weights * np.asarray(loss)).reshape(num_steps, n, n).sum((0, 2))
  np.testing.assert_allclose(mean, enumerated(name, table, 2)[0], rtol=1e-10)


def test_random_steps_and_bits_have_their_laws():
  """6000 draws: each of the three steps, and each x_t, within 4 standard errors (under 0.007)."""
  n, process = 6000, binomial.Binomial(BETAS["erased"])
  t = jax.jit(lambda key: binomial.uniform_steps(key, process, n))(KEY)
  shares = np.bincount(t, minlength=5)[:5] / n
  np.testing.assert_allclose(shares, [0, 1 / 3, 1 / 3, 1 / 3, 0], atol=4 * np.sqrt(2 / 9 / n))
  x0 = jnp.tile(jnp.array([[0.0, 1.0]]), (n, 1))
  x_1 = np.asarray(jax.jit(lambda x: binomial.perturb(KEY, process, x, 1))(x0))
  assert set(np.unique(x_1)) == {0.0, 1.0}
  np.testing.assert_allclose(x_1.mean(0), [0.1, 0.9], atol=4 * np.sqrt(0.09 / n))


@pytest.mark.parametrize("times", [[4, 3, 2, 1, 0], [4, 1, 0], [4, 0]])
def test_sampler_reproduces_one_bit_exactly(x64, times):
  """The law of the state, propagated through the step's probabilities from the fair coin."""
  process, p = binomial.uniform_erasure(4), 0.83
  step, states, chance = binomial.ancestral(process), jnp.array([[0.0], [1.0]]), 0.5
  chances = jax.jit(lambda t, s: step(KEY, coin(process, p), State(states, states), t, s).mean)
  for t, s in itertools.pairwise(times):
    mean = np.asarray(chances(t, s))[:, 0]
    chance = (1 - chance) * mean[0] + chance * mean[1]
    assert chance == pytest.approx(1 / 2 + (1 - s / 4) * (p - 1 / 2), abs=1e-12)
  assert chance == pytest.approx(p, abs=1e-12)


def test_samples_have_the_law_of_independent_bits(executions):
  """4000 draws of three bits: means within 4 standard errors (under 0.008), and the covariances
  of the bits; one network call a step.
  """
  n, p, process = 4000, np.array([[0.1, 0.5, 0.9]]), binomial.uniform_erasure(5)
  network = coin(process, p)
  marked = lambda x, t: network(executions.mark(x), t)
  x, nfe = jax.jit(lambda key: binomial.sample(key, process, marked, (n, 3)))(KEY)
  x = np.asarray(x)
  assert nfe == executions.count() == 5 and set(np.unique(x)) == {0.0, 1.0}
  error = np.sqrt(p * (1 - p))[0]
  assert np.all(abs(x.mean(0) - p[0]) < 4 * error / np.sqrt(n))
  covariance = np.cov(x.T) - np.diag(error**2)
  assert np.all(abs(covariance) < 4 * np.outer(error, error).max() / np.sqrt(n))
  short = jax.jit(lambda key: binomial.sample(key, process, network, (2, 3), times=[5, 2, 0])[1])
  assert short(KEY) == 2


def test_an_example_depends_on_its_index_alone():
  process, network = binomial.uniform_erasure(3), tabulated(random_table(3, 3).astype(np.float32))
  run = jax.jit(
    lambda b, first: binomial.sample(KEY, process, network, (b, 3), first_index=first)[0],
    static_argnums=0,
  )
  whole = run(8, 0)
  np.testing.assert_array_equal(run(5, 3), whole[3:])
  assert len(np.unique(whole, axis=0)) > 1

  @jax.jit
  def estimates(x):
    terms = binomial.variational_bound(KEY, process, network, x)
    return binomial.variational_loss(KEY, process, network, x), terms.total

  for few, all_ in zip(estimates(whole[:3]), estimates(whole)):
    np.testing.assert_allclose(few, all_[:3], rtol=1e-6)


@pytest.mark.parametrize(
  "betas", [[], [0.0], [0.1, -0.2], [0.1, 1.1], [float("nan")], np.array([[0.1, 0.2]])]
)
def test_bad_betas_are_refused(betas):
  with pytest.raises(ConfigError, match="betas"):
    binomial.Binomial(betas)


def test_other_bad_arguments_are_refused():
  process, blind = binomial.uniform_erasure(3), lambda x, t: 0.5 * jnp.ones_like(x)
  draw = lambda **options: binomial.sample(KEY, process, blind, (2, 3), **options)
  for times in ([3, 2, 1], [2, 1, 0], [3, 3, 0], [3.0, 0.0], [3], []):
    with pytest.raises(ConfigError, match="times"):
      draw(times=times)
  with pytest.raises(ConfigError, match="num_steps"):
    binomial.uniform_erasure(0)
  with pytest.raises(ConfigError, match="enumerated"):
    binomial.variational_bound(None, process, blind, jnp.zeros((1, 13)))
  with pytest.raises(ConfigError, match="predict"):
    binomial.sample(KEY, process, lambda x, t: x[:, :1], (2, 3))
  for t in (-1, 4):
    with pytest.raises(ConfigError, match="step from 0 to 3"):
      binomial.marginal(process, jnp.zeros((1, 2)), t)
  with pytest.raises(ValueError):
    process.betas[0] = 0.5
