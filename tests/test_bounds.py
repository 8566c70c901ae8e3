"""The variational bound of a chain: terms in closed form, the whole by quadrature over paths, exact
kernels, the decoder's masses; objectives that estimate it; the importance-weighted likelihood.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import Mixture, diagonal
from scipy import stats

import likelihood
import losses
from bounds import (
  Prediction,
  level_term,
  log_bin_probability,
  log_weight,
  predict,
  prior_term,
)
from data import Transform
from likelihood import importance_weighted, variational_bound
from losses import OBJECTIVES, WEIGHTINGS
from parameterization import VARIANCES, reverse_kernel
from sampling import ancestral, sample, time_grid
from sde_lib import make_sde, marginal, perturb

CHAINS = {
  "ddpm": {"num_steps": 4, "beta_min": 0.05, "beta_max": 0.6},
  "ncsn": {"num_scales": 4, "sigma_max": 3.0, "sigma_min": 0.1},
}
chains = pytest.mark.parametrize("name", CHAINS)
LAW = diagonal([0.5, -0.2], [0.3, 2.0])


def nodes(n, dims=1):
  """Gauss-Hermite nodes [n^dims, dims] and weights of the standard normal law."""
  z, w = np.polynomial.hermite_e.hermegauss(n)
  z = np.stack([g.ravel() for g in np.meshgrid(*[z] * dims, indexing="ij")], 1)
  w = np.stack([g.ravel() for g in np.meshgrid(*[w / w.sum()] * dims, indexing="ij")])
  return z, w.prod(0)


class Told:
  """The noise prediction of a law, with the variance `v(t)` [1 or b, D or 1]."""

  def __init__(self, sde, law, v):
    self.noise_fn, self.v = law.noise_fn(sde), v

  def __call__(self, x, t, labels=None):
    return self.noise_fn(x, t)

  def with_variance(self, x, t, labels=None):
    return self.noise_fn(x, t), jnp.broadcast_to(self.v(t), x.shape)


def exact_kernels(sde, law):
  """The network whose reverse steps, decoder included, are those of the noised law itself: log var
  = v log beta + (1 - v) log beta~ solved for v at each level.
  """
  times = jnp.asarray(sde.times)
  alpha, sigma = (c[:, None] for c in marginal(sde, times))
  before = jnp.concatenate([jnp.ones((1, 1)), alpha[:-1]])
  least = jnp.concatenate([jnp.zeros((1, 1)), sigma[:-1]])
  keep = alpha / before
  forward = sigma**2 - (keep * least) ** 2
  prior = before**2 * law.variances + least**2  # of the state below
  wanted = prior * forward / (keep**2 * prior + forward)  # given the state above
  small = forward * (least / sigma) ** 2
  small = small.at[0].set(small[1])
  v = jnp.log(wanted / small) / jnp.log(forward / small)
  return Told(sde, law, lambda t: v[jnp.abs(times[None] - jnp.reshape(t, (-1, 1))).argmin(1)])


def at_nodes(monkeypatch, z):
  """Every draw of the noise is `z`."""
  for module in (likelihood, losses):
    monkeypatch.setattr(module, "normal", lambda key, shape: jnp.asarray(z))


@pytest.mark.parametrize("transform", [Transform(256), Transform(17, 0.0, 1.0), Transform(2)])
def test_decoder_sums_to_one(x64, transform):
  """CATALOGUE row 43: over all bins, the open end bins among them, for any mean and std."""
  mean, std = (c.reshape(-1, 1) for c in np.meshgrid([-1.4, -0.03, 0.5, 3.0], [0.003, 0.07, 2.0]))
  centres = transform.low + (np.arange(transform.levels) + 0.5) * transform.bin_width
  x0 = jnp.broadcast_to(jnp.asarray(centres)[None], (len(mean), transform.levels))
  log_prob = log_bin_probability(x0, jnp.asarray(mean), jnp.asarray(std), transform)
  np.testing.assert_allclose(jnp.exp(log_prob).sum(1), 1.0, rtol=1e-13)


@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-8), ("float32", 3e-5)])
def test_decoder_keeps_its_digits_in_the_tails(x64, dtype, rtol):
  """The logarithm of a bin's mass by quadrature of the density's ratio to its value in the bin, up
  to 60 standard deviations away on either side; its gradient is finite far beyond.
  """
  transform, std = Transform(256), 0.01
  k = np.array([40, 100, 127, 128, 160, 210])
  x0, mean = -1 + (k + 0.5) * transform.bin_width, 0.011
  y, w = np.polynomial.legendre.leggauss(40)
  points = (x0[:, None] + 0.5 * transform.bin_width * y - mean) / std
  centre = (x0 - mean) / std
  ratio = np.exp(-0.5 * (points**2 - centre[:, None] ** 2)) @ w * 0.5 * transform.bin_width / std
  expected = -0.5 * centre**2 - 0.5 * np.log(2 * np.pi) + np.log(ratio)
  cast = lambda a: jnp.asarray(a, dtype)
  found = log_bin_probability(cast(x0), cast(mean), cast(std), transform)
  np.testing.assert_allclose(found, expected, rtol=rtol)
  far = lambda m: log_bin_probability(cast(x0), m, cast(std), transform).sum()
  for m in (-1e6, 1e6):
    assert np.isfinite(jax.grad(far)(cast(m)))


def reference_term(sde, level, x, x0, noise_hat, variance):
  """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) summed over dimensions, from the chain's definition."""
  (a, s), (b, r) = (map(float, marginal(sde, sde.times[i])) for i in (level, level - 1))
  keep = a / b
  beta = s**2 - (keep * r) ** 2
  small = beta * r**2 / s**2
  data = (x - s * noise_hat) / a
  difference = b * beta / s**2 * (x0 - data)
  model = {"posterior": small, "beta": beta, "learned": small**0.7 * beta**0.3}[variance]
  return (0.5 * (np.log(model / small) + small / model - 1 + difference**2 / model)).sum(1)


@chains
@pytest.mark.parametrize("variance", VARIANCES)
def test_terms_are_the_divergences_of_the_kernels(x64, name, variance):
  """CATALOGUE rows 43, 44: each example at its own level; at the lowest the decoder with the data
  as the mean and beta~ of the second level, which a learned v mixes with beta of the first.
  """
  sde, rng = make_sde(name, **CHAINS[name]), np.random.default_rng(0)
  x0, x, noise = rng.normal(size=(3, 4, 2))
  network = lambda x, t, labels: jnp.asarray(noise)
  network.with_variance = lambda *at: (network(*at), jnp.full((4, 2), 0.3))
  prediction = predict(network, jnp.asarray(x), sde.times, None, variance)
  given = (sde, jnp.asarray(x0), jnp.asarray(x), prediction, jnp.arange(4))
  terms = level_term(*given, None)
  for i in (1, 2, 3):
    pick = [c[i : i + 1] for c in (x, x0, noise)]
    np.testing.assert_allclose(terms[i], reference_term(sde, i, *pick, variance)[0], rtol=1e-10)
  (a, s), (b, r) = (map(float, marginal(sde, sde.times[i])) for i in (0, 1))
  small = (r**2 - (b / a * s) ** 2) * s**2 / r**2
  var = small**0.7 * s**0.6 if variance == "learned" else small
  density = stats.norm((x[0] - s * noise[0]) / a, np.sqrt(var))
  np.testing.assert_allclose(terms[0], -density.logpdf(x0[0]).sum(), rtol=1e-10)
  transform, width = Transform(20, -8.0, 8.0), 0.8
  bins = (np.floor(density.mean() / width) + np.array([0.5, 1.5]))[None] * width
  one = lambda c: jnp.asarray(c[:1]) if np.ndim(c) else c
  given = (sde, jnp.asarray(bins), one(x), Prediction(*map(one, prediction)))
  mass = density.cdf(bins[0] + width / 2) - density.cdf(bins[0] - width / 2)
  found = level_term(*given, jnp.zeros(1, int), transform)
  np.testing.assert_allclose(found, -np.log(mass).sum(), rtol=1e-7)


def test_prior_term_of_images(x64):
  """CATALOGUE row 43: about 1e-5 bits/dim for data in [-1, 1] under the chain of DDPM."""
  sde, x0 = make_sde("ddpm"), np.random.default_rng(0).uniform(-1, 1, (3, 400))
  alpha, sigma = map(float, marginal(sde, 1.0))
  expected = 0.5 * (sigma**2 + alpha**2 * x0**2 - 1 - 2 * np.log(sigma)).sum(1)
  bits = np.asarray(prior_term(sde, jnp.asarray(x0))) / 400 / np.log(2)
  np.testing.assert_allclose(bits, expected / 400 / np.log(2), rtol=1e-6)
  assert (bits > 5e-6).all() and (bits < 2e-5).all()


@chains
@pytest.mark.parametrize("variance", VARIANCES)
def test_terms_sum_to_the_bound_over_paths(x64, monkeypatch, name, variance):
  """CATALOGUE row 43: the terms, and eq. 3-9, -E log p(x_{0:T}) / q(x_{1:T} | x_0), each by
  quadrature over its noise: exact for a linear network.
  """
  sde = make_sde(name, **{k: 3 if k.startswith("num") else v for k, v in CHAINS[name].items()})
  law = diagonal([0.9], [1.7])
  network = Told(sde, law, lambda t: jnp.full((1, 1), 0.4))
  given = {"variance": variance, "transform": None}
  z, w = nodes(2)
  at_nodes(monkeypatch, z)
  x0 = jnp.full((len(z), 1), 0.35)
  bound = variational_bound(jax.random.key(0), sde, network, x0, **given)
  assert bound.prior.shape == (2,) and bound.terms.shape == (3, 2)
  path, weights = nodes(2, 3)
  table = jnp.asarray(path.T[:, :, None])
  log_w = log_weight(lambda i: table[i], sde, network, jnp.full((len(path), 1), 0.35), **given)
  np.testing.assert_allclose(w @ np.asarray(bound.total), -weights @ np.asarray(log_w), rtol=1e-11)


@chains
def test_bound_with_exact_kernels_is_loose_by_the_prior_alone(x64, monkeypatch, name):
  """CATALOGUE row 42: -log q(x_0) + E log q(x_T) / p(x_T); over the data KL(q(x_T) || prior)."""
  sde = make_sde(name, **CHAINS[name])
  network, (z, w) = exact_kernels(sde, LAW), nodes(2)
  z = np.repeat(z, 2, axis=1)  # the terms are sums over dimensions: one rule serves both
  at_nodes(monkeypatch, z)
  given = {"variance": "learned", "transform": None}
  alpha, sigma = marginal(sde, 1.0)
  gaps = []
  data, weights = nodes(2)
  for value in LAW.mean + jnp.sqrt(LAW.variances) * data:
    x0 = jnp.broadcast_to(value[None], (2, 2))
    bound = w @ np.asarray(variational_bound(jax.random.key(0), sde, network, x0, **given).total)
    last = np.asarray(alpha * x0 + sigma * z)
    prior = stats.norm.logpdf(last, 0, sde.prior_std).sum(1)
    loose = w @ (np.asarray(LAW.log_prob(jnp.asarray(last), alpha, sigma)) - prior)
    np.testing.assert_allclose(bound + LAW.log_prob(value[None])[0], loose, rtol=1e-9, atol=1e-12)
    gaps.append(loose)
  ratio = np.asarray(alpha**2 * LAW.variances + sigma**2)[0] / sde.prior_std**2
  shift = np.asarray(alpha * LAW.mean)[0] / sde.prior_std
  divergence = 0.5 * (ratio - 1 - np.log(ratio) + shift**2).sum()
  np.testing.assert_allclose(weights @ np.array(gaps), divergence, rtol=1e-9)


def model_log_prob(sde, network, x0, variance):
  """log p(x_0) of a linear-Gaussian chain in one dimension: CATALOGUE row 39."""
  mean, var = 0.0, sde.prior_std**2
  one, none = jnp.ones((1, 1)), jnp.zeros((1, 1))
  for i in range(len(sde.times) - 1, 0, -1):
    t, s = sde.times[i], sde.times[i - 1]
    kernel = lambda x, t=t, s=s: reverse_kernel(
      sde, x, network(x, t), {"posterior": 0.0, "beta": 1.0}[variance], t, s, False
    )
    offset, std = (float(c.item()) for c in kernel(none))
    slope = float(kernel(one)[0].item()) - offset
    mean, var = slope * mean + offset, slope**2 * var + std**2
  (a, s), (b, r) = (map(float, marginal(sde, sde.times[i])) for i in (0, 1))
  decode = lambda x: float(((x - s * network(x, sde.times[0])) / a).item())
  offset, slope = decode(none), decode(one) - decode(none)
  last = (r**2 - (b / a * s) ** 2) * s**2 / r**2
  return stats.norm.logpdf(x0, slope * mean + offset, np.sqrt(slope**2 * var + last))


@chains
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_bound_is_above_the_negative_log_likelihood(x64, monkeypatch, name, variance):
  """CATALOGUE rows 39, 41, 42: of the model, at any data, for a network of another law too."""
  sde, (z, w) = make_sde(name, **CHAINS[name]), nodes(2)
  values = np.array([-1.0, 0.5, 2.0])
  at_nodes(monkeypatch, np.tile(z, (3, 1)))
  x0, given = jnp.asarray(np.repeat(values, 2)[:, None]), {"variance": variance, "transform": None}
  for law in (diagonal([0.5], [0.3]), diagonal([-1.0], [2.0])):
    network = Told(sde, law, None)
    bound = variational_bound(jax.random.key(0), sde, network, x0, **given).total
    exact = -model_log_prob(sde, network, values, variance)
    assert (np.reshape(bound, (3, 2)) @ w > exact + 1e-4).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_more_levels_tighten_the_bound(x64, monkeypatch, variance):
  """CATALOGUE row 52: with the exact score the steps lose 1/2 (r - 1 - log r) each, r the variance
  of the exact kernel over the model's: for beta O(1 / T) in all.
  """
  law, (z, w), gaps = diagonal([0.5], [0.3]), nodes(2, 2), []
  at_nodes(monkeypatch, z[:, 1:])
  x0 = 0.5 + np.sqrt(0.3) * jnp.asarray(z[:, :1])
  for n in (50, 100):
    sde = make_sde("ddpm", beta_min=0.1 / n, beta_max=20 / n, num_steps=n)
    given = {"transform": None, "variance": variance}
    terms = variational_bound(jax.random.key(0), sde, law.noise_fn(sde), x0, **given).terms
    given["variance"] = "learned"
    least = variational_bound(jax.random.key(0), sde, exact_kernels(sde, law), x0, **given).terms
    gaps.append(w @ np.asarray((terms - least)[1:].sum(0)))
    alpha, sigma = (np.asarray(c) for c in marginal(sde, sde.times))
    keep, below = alpha[1:] / alpha[:-1], alpha[:-1] ** 2 * 0.3 + sigma[:-1] ** 2
    beta = 1 - keep**2
    model = beta if variance == "beta" else beta * (sigma[:-1] / sigma[1:]) ** 2
    r = below * beta / (keep**2 * below + beta) / model
    np.testing.assert_allclose(gaps[-1], 0.5 * (r - 1 - np.log(r)).sum(), rtol=1e-7)
  assert gaps[0] / gaps[1] == pytest.approx({"posterior": 1.6, "beta": 2.0}[variance], abs=0.1)


def test_clipped_data_in_the_bound(x64):
  """As the sampler's: a network far off is as good as one at the edge of [-1, 1]."""
  sde, x0 = make_sde("ddpm", **CHAINS["ddpm"]), jnp.array([[0.9, -0.9]])

  def bound(size, clip):
    edge = lambda x, t: jnp.array([[size, -size]])
    noise_fn = lambda x, t, labels: (x - marginal(sde, t)[0] * edge(x, t)) / marginal(sde, t)[1]
    given = {"variance": "posterior", "transform": Transform(20), "clip": clip}
    return variational_bound(jax.random.key(0), sde, noise_fn, x0, **given).terms

  np.testing.assert_allclose(bound(1.0, False), bound(9.0, True), rtol=1e-9)
  assert (bound(9.0, False) > 10 * bound(9.0, True)).all()


def test_importance_weights_are_equal_for_exact_kernels(x64):
  """CATALOGUE row 40: where the prior is exact too, each path gives log p(x)."""
  law = diagonal([0.0, 0.0], [1.0, 1.0])
  sde = make_sde("ddpm", **CHAINS["ddpm"])
  x, given = law.sample(jax.random.key(0), 5), {"variance": "learned", "transform": None}
  one = importance_weighted(jax.random.key(1), sde, exact_kernels(sde, law), x, 1, **given)
  np.testing.assert_allclose(one, law.log_prob(x), rtol=1e-9)


@chains
def test_weights_of_exact_kernels_are_those_of_the_prior(x64, name):
  """CATALOGUE row 40: p(x_{0:T}) / q(x_{1:T} | x_0) = q(x_0) p(x_T) / q(x_T) along any path."""
  sde, z = make_sde(name, **CHAINS[name]), jax.random.normal(jax.random.key(1), (4, 3, 2))
  x, given = LAW.sample(jax.random.key(0), 3), {"variance": "learned", "transform": None}
  top = perturb(sde, x, z[-1], sde.times[-1])
  prior = stats.norm.logpdf(np.asarray(top), 0, sde.prior_std).sum(1)
  expected = LAW.log_prob(x) + prior - LAW.log_prob(top, *marginal(sde, sde.times[-1]))
  found = log_weight(lambda i: z[i], sde, exact_kernels(sde, LAW), x, **given)
  np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_importance_weighting_is_unbiased_and_grows_with_its_samples(x64):
  """CATALOGUE row 40: the mean of exp within 4 standard errors of the chain's density, the mean of
  the logarithm below it and increasing; with one sample it is the negative bound.
  """
  sde, n, value, variance = make_sde("ddpm", **CHAINS["ddpm"]), 4000, 1.5, "beta"
  network = Told(sde, diagonal([0.2], [0.8]), None)
  exact = model_log_prob(sde, network, value, variance)
  run = jax.jit(
    lambda key, k: importance_weighted(
      key, sde, network, jnp.full((n, 1), value), k, variance=variance, transform=None
    ),
    static_argnums=1,
  )
  means = []
  for k in (1, 4, 16):
    estimates = np.asarray(run(jax.random.key(k), k))
    density = np.exp(estimates)
    assert abs(density.mean() - np.exp(exact)) < 4 * density.std() / np.sqrt(n)
    means.append(estimates.mean())
  assert means[0] < means[1] < means[2] < exact + 4 * estimates.std() / np.sqrt(n)


def test_bound_and_weights_do_not_depend_on_the_batch_and_take_labels():
  sde = make_sde("ddpm", **CHAINS["ddpm"])
  x = jnp.array([[0.25, -0.75], [0.75, 0.25], [0.25, 0.25]])
  noise_fn = lambda x, t, labels: jnp.tanh(x + labels[:, None])
  labels, options = jnp.arange(3), {"variance": "beta", "transform": Transform(4)}

  @jax.jit
  def run(x, labels):
    given = (jax.random.key(0), sde, noise_fn, x)
    bound = variational_bound(*given, labels=labels, **options).total
    return jnp.stack([bound, importance_weighted(*given, 3, labels=labels, **options)])

  whole = run(x, labels)
  np.testing.assert_allclose(run(x[:2], labels[:2]), whole[:, :2], rtol=1e-5)
  assert abs(run(x, labels[::-1]) - whole)[:, jnp.array([0, 2])].min() > 1e-3


def objective(
  name, sde, network, x0, u, quantile="levels", transform=None, history=None, **options
):
  """The losses at the times of `u`, one for each example."""
  more = {} if history is None else {"history": history}
  times = lambda keys, sde: losses.TIME_SAMPLERS[quantile](sde, jnp.asarray(u), **more)
  draw = {"weighting": WEIGHTINGS["simple"], "time_sampler": times, "transform": transform}
  return OBJECTIVES[name](jax.random.key(0), sde, network, x0, **draw, **options)


@chains
@pytest.mark.parametrize(
  "variance, transform", [("posterior", None), ("learned", Transform(20, -3.0, 3.0))]
)
def test_vlb_estimates_the_bound_from_one_level(x64, monkeypatch, name, variance, transform):
  """CATALOGUE row 43: the mean over levels, with the loss-aware law too, on the same noise."""
  sde, z = make_sde(name, **CHAINS[name]), np.array([[0.7, -1.2]])
  at_nodes(monkeypatch, z)
  network, x0 = Told(sde, LAW, lambda t: jnp.full((1, 1), 0.4)), jnp.array([[0.45, -0.75]])
  given = {"variance": variance, "transform": transform}
  whole = variational_bound(jax.random.key(0), sde, network, x0, **given).total[0]
  at_nodes(monkeypatch, np.repeat(z, 4, axis=0))
  x0 = jnp.repeat(x0, 4, axis=0)
  parts = objective("vlb", sde, network, x0, (np.arange(4) + 0.5) / 4, **given)
  np.testing.assert_allclose(parts.mean(), whole, rtol=1e-11)
  seen = jnp.tile(jnp.array([1.0, 5.0, 2.0, 0.5])[:, None], (1, 10))
  history = losses.LossHistory(seen, jnp.full(4, 10))
  p = 0.999 * seen[:, 0] / seen[:, 0].sum() + 0.001 / 4
  u = jnp.cumsum(p) - 0.5 * p
  parts = objective("vlb", sde, network, x0, u, losses.LOSS_AWARE, history=history, **given)
  np.testing.assert_allclose((p * parts).sum(), whole, rtol=1e-11)


class Affine:
  """noise_hat = a x + b and v = c, one network call counted each."""

  def __init__(self, a, b, c):
    self.a, self.b, self.c, self.calls = a, b, c, 0

  def __call__(self, x, t, labels=None):
    return self.with_variance(x, t)[0]

  def with_variance(self, x, t, labels=None):
    self.calls += 1
    return self.a * x + self.b, jnp.broadcast_to(self.c, x.shape)


@chains
def test_hybrid_trains_the_mean_by_the_simple_loss_alone(x64, name):
  """CATALOGUE row 53: d L_vlb / d mean = 0, d L_vlb / d v is all of the gradient of v; one call."""
  sde, x0 = (
    make_sde(name, **CHAINS[name]),
    jnp.asarray(np.random.default_rng(0).normal(size=(8, 2))),
  )
  u, start = (np.arange(8) + 0.5) / 8, (jnp.array(0.3), jnp.array(-0.1), jnp.array(0.4))
  calls = []

  def loss(parameters, name, **options):
    network = Affine(*parameters)
    value = objective(name, sde, network, x0, u, **options).mean()
    calls.append(network.calls)
    return value

  def simple(parameters):
    times = lambda keys, sde: losses.TIME_SAMPLERS["levels"](sde, jnp.asarray(u))
    draw = {"weighting": WEIGHTINGS["simple"], "time_sampler": times}
    return OBJECTIVES["denoising"](jax.random.key(0), sde, Affine(*parameters), x0, **draw).mean()

  hybrid = jax.grad(lambda p: loss(p, "hybrid", vlb_weight=0.01))(start)
  mean, vlb = jax.grad(simple)(start), jax.grad(lambda p: loss(p, "vlb"))(start)
  np.testing.assert_allclose(hybrid[:2], mean[:2], rtol=1e-12)
  np.testing.assert_allclose(hybrid[2], 0.01 * vlb[2], rtol=1e-12)
  assert mean[2] == 0 and min(map(abs, vlb)) > 1e-3 and calls == [1, 1]
  total = loss(start, "hybrid", vlb_weight=0.01)
  np.testing.assert_allclose(total, simple(start) + 0.01 * loss(start, "vlb"), rtol=1e-12)


@chains
def test_learned_variance_at_its_optimum(x64, monkeypatch, name):
  """CATALOGUE row 53: minimised over v of each level, the hybrid loss finds beta~ + c^2 Var(x_0 |
  x_t); v = 0 and 1 are beta~ and beta.
  """
  sde, law = make_sde(name, **CHAINS[name]), diagonal([0.5], [0.3])
  z, w = nodes(2, 2)
  x0, wanted = 0.5 + np.sqrt(0.3) * z[:, :1], exact_kernels(sde, law)
  at_nodes(monkeypatch, z[:, 1:])

  @jax.jit
  def mean(v, u):
    network = Told(sde, law, lambda t: jnp.reshape(v, (1, 1)))
    losses_seen = objective("hybrid", sde, network, jnp.asarray(x0), jnp.full(len(z), u))
    return jnp.asarray(w) @ losses_seen

  newton = jax.jit(lambda v, u: v - jax.grad(mean)(v, u) / jax.grad(jax.grad(mean))(v, u))
  for level in range(4):
    v = jnp.array(0.5)
    for _ in range(12):
      v = newton(v, (level + 0.5) / 4)
    t = sde.times[level]
    expected = wanted.with_variance(jnp.zeros((1, 1)), t)[1]
    np.testing.assert_allclose(v, expected.item(), rtol=1e-6)


def test_gradients_are_finite_for_an_untrained_network():
  """In float32, at every level of 1,000, with decoded images and data far from those predicted."""
  sde, transform = make_sde("iddpm", num_steps=1000), Transform(256)
  k = jax.random.randint(jax.random.key(0), (1000, 3), 0, 256)
  u = (jnp.arange(1000) + 0.5) / 1000

  def loss(parameters):
    return objective("vlb", sde, Affine(*parameters), transform.forward(k), u, transform=transform)

  start = (jnp.array(0.0), jnp.array(5.0), jnp.array(0.5))
  value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p).mean()))(start)
  assert np.isfinite(value) and np.isfinite(jnp.stack(gradient)).all()


def test_forward_chain_of_ddpm(x64):
  """CATALOGUE rows 34, 35: x <- sqrt(1 - b) x + sqrt(b) z keeps N(0, 1), and after i steps has the
  moments of eq. 3-4.
  """
  sde, moments = make_sde("ddpm"), []
  mean, variance, kept = 1.0, 0.0, 1.0
  for beta in np.linspace(1e-4, 0.02, 1000):
    mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    kept = (1 - beta) * kept + beta
    moments.append((mean, np.sqrt(variance)))
  np.testing.assert_allclose(np.transpose(moments), marginal(sde, sde.times), rtol=1e-12)
  assert kept == pytest.approx(1.0, abs=1e-12)


def test_reverse_kernel_is_gaussian_for_short_steps_only(x64):
  """CATALOGUE row 38, on two modes by quadrature: the mean is that of the exact score at any step,
  the divergence from the best Gaussian falls as beta^3, and is large for long steps.
  """
  law = Mixture(np.array([[0.8, 0.2]]), np.array([[1.0], [-1.5]]), 0.05)
  sde, t, divergences = make_sde("vp"), 0.2, []
  x, y = np.linspace(-2.5, 2.5, 81), np.linspace(-4, 4, 4001)
  alpha, sigma = (float(c) for c in marginal(sde, t))
  weights = np.exp(law.log_prob(jnp.asarray(x[:, None]), alpha, sigma))
  betas = np.array([0.02, 0.04, 0.08, 0.16, 0.32])
  for beta in betas:
    integral = 0.1 * t + 9.95 * t**2 + np.log1p(-beta)
    s = (-0.1 + np.sqrt(0.01 + 39.8 * integral)) / 19.9
    below = np.asarray(law.log_prob(jnp.asarray(y[:, None]), *marginal(sde, s)))
    log_p = below[None] + stats.norm.logpdf(x[:, None], np.sqrt(1 - beta) * y, np.sqrt(beta))
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    mean = p @ y
    std = np.sqrt((p * (y - mean[:, None]) ** 2).sum(1))
    noise = law.noise_fn(sde)(jnp.asarray(x[:, None]), t)
    predicted = reverse_kernel(sde, jnp.asarray(x[:, None]), noise, 0.0, t, s, False)[0]
    np.testing.assert_allclose(predicted[:, 0], mean, atol=1e-9)
    density = stats.norm.logpdf(y, mean[:, None], std[:, None])
    log_p = np.log(np.maximum(p, 1e-300)) - np.log(y[1] - y[0])
    divergences.append(weights @ (p * (log_p - density)).sum(1) / weights.sum())
  slopes = np.diff(np.log(divergences)) / np.diff(np.log(betas))
  assert abs(slopes[0] - 3) < 0.1 and (slopes > 3).all()
  assert divergences[0] < 1e-4 and divergences[-1] > 0.1


def test_every_mode_is_sampled_with_its_weight():
  """CATALOGUE row 51: four modes, 4,000 samples by the exact score, 4 standard errors."""
  weights, means = (
    np.array([[0.4, 0.3, 0.2, 0.1]]),
    2.0 * np.array([[1, 1], [-1, 1], [1, -1], [-1, -1]]),
  )
  law, sde, n = Mixture(weights, means, 0.1), make_sde("vp"), 4000
  times = time_grid(sde, 100, "log_snr")

  @jax.jit
  def draw(key):
    return sample(key, sde, law.noise_fn(sde), (n, 2), step=ancestral(sde), times=times)[0]

  x = np.asarray(draw(jax.random.key(0)))
  found = np.bincount(((x[:, None] - means) ** 2).sum(2).argmin(1), minlength=4) / n
  assert (abs(found - weights[0]) < 4 * np.sqrt(weights[0] * (1 - weights[0]) / n)).all()
