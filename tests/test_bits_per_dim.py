"""The likelihood job: any number of devices, killed at any moment, failed examples, error bars."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import toy_config

import devices
from errors import RunError
from evaluation import bits_per_dim, trained

SMALL = {
  "data__name": "digits",
  "data__dir": "runs/data",
  "likelihood__batch_size": 20,
  "likelihood__num_examples": 70,
  "likelihood__max_steps": 200,
  "likelihood__save_latents": True,
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
  record, table, workdir = straight
  assert record["num_examples"] == 70 and record["num_failed"] == 0
  assert len(set(table["index"].tolist())) == 70 and table["latent"].shape == (70, 8, 8, 1)
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


def test_failed_examples_are_told_and_left_out(job, straight, tmp_path, capsys):
  """Too few steps for some of the examples."""
  steps = int(np.median(straight[1]["nfe"])) // 6
  record = bits_per_dim.run(with_options(job, tmp_path, max_steps=steps))
  failed = np.isnan(table_of(tmp_path)["bits_per_dim"])
  assert 0 < failed.sum() < 70 and record["num_failed"] == failed.sum()
  assert record["num_examples"] == 70 - failed.sum()
  assert "max_steps" in capsys.readouterr().out
  rest = straight[1]["bits_per_dim"][~failed]
  np.testing.assert_allclose(table_of(tmp_path)["bits_per_dim"][~failed], rest, rtol=1e-6)


def test_it_is_an_error_if_all_fail(job, tmp_path):
  with pytest.raises(RunError, match=r"70 of 70 solves failed .*\n  mend:  raise likelihood.max_s"):
    bits_per_dim.run(with_options(job, tmp_path, max_steps=1))


@pytest.mark.exhaustive
def test_several_draws_tighten_the_bound(job, straight, tmp_path):
  record = bits_per_dim.run(with_options(job, tmp_path, num_draws=3))
  assert record["bits_per_dim"] < straight[0]["bits_per_dim"]
  assert record["standard_error_draws"] < straight[0]["standard_error_draws"]


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


def test_intervals_cover_the_mean_as_often_as_they_say():
  """1,000 jobs on 300 examples of a skewed law."""
  rng, inside = np.random.default_rng(1), []
  for _ in range(1000):
    values = rng.gamma(4.0, 0.1, 300) + rng.normal(0, 0.05, 300)
    error = bits_per_dim._standard_errors(values, bits_per_dim.Uncertainty(0.0025, 0.0), 1)
    inside.append(abs(values.mean() - 0.4) < 1.96 * error["standard_error"])
  assert 0.93 < np.mean(inside) < 0.97
