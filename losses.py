"""Training objectives: w(t) ||noise_hat - noise||^2 under a law of t and its kin; weightings, time
samplers and objectives are tables.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float, Int, Key

from bounds import level_term, level_times, predict, prior_term, sum_dims
from parameterization import NoiseFn, make_score_fn, nearest_level
from sde_lib import (
  SDE,
  Keys,
  Time,
  example_keys,
  fold_in,
  log_snr,
  log_snr_rate,
  marginal,
  normal,
  perturb,
  time_of_log_snr,
)

Weighting = Callable  # (sde, t [b]) -> w(t) [b]
Quantile = Callable  # (sde, u [b] in [0, 1)) -> (t [b], uniform density / density of t [b])
TimeSampler = Callable  # (keys [b], sde) -> the same pair
Score = Callable  # (x [b, *d]) -> [b, *d], each example on its own


def edm_weight(sde: SDE, t: Time, sigma_data: float = 0.5) -> Array:
  """(r^2 + sigma_data^2) / sigma_data^2 with r = sigma / alpha (Karras et al. 2022, table 1): their
  lambda(r) times r^2, for the noise.
  """
  return 1 + jnp.exp(-log_snr(sde, t)) / sigma_data**2


def min_snr_weight(sde: SDE, t: Time, gamma: float = 5.0) -> Array:
  """min(SNR, gamma) / SNR (Hang et al. 2023, section 3.4): min(SNR, gamma), a weight of the data,
  for the noise.
  """
  return jnp.minimum(1.0, gamma * jnp.exp(-log_snr(sde, t)))


def sigmoid_weight(sde: SDE, t: Time, bias: float = 2.0) -> Array:
  """1/2 sigmoid(bias - log-SNR) (-d log-SNR / dt) (Kingma & Gao 2023, eq. 5 and table 1; Hoogeboom
  et al. 2024).

  The sigmoid weighs the noise's error under the measure of log-SNR: the factor -d log-SNR / dt
  makes the loss the same for every schedule, and "elbo" its limit for a large bias.
  """
  return 0.5 * jax.nn.sigmoid(bias - log_snr(sde, t)) * log_snr_rate(sde, t)


def power_weight(sde: SDE, t: Time, p: float = 2.0) -> Array:
  """1/2 sigma^(p - 2): lambda(sigma) = sigma^p times the level's loss 1/2 ||score + noise /
  sigma||^2 (Song & Ermon 2019, eq. 5-6).
  """
  return 0.5 * marginal(sde, t)[1] ** (p - 2)


# w of w(t) ||noise_hat - noise||^2; likelihood and elbo by g^2 / sigma^2 = -d log-SNR / dt
WEIGHTINGS = {
  "simple": lambda sde, t: jnp.ones_like(t),  # Ho et al. 2020, eq. 14
  "likelihood": log_snr_rate,  # Song et al. 2021b (maximum likelihood training), eq. 7
  "elbo": lambda sde, t: 0.5 * log_snr_rate(sde, t),  # Kingma et al. 2021, eq. 16: nats
  "edm": edm_weight,
  "min_snr": min_snr_weight,
  "sigmoid": sigmoid_weight,
  "power": power_weight,
}


def uniform_quantile(sde: SDE, u: Float[Array, " b"]) -> tuple[Array, Array]:
  """t uniform on [t_min, t_max]."""
  return sde.t_min + (sde.t_max - sde.t_min) * u, jnp.ones_like(u)


def importance_quantile(sde: SDE, u: Float[Array, " b"]) -> tuple[Array, Array]:
  """t with density proportional to g^2 / sigma^2, that is uniform in log-SNR (Song et al. 2021b,
  section 5.1).

  Under the likelihood and elbo weightings the weight times the density ratio is a constant.
  """
  most, least = log_snr(sde, sde.t_min), log_snr(sde, sde.t_max)
  t = time_of_log_snr(sde, most + (least - most) * u)
  return t, (most - least) / (sde.t_max - sde.t_min) / log_snr_rate(sde, t)


def log_normal_quantile(
  sde: SDE, u: Float[Array, " b"], p_mean: float = -1.2, p_std: float = 1.2
) -> tuple[Array, Array]:
  """ln(sigma / alpha) normal, truncated to [t_min, t_max] (Karras et al. 2022, table 1).

  The law is part of the objective and not corrected for: the ratio is 1, and the loss a mean over
  this law. EDM's loss is this sampler with the weighting "edm".
  """
  standard = lambda t: (-0.5 * log_snr(sde, t) - p_mean) / p_std
  low, high = ndtr(standard(sde.t_min)), ndtr(standard(sde.t_max))
  log_ratio = p_mean + p_std * ndtri(low + (high - low) * u)
  return time_of_log_snr(sde, -2 * log_ratio), jnp.ones_like(u)


def levels_quantile(sde: SDE, u: Float[Array, " b"]) -> tuple[Array, Array]:
  """t uniform on the levels of a discrete chain (Ho et al. 2020, algorithm 1); the loss is a mean
  over levels.
  """
  times = level_times(sde)
  level = jnp.minimum((u * len(times)).astype(int), len(times) - 1)
  return times[level], jnp.ones_like(u)


class LossHistory(NamedTuple):
  """The newest losses of each bin of time, a ring, and how many there ever were.

  The bins are the levels of a discrete chain, or equal intervals of continuous time.
  """

  losses: Float[Array, "bins 10"]
  counts: Int[Array, " bins"]


def init_history(sde: SDE) -> LossHistory:
  """No loss seen in any of the levels, or of 100 intervals of [t_min, t_max]."""
  bins = 100 if sde.times is None else len(sde.times)
  return LossHistory(jnp.zeros((bins, 10)), jnp.zeros(bins, jnp.int32))


def update_history(
  history: LossHistory, sde: SDE, t: Float[Array, " b"], losses: Float[Array, " b"]
) -> LossHistory:
  """The history with `losses` [b], seen at times `t` and not multiplied by the density ratio, in
  their order; a loss that is not finite is left out.
  """
  bins, size = history.losses.shape
  if sde.times is None:
    share = (t - sde.t_min) / (sde.t_max - sde.t_min)
    index = jnp.clip((share * bins).astype(int), 0, bins - 1)
  else:
    index = nearest_level(sde, t).astype(int)
  index = jnp.where(jnp.isfinite(losses), index, bins)  # out of bounds: dropped
  same = index[:, None] == index[None]
  earlier, later = jnp.tril(same, -1).sum(1), jnp.triu(same, 1).sum(1)
  slot = (history.counts[index] + earlier) % size
  kept = jnp.where(later < size, index, bins)  # else overwritten within this batch
  return LossHistory(
    history.losses.at[kept, slot].set(losses.astype(history.losses.dtype), mode="drop"),
    history.counts.at[index].add(1, mode="drop"),
  )


def second_moment_quantile(
  sde: SDE, u: Float[Array, " b"], history: LossHistory
) -> tuple[Array, Array]:
  """t in a bin with probability 0.999 sqrt(mean loss^2) / sum + 0.001 / bins, uniform until every
  bin has ten losses (Nichol & Dhariwal 2021, eq. 18 and section 3.4; 0.001 as in their code).

  The density is constant within an interval of continuous time.
  """
  bins, size = history.losses.shape
  moment = jnp.sqrt((history.losses**2).mean(1))
  known = (history.counts >= size).all()
  p = jnp.where(
    known, 0.999 * moment / jnp.where(known, moment.sum(), 1.0) + 0.001 / bins, 1 / bins
  )
  edges = jnp.concatenate([jnp.zeros(1), jnp.cumsum(p)])
  index = jnp.clip(jnp.searchsorted(edges, u, side="right") - 1, 0, bins - 1)
  if sde.times is None:
    part = jnp.clip((u - edges[index]) / p[index], 0, 1)
    t = sde.t_min + (sde.t_max - sde.t_min) * (index + part) / bins
  else:
    t = level_times(sde)[index]
  return t, 1 / (bins * p[index])


LOSS_AWARE = "loss_second_moment"  # the sampler that takes a `LossHistory` as `history`
TIME_SAMPLERS = {
  "uniform": uniform_quantile,
  "importance": importance_quantile,
  "log_normal": log_normal_quantile,
  "levels": levels_quantile,
  LOSS_AWARE: second_moment_quantile,
}


def independent(quantile: Quantile) -> TimeSampler:
  """Draws each example's time on its own."""
  return lambda keys, sde: quantile(sde, jax.vmap(jax.random.uniform)(keys))


def stratified(quantile: Quantile, key: Key[Array, ""], index: Array, total: int) -> TimeSampler:
  """One uniform draw shifted by index / total: times that cover a batch evenly (Kingma et al. 2021,
  appendix I.1).

  Args:
    index: [b] positions of these examples in the global batch of `total`, so that devices share one
      draw.
  """
  u = (jax.random.uniform(key) + index / total) % 1
  return lambda keys, sde: quantile(sde, u)


def denoising_loss(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x0: Float[Array, "b *d"],
  *,
  weighting: Weighting,
  time_sampler: TimeSampler,
  labels: Array | None = None,
) -> Float[Array, " b"]:
  """Weighted denoising score matching of each example (Song et al. 2021, eq. 7), summed over
  dimensions.

  An unbiased estimate of the integral of w(t) E||noise_hat - noise||^2 over [t_min, t_max], divided
  by its length; with "elbo" that is nats. Under "log_normal" and "levels" the mean over that law.
  `key` is one key, or one per example.
  """
  keys = example_keys(key, x0.shape[0])
  t, density_ratio = time_sampler(fold_in(keys, 0), sde)
  return (
    density_ratio * weighting(sde, t) * noise_error(fold_in(keys, 1), sde, noise_fn, x0, t, labels)
  )


def noise_error(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x0: Float[Array, "b *d"],
  t: Time,
  labels: Array | None = None,
) -> Float[Array, " b"]:
  """||noise_hat - noise||^2 of each example at time t (scalar or [b]) for one draw of the noise; D
  for noise_hat = 0.
  """
  noise = normal(key, x0.shape)
  return sum_dims((noise_fn(perturb(sde, x0, noise, t), t, labels) - noise) ** 2)


def fisher_divergence(
  score: Score, x: Float[Array, "b *d"], true_score: Score
) -> Float[Array, " b"]:
  """1/2 ||score - true_score||^2 at each example (Hyvarinen 2005, eq. 2)."""
  return 0.5 * sum_dims((score(x) - true_score(x)) ** 2)


def score_matching_trace(
  score: Score, x: Float[Array, "b *d"], chunk: int = 16
) -> Float[Array, " b"]:
  """tr(d score / dx) + 1/2 ||score||^2 at each example (Hyvarinen 2005, eq. 4), by D directional
  derivatives.

  The Fisher divergence less a constant of the data, in expectation. One network evaluation, then
  `chunk` tangents at a time, which bounds the memory.
  """
  value, push = jax.linearize(score, x)

  def derivative(i):
    direction = jax.nn.one_hot(i, x[0].size, dtype=x.dtype).reshape(1, *x.shape[1:])
    return _along(push, jnp.broadcast_to(direction, x.shape))

  trace = jax.lax.map(derivative, jnp.arange(x[0].size), batch_size=chunk).sum(0)
  return trace + 0.5 * sum_dims(value**2)


def _along(push: Callable, v: Array) -> Array:
  """v^T J v of each example: its Jacobian does not mix examples."""
  return sum_dims(v * push(v))


def sliced_score_matching(
  key: Keys,
  score: Score,
  x: Float[Array, "b *d"],
  num_probes: int = 1,
  variance_reduced: bool = True,
) -> Float[Array, " b"]:
  """v^T (d score / dx) v + 1/2 (v^T score)^2 at each example, averaged over Rademacher probes v
  (Song et al. 2019, eq. 7), or with 1/2 ||score||^2 where the variance is reduced (eq. 8).

  In expectation over the probes `score_matching_trace`; one tangent for each probe.
  """
  value, push = jax.linearize(score, x)
  draw = lambda k: jax.random.rademacher(k, (num_probes, *x.shape[1:]), x.dtype)
  probes = jax.vmap(draw, out_axes=1)(example_keys(key, x.shape[0]))
  curvature = jax.vmap(lambda v: _along(push, v))(probes).mean(0)
  if variance_reduced:
    return curvature + 0.5 * sum_dims(value**2)
  return curvature + 0.5 * jax.vmap(lambda v: sum_dims(v * value) ** 2)(probes).mean(0)


def _noised(key, sde, x0, time_sampler):
  """(keys left, t, density ratio, noise, x_t) of each example, as `denoising_loss` draws them."""
  keys = example_keys(key, x0.shape[0])
  t, density_ratio = time_sampler(fold_in(keys, 0), sde)
  noise = normal(fold_in(keys, 1), x0.shape)
  return fold_in(keys, 2), t, density_ratio, noise, perturb(sde, x0, noise, t)


def _matching_loss(key, sde, noise_fn, x0, weighting, time_sampler, labels, estimate):
  """`estimate(keys, score, x)` is tr(d score / dx) + 1/2 ||score||^2 of each example."""
  keys, t, density_ratio, _, x = _noised(key, sde, x0, time_sampler)
  score = lambda x: make_score_fn(sde, noise_fn)(x, t, labels)
  scale = 2 * density_ratio * weighting(sde, t) * marginal(sde, t)[1] ** 2
  return scale * estimate(keys, score, x)


def score_matching_loss(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x0: Float[Array, "b *d"],
  *,
  weighting: Weighting,
  time_sampler: TimeSampler,
  labels: Array | None = None,
  chunk: int = 16,
) -> Float[Array, " b"]:
  """Explicit score matching at the noised x: w(t) (||noise_hat||^2 - 2 sigma tr(d noise_hat / dx)),
  that is w sigma^2 (||score||^2 + 2 tr(d score / dx)) (Hyvarinen 2005, eq. 4).

  In expectation `denoising_loss` less w(t) D, since E noise_hat . noise = sigma E tr(d noise_hat /
  dx). `chunk` as in `score_matching_trace`.
  """
  estimate = lambda key, score, x: score_matching_trace(score, x, chunk)
  return _matching_loss(key, sde, noise_fn, x0, weighting, time_sampler, labels, estimate)


def sliced_loss(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x0: Float[Array, "b *d"],
  *,
  weighting: Weighting,
  time_sampler: TimeSampler,
  labels: Array | None = None,
  num_probes: int = 1,
  variance_reduced: bool = False,
) -> Float[Array, " b"]:
  """`score_matching_loss` by random probes, in expectation the same (Song et al. 2019, eq. 7-8)."""
  estimate = lambda *at: sliced_score_matching(*at, num_probes, variance_reduced)
  return _matching_loss(key, sde, noise_fn, x0, weighting, time_sampler, labels, estimate)


def _bound(sde, x0, x, t, prediction, transform):
  """An estimate of the bound of each example from its level, all of them equally likely."""
  level = nearest_level(sde, t).astype(int)
  term = level_term(sde, x0, x, prediction, level, transform)
  return len(sde.times) * term + prior_term(sde, x0)


def vlb_loss(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x0: Float[Array, "b *d"],
  *,
  weighting: Weighting,
  time_sampler: TimeSampler,
  transform,
  labels: Array | None = None,
  variance: str = "learned",
) -> Float[Array, " b"]:
  """L_vlb of a discrete chain in nats, estimated from one level of each example (Nichol & Dhariwal
  2021, eq. 4-7): unbiased for the mean of `likelihood.variational_bound`.

  Args:
    x0: centres of the bins of `transform`; where that is None or has no levels, any values, and the
      bound is a density's.
    weighting: without effect, the bound has its own weights; here because every objective takes it.
    time_sampler: of levels: "levels", or "loss_second_moment" (section 3.4).
    variance: of the reverse steps, a name in `VARIANCES`.
  """
  _, t, density_ratio, _, x = _noised(key, sde, x0, time_sampler)
  prediction = predict(noise_fn, x, t, labels, variance)
  return density_ratio * _bound(sde, x0, x, t, prediction, transform)


def hybrid_loss(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x0: Float[Array, "b *d"],
  *,
  weighting: Weighting,
  time_sampler: TimeSampler,
  transform,
  labels: Array | None = None,
  vlb_weight: float = 0.001,
) -> Float[Array, " b"]:
  """L_simple + vlb_weight L_vlb, whose second part trains the variance only (Nichol & Dhariwal
  2021, eq. 16); arguments as for `vlb_loss`. One network evaluation.

  Both are sums over dimensions, L_vlb in nats; the published code counts bits, for which vlb_weight
  is 0.001 / log 2.
  """
  _, t, density_ratio, noise, x = _noised(key, sde, x0, time_sampler)
  prediction = predict(noise_fn, x, t, labels, "learned")
  simple = weighting(sde, t) * sum_dims((prediction.noise - noise) ** 2)
  fixed = prediction._replace(noise=jax.lax.stop_gradient(prediction.noise))
  return density_ratio * (simple + vlb_weight * _bound(sde, x0, x, t, fixed, transform))


# name: (key, sde, noise_fn, x0, weighting=, time_sampler=, labels=, ...) -> [b], each the density
# ratio times the loss at the example's own time
OBJECTIVES = {
  "denoising": denoising_loss,
  "score_matching": score_matching_loss,
  "sliced": sliced_loss,
  "sliced_vr": functools.partial(sliced_loss, variance_reduced=True),
  "vlb": vlb_loss,
  "hybrid": hybrid_loss,
}
