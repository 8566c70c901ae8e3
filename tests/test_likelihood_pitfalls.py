"""PITFALLS, section 4.3: what goes wrong in likelihood jobs elsewhere.

Rows 27-31 and 35 are named by tests of test_likelihood, test_dynamics,
test_divergence, test_dequantization, test_bits_per_dim, test_hosts.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bits_per_dim import assert_same, table_of
from tiny import toy_config

import data
import devices
from evaluation import bits_per_dim, figures, trained
from experiment import build


def known(experiment, held, draws, probes, k, labels):
  """The columns of a job without a network: of the values and of the keys."""
  place = jax.vmap(jax.random.normal)(draws) + 0.1 * jax.vmap(jax.random.normal)(probes)
  log_weight = k.reshape(len(k), -1).mean(1) + place
  return {"log_weight": log_weight, "nfe": jnp.ones(len(k)), "latent_norm": jnp.abs(place)}


@pytest.fixture
def job(tmp_path, monkeypatch):
  """A job of two draws on 45 digits in blocks of 20."""
  options = {"batch_size": 20, "num_examples": 45, "num_draws": 2}
  options = {f"likelihood__{name}": value for name, value in options.items()}
  experiment = build(toy_config(data__name="digits", data__dir="runs/data", **options))
  experiment = dataclasses.replace(experiment, mesh=devices.make_mesh(1, jax.devices()[:2]))
  monkeypatch.setitem(bits_per_dim.KINDS, "exact", (known, "known"))
  monkeypatch.setattr(bits_per_dim, "LARGEST_MIXTURE", 0)
  monkeypatch.setattr(figures, "save_likelihood", lambda *_: None)
  return trained.Job(experiment, {}, 0, tmp_path / "straight")


@pytest.mark.parametrize("dequantize, law", [(False, "uniform"), (True, "truncated_normal")])
def test_row_26_trained_on_other_values_than_it_is_evaluated_on(dequantize, law, capsys):
  config = toy_config(data__name="digits", data__dir="runs/data", training__dequantize=dequantize)
  others = {"uniform", "truncated_normal"} - {law}
  for config.likelihood.dequantization in (law, *others):
    experiment = build(config)
    bits_per_dim._warn_of_mismatch(experiment)
    on = "dequantized values" if dequantize else "centres of bins"
    assert bits_per_dim._description(experiment)["trained_on"] == on
    warned = f"training.dequantize={dequantize}" in capsys.readouterr().out
    assert warned == (config.likelihood.dequantization == law)


def test_rows_32_to_34_examples_repeated_or_lost_after_a_kill(job, monkeypatch):
  """Killed at any block of any draw, and again, the job has every example of each draw, and its
  mean is that of all of them.
  """
  record = bits_per_dim.run(job)
  call, calls, fatal = bits_per_dim.Blocks._call, itertools.count(1), set()

  def killed(blocks, *args):
    if next(calls) in fatal:
      raise KeyboardInterrupt
    return call(blocks, *args)

  monkeypatch.setattr(bits_per_dim.Blocks, "_call", killed)
  for fatal in ({n, n + 2} for n in range(1, 8)):
    calls = itertools.count(1)
    again = dataclasses.replace(job, workdir=job.workdir.with_name(f"killed{min(fatal)}"))
    ends = []
    while not ends or ends[-1]:
      try:
        resumed, end = bits_per_dim.run(again), None
      except KeyboardInterrupt as interrupt:
        end = interrupt
      ends.append(end)
    assert len(ends) > 1
    assert_same(table_of(job.workdir), table_of(again.workdir))
    for name in ("bits_per_dim", "standard_error", "standard_error_draws", "num_examples"):
      assert resumed[name] == record[name], name
  table = table_of(job.workdir)
  np.testing.assert_allclose(record["bits_per_dim"], table["bits_per_dim"].mean(), rtol=1e-12)
  one_draw = -table["log_weight"] / (64 * np.log(2))
  assert (np.abs(table["bits_per_dim"] - one_draw) > 1e-4).all(), "the draws differ"


def test_row_36_data_that_are_not_asked_for_are_read(monkeypatch):
  """A configuration is checked and its record described from what the data declare."""
  monkeypatch.setattr(data, "load", None)
  experiment = build(toy_config(data__name="digits", data__dir="runs/data"))
  assert experiment.num_dims == 64 and bits_per_dim._description(experiment)
  with pytest.raises(TypeError):
    _ = experiment.dataset
