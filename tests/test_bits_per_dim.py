"""The likelihood job: any number of devices, killed at any moment, failed examples, error bars."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import diagonal, rotated
from scipy.stats import norm
from tiny import toy_config

import devices
from data import Transform
from dequantization import Dequantizer
from errors import ConfigError, RunError
from evaluation import bits_per_dim, decoder, dequantizer, trained
from evaluation.batches import spread
from experiment import NAMES, build
from likelihood import log_likelihood
from sde_lib import make_sde, marginal

SMALL = {
  "data__name": "digits",
  "data__dir": "runs/data",
  "likelihood__batch_size": 20,
  "likelihood__num_examples": 70,
  "likelihood__max_steps": 200,
  "likelihood__dequantizer__num_steps": 3,
  "training__num_steps": 60,
  "training__evaluate_every": 0,
  "training__sample_every": 0,
  "training__log_every": 60,
  "training__checkpoint_every": 60,
  "model__args__hidden": (32,),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  job = trained.start(toy_config(**SMALL), workdir, train=True)
  return dataclasses.replace(job, params=jax.device_get(job.params))


def with_options(job, workdir, num_devices=1, **options):
  """The same network with other options of the likelihood, another folder, another mesh."""
  config = job.experiment.config.copy_and_resolve_references()
  config.likelihood.update(options)
  mesh = devices.make_mesh(1, jax.devices()[:num_devices])
  experiment = dataclasses.replace(job.experiment, config=config, mesh=mesh)
  return dataclasses.replace(job, experiment=experiment, workdir=workdir)


def table_of(workdir):
  return dict(np.load(workdir / "results" / "likelihood.npz"))


def assert_same(first, second):
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture(scope="module")
def straight(job, tmp_path_factory):
  """(record, table) of one device."""
  workdir = tmp_path_factory.mktemp("straight")
  return bits_per_dim.run(with_options(job, workdir)), table_of(workdir), workdir


def test_every_example_is_there_once_with_its_parts(job, straight):
  """Though the blocks do not divide them (PITFALLS, row 31)."""
  record, table, workdir = straight
  assert record["num_examples"] == 70 and record["num_failed"] == 0
  assert len(set(table["index"].tolist())) == 70 and "latent" not in table
  np.testing.assert_allclose(table["bits_per_dim"].mean(), record["bits_per_dim"], rtol=1e-12)
  total = table["prior"] + table["divergence"] + table["offset"]
  np.testing.assert_allclose(table["log_prob"], total, rtol=1e-5)
  bits = -(table["log_prob"] - table["log_q"]) / (64 * np.log(2))
  np.testing.assert_allclose(table["bits_per_dim"], bits, rtol=1e-5)
  assert (workdir / "results" / "likelihood.png").is_file()


@pytest.mark.parametrize("num_devices", [4, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_number_of_devices_changes_no_bit(job, straight, tmp_path, num_devices):
  record = bits_per_dim.run(with_options(job, tmp_path, num_devices))
  assert_same(straight[1], table_of(tmp_path))
  names = ("bits_per_dim", "standard_error", "standard_error_probes", "standard_error_draws")
  assert all(record[name] == straight[0][name] for name in names)


def test_blocks_side_by_side_change_no_bit(job, straight, tmp_path, monkeypatch, caplog):
  """And their program is compiled once, though all ask for it at once."""
  monkeypatch.setattr(devices, "programs_at_once", lambda: 3)
  with caplog.at_level("DEBUG", "jax._src.dispatch"):
    bits_per_dim.run(with_options(job, tmp_path))
  assert_same(straight[1], table_of(tmp_path))
  compiled = [m for m in caplog.messages if re.search(r"Finished XLA .*_columns", m)]
  assert len(compiled) == 1, caplog.messages


@pytest.mark.exhaustive  # test_likelihood_pitfalls kills one at every block
def test_a_killed_job_goes_on_with_the_missing_blocks(job, straight, tmp_path, monkeypatch):
  calls, call = [], bits_per_dim.Blocks._call

  def killed(blocks, *args):
    calls.append(1)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return call(blocks, *args)

  monkeypatch.setattr(bits_per_dim.Blocks, "_call", killed)
  with pytest.raises(KeyboardInterrupt):
    bits_per_dim.run(with_options(job, tmp_path))
  bits_per_dim.run(with_options(job, tmp_path, 2))
  assert_same(straight[1], table_of(tmp_path))
  assert len(calls) == 2 + 1 + 2 + 1, "two blocks, the kill, the two that are left, the replicates"


def test_other_options_do_not_take_its_blocks(job, straight, monkeypatch):
  monkeypatch.setattr(bits_per_dim.Blocks, "_call", None)
  with pytest.raises(TypeError):
    bits_per_dim.run(with_options(job, straight[2], seed=1))
  assert bits_per_dim.run(with_options(job, straight[2]))["bits_per_dim"]


def test_failed_examples_are_told_and_left_out(job, tmp_path, capsys, monkeypatch):
  """The log-weights of bright images are NaN, as of a solve that fails."""

  def known(experiment, held, draws, probes, k, labels):
    bright = k.reshape(len(k), -1).mean(1)
    ones = jnp.ones(len(k))
    return {"log_weight": jnp.where(bright > 5, jnp.nan, bright), "nfe": ones, "latent_norm": ones}

  monkeypatch.setitem(bits_per_dim.KINDS, "exact", (known, "known"))
  record, table = bits_per_dim.run(with_options(job, tmp_path)), table_of(tmp_path)
  failed = np.isnan(table["bits_per_dim"])
  assert 0 < failed.sum() < 70 and record["num_failed"] == failed.sum()
  assert record["num_examples"] == 70 - failed.sum()
  printed = capsys.readouterr().out
  assert f"{failed.sum()} of 70 solves failed" in printed and "max_steps = 200" in printed
  rest = table["bits_per_dim"][~failed]
  np.testing.assert_allclose(record["bits_per_dim"], rest.mean(), rtol=1e-12)
  np.testing.assert_array_equal(np.isnan(table["baseline_bits_per_dim"]), failed)


def test_it_is_an_error_if_all_fail(job, tmp_path):
  with pytest.raises(RunError, match=r"70 of 70 solves failed .*\n  mend:  raise likelihood.max_s"):
    bits_per_dim.run(with_options(job, tmp_path, max_steps=1))


def test_variational_dequantization_is_trained_once(job, straight, tmp_path, monkeypatch):
  """Other options of the likelihood find it in its file."""
  options = {"dequantization": "variational", "num_examples": 40}
  record = bits_per_dim.run(with_options(job, tmp_path / "one", **options))
  assert record["dequantization"] == "variational: conditional Gaussian, 3 steps"
  assert abs(record["bits_per_dim"] - straight[0]["bits_per_dim"]) < 0.3
  monkeypatch.setattr(dequantizer, "_fit", None)
  again = lambda **more: with_options(job, tmp_path / "one", **options, **more)
  assert dequantizer.trained_law(again(rtol=2e-2, seed=1), job.params)
  with pytest.raises(TypeError):
    dequantizer.trained_law(again(dequantizer={"num_steps": 4}), job.params)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  "options", [{"dequantization": "variational"}, {"kind": "variational", "decoder": "fitted"}]
)
def test_what_is_trained_is_the_same_on_two_devices(job, tmp_path, options):
  """It is made by one program of one device."""
  options |= {"num_examples": 40, "num_levels": 50, "save_latents": False}
  for count in (1, 2):
    bits_per_dim.run(with_options(job, tmp_path / str(count), count, **options))
  assert_same(*(table_of(tmp_path / str(count)) for count in (1, 2)))


def test_the_trained_law_closes_the_gap_of_the_uniform(job, monkeypatch):
  """To the probabilities of a Gaussian model of the digits that is steep within a bin."""
  experiment = with_options(job, None, dequantization="variational").experiment
  experiment.config.likelihood.dequantizer.num_steps = 200
  law, transform = diagonal([0.0] * 64, [0.05] * 64), experiment.transform
  flat = lambda x, t, labels=None: law.noise_fn(experiment.sde)(x.reshape(-1, 64), t)
  noise_fn = lambda x, t, labels=None: flat(x, t).reshape(x.shape)
  monkeypatch.setattr(type(experiment), "noise_fn", lambda *_: noise_fn)
  k = jnp.asarray(experiment.dataset.splits["test"]["image"])

  @jax.jit
  def gap(trained):
    x, log_q = dequantizer.law(experiment, trained)(jax.random.key(1), experiment.sde, transform, k)
    return (log_q - law.log_prob(x.reshape(-1, 64))).mean()

  module = Dequantizer(experiment.config.likelihood.dequantizer.features)
  start = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
  edges = transform.low + transform.bin_width * np.stack([k, k + 1.0]).astype(np.float64)
  masses = np.diff(norm(0, 0.05**0.5).cdf(edges), axis=0)
  exact = -np.log(masses).reshape(len(k), -1).sum(1).mean()
  before, after = (float(gap(p)) - exact for p in (start, dequantizer._fit(experiment, {})))
  assert before > 9 and 0 < after < 0.2 * before


@pytest.mark.parametrize("options", [{}, {"dequantization": "variational", "kind": "variational"}])
def test_nothing_is_trained_that_is_not_used(job, tmp_path, options):
  assert dequantizer.trained_law(with_options(job, tmp_path, **options), job.params) is None


def test_a_law_that_diverges_is_told(job, tmp_path):
  options = {"dequantization": "variational", "dequantizer": {"learning_rate": 1e9}}
  with pytest.raises(RunError, match=r"not finite\n  mend:  lower .*learning_rate"):
    bits_per_dim.run(with_options(job, tmp_path, **options))


def test_what_the_law_cannot_be_trained_with_is_refused():
  with pytest.raises(ConfigError, match=r"likelihood\.dequantizer\.num_steps = 0"):
    build(toy_config(likelihood__dequantizer__num_steps=0))


def test_every_kind_is_a_legal_name():
  """The experiment is checked before the job is imported, so that each has a table."""
  legal = {field: table for table, field in NAMES}["likelihood.kind"]
  assert legal.keys() == bits_per_dim.KINDS.keys()


def test_truncated_normal_ends_the_process_where_its_noise_fits_the_bin(job, tmp_path, capsys):
  """And says that a network of dequantized values has not learned what it evaluates."""
  record = bits_per_dim.run(with_options(job, tmp_path, dequantization="truncated_normal"))
  alpha, sigma = marginal(job.experiment.sde, record["t_min"])
  np.testing.assert_allclose(alpha / sigma / 17, 3.0, rtol=1e-3)
  printed = capsys.readouterr().out
  assert "training.dequantize=True" in printed and "=uniform or variational" in printed


@pytest.mark.exhaustive
def test_several_draws_tighten_the_bound(job, straight, tmp_path):
  record = bits_per_dim.run(with_options(job, tmp_path, num_draws=3))
  assert record["bits_per_dim"] < straight[0]["bits_per_dim"]
  assert record["standard_error_draws"] < straight[0]["standard_error_draws"]


@pytest.mark.exhaustive
def test_a_fitted_decoder_is_made_once_and_is_a_law(job, tmp_path, monkeypatch):
  options = {"kind": "variational", "num_levels": 50, "save_latents": False}
  gaussian = bits_per_dim.run(with_options(job, tmp_path / "gaussian", **options))
  options |= {"decoder": "fitted"}
  record = bits_per_dim.run(with_options(job, tmp_path / "one", **options))
  assert record["dequantization"] == "none: fitted decoder" and record["nfe_mean"] == 51
  assert record["lowest_level"] > gaussian["lowest_level"]
  assert record["bits_per_dim"] < gaussian["bits_per_dim"] - 0.1
  monkeypatch.setattr(decoder, "_fit", None)
  (path,) = (tmp_path / "one" / "results").glob("decoder-*.npy")
  np.testing.assert_allclose(np.exp(np.load(path).astype(np.float64)).sum(1), 1, rtol=1e-5)
  again = with_options(job, tmp_path / "one", **options)
  assert np.isfinite(decoder.fitted(again, None, job.params)).all()


def test_the_variational_bound_is_a_kind_of_its_own(job, straight, tmp_path):
  options = {"kind": "variational", "num_levels": 50}
  record = bits_per_dim.run(with_options(job, tmp_path, **options))
  table = table_of(tmp_path)
  assert table["terms"].shape == (70, 50) and record["nfe_mean"] == 50
  total = (table["prior"] + table["terms"].sum(1)) / (64 * np.log(2))
  np.testing.assert_allclose(table["bits_per_dim"], total, rtol=1e-4)
  assert record["standard_error_probes"] == 0 and record["standard_error_draws"] > 0
  assert record["bits_per_dim"] > straight[0]["bits_per_dim"] - 0.5


def test_parts_of_the_standard_error_are_those_of_a_known_law(monkeypatch):
  """Evaluations a_i + draw + probes of std 3, 2 and 1."""
  rng, n = np.random.default_rng(0), 20_000
  examples, draws = rng.normal(0, 3, n), rng.normal(0, 2, n)
  first = examples + draws + rng.normal(0, 1, n)

  class Known:
    options = type("Options", (), {"batch_size": 2 * n})

    def evaluate(self, rows, folds, name):
      assert (folds[0, :n] == bits_per_dim.DRAW).all() and (folds[0, n:] != bits_per_dim.DRAW).all()
      assert (folds[1] != bits_per_dim.PROBE).all()
      same = examples + draws + rng.normal(0, 1, n)
      both = examples + rng.normal(0, 2, n) + rng.normal(0, 1, n)
      return {"log_weight": np.concatenate([same, both])}

  one = bits_per_dim._replicate(Known(), np.arange(n), first)
  np.testing.assert_allclose(one, (1.0, 4.0), rtol=0.05)
  errors = bits_per_dim._standard_errors(first, one, 1)
  expected = np.sqrt(np.array([14, 9, 4, 1]) / n)
  np.testing.assert_allclose(list(errors.values()), expected, rtol=0.05)


@pytest.fixture(scope="module")
def simulated():
  """(log-weights of 500 jobs on 100 examples, those of replicates of half of them with other probes
  and with other draws too, the exact log p - log q of the same draws, its expectation given each
  example, its mean over all): 2 values of 17 levels under a Gaussian model of correlated values.
  """
  jobs, n = 500, 100
  sde, law, transform = make_sde("vp"), rotated([0.1, -0.2], [0.1, 0.5]), Transform(17)
  at = marginal(sde, sde.t_min)
  weight = lambda x: law.log_prob(x, *at) + 2 * np.log(transform.bin_width)
  places = jnp.asarray(np.indices((17, 17)).reshape(2, -1).T)
  u = jnp.asarray(np.indices((20, 20)).reshape(2, -1).T + 0.5) / 20
  corners = jnp.repeat(places, 400, 0) + jnp.tile(u, (289, 1))
  means = np.asarray(weight(transform.low + corners * transform.bin_width), np.float64)
  means = means.reshape(289, 400).mean(1)
  chosen = np.random.default_rng(0).integers(289, size=(jobs, n))

  @jax.jit
  def evaluate(k, draws, probes):
    x = transform.dequantize(draws, k)
    options = {"rtol": 1e-4, "atol": 1e-4}
    result = log_likelihood(probes, sde, law.score_fn(sde), x, **options)
    return result.log_prob + 2 * np.log(transform.bin_width), weight(x)

  keys = jax.random.split(jax.random.key(0), (5, jobs * n))
  flat = places[chosen.reshape(-1)]
  first, exact = (np.asarray(a).reshape(jobs, n) for a in evaluate(flat, keys[0], keys[1]))
  others = (evaluate(flat, *keys[pair])[0] for pair in (np.array([0, 2]), np.array([3, 4])))
  picked = spread(n, n // 2)
  same, both = (np.asarray(a).reshape(jobs, n)[:, picked] for a in others)
  return first, np.concatenate([same, both], 1), exact, means[chosen], means.mean()


@pytest.mark.parametrize("part", ["all", "draws and probes", "probes"])
def test_intervals_cover_the_mean_as_often_as_they_say(simulated, part):
  """The 95 % interval of the whole standard error, and those of its parts: about what the mean is
  without the choice of the examples, and without that of the draws.
  """
  first, replicates, exact, given, mean = simulated
  inside = []
  for values, again, *expected in zip(first, replicates, exact, given):

    class Known:
      options = type("Options", (), {"batch_size": len(values)})
      evaluate = staticmethod(lambda *_, again=again: {"log_weight": again})

    one = bits_per_dim._replicate(Known(), np.arange(len(values)), values)
    errors = bits_per_dim._standard_errors(values, one, 1)
    total, _, draws, probes = errors.values()
    center, error = {
      "all": (mean, total),
      "draws and probes": (expected[1].mean(), np.hypot(draws, probes)),
      "probes": (expected[0].mean(), probes),
    }[part]
    inside.append(abs(values.mean() - center) < 1.96 * error)
  assert 0.93 < np.mean(inside) < 0.97
