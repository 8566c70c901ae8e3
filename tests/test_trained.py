"""A trained network is found again: which average, which data; what a training looks at."""

import json

import jax
import numpy as np
import pytest
from tiny import toy_config

import ema
import settings
from checkpoint import Checkpoints
from errors import ConfigError
from evaluation import jobs, trained

OPTIONS = {"ema__sigma_rel": (0.1, 0.3), "ema__snapshot_every": 2, "training__frechet_samples": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(workdir, job) of a small training on an array of 4-vectors."""
  folder = tmp_path_factory.mktemp("data")
  np.savez(folder / "x.npz", x=np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32))
  data = {"data__name": f"npz:{folder / 'x.npz'}", "data__dir": str(folder / "cache")}
  workdir = folder / "run"
  return workdir, trained.start(toy_config(**OPTIONS, **data), workdir, train=True)


def restored(workdir, **changes):
  config = settings.read(workdir)
  config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  return trained.start(config, workdir, train=False)


def leaves(params):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_any_of_the_averages_can_be_used(run):
  workdir, job = run
  for a, b in zip(leaves(restored(workdir).params), leaves(job.params)):
    np.testing.assert_array_equal(a, b)
  with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
    second = checkpoints.restore_item(6, "ema1", job.params)
  for a, b in zip(*map(leaves, (restored(workdir, ema__use=1).params, second))):
    np.testing.assert_array_equal(a, b)
  assert not np.array_equal(leaves(second)[0], leaves(job.params)[0])


def test_an_average_is_put_together_from_the_snapshots(run, capsys):
  workdir, job = run
  params = restored(workdir, ema__post_hoc=0.2).params
  assert "relative width 0.2 of step 6" in capsys.readouterr().out
  with Checkpoints(workdir / "ema_snapshots", read_only=True) as snapshots:
    assert snapshots.steps() == [2, 4, 6]
    kept = [
      (s, i, snapshots.restore_item(s, f"ema{i}", job.params)) for s in (2, 4, 6) for i in (1, 2)
    ]
  weights = ema.post_hoc_weights([k[0] for k in kept], [0.1, 0.3] * 3, 6, 0.2)
  expected = jax.tree.map(lambda *x: sum(w * v for w, v in zip(weights, x)), *(k[2] for k in kept))
  for a, b in zip(*map(leaves, (params, expected))):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_without_snapshots_nothing_is_put_together(run, tmp_path):
  workdir, _ = run
  (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
  for name in ("config.json", "data.json"):
    (tmp_path / name).write_text((workdir / name).read_text())
  with pytest.raises(
    ConfigError, match=r"ema.post_hoc = 0.2 .*\n.*no snapshots.*\n.*ema.sigma_rel"
  ):
    restored(tmp_path, ema__post_hoc=0.2)


def test_sampling_does_not_need_the_data(run, monkeypatch):
  monkeypatch.setattr(trained.data, "declared", None)
  monkeypatch.setattr(trained.data, "load", None)
  record = jobs.run_sample(restored(run[0]))
  assert record["num_samples"] == 12 and (run[0] / "results" / "samples.png").is_file()
  samples = np.load(run[0] / "results" / "samples.npz")["image"]
  assert samples.shape == (12, 4) and samples.dtype == np.float32


def test_other_data_are_refused_and_the_configuration_stays(run, tmp_path):
  workdir, _ = run
  before = (workdir / "config.json").read_bytes()
  np.savez(tmp_path / "x.npz", x=np.zeros((20, 5), np.float32))
  config = settings.read(workdir)
  config.data.name, config.data.dir = f"npz:{tmp_path / 'x.npz'}", str(tmp_path)
  with pytest.raises(ConfigError, match=r"data.name = .*\(5,\).*\n.*\(4,\)"):
    trained.start(config, workdir, train=True)
  assert (workdir / "config.json").read_bytes() == before


def test_a_training_tells_held_out_loss_per_level_and_the_frechet_distance(run):
  lines = map(json.loads, (run[0] / "metrics.jsonl").read_text().splitlines())
  told = {}
  for line in lines:
    told.setdefault(line["step"], {}).update(line)
  for step in (3, 6):
    levels = [value for name, value in told[step].items() if name.startswith("held_out_loss/")]
    assert len(levels) == 3 and told[step]["held_out_loss"] == pytest.approx(np.mean(levels))
    assert told[step]["frechet_distance_pixels"] > 0
    assert (run[0] / "samples" / f"step_{step:06d}.png").is_file()


def test_continuous_data_have_a_log_density_and_no_bits(run):
  record = jobs.JOBS["likelihood"](restored(run[0], likelihood__batch_size=20))
  assert "bits_per_dim" not in record and record["num_examples"] == 20
  assert record["log_density_nats"] < 0 and record["dequantization"].startswith("none")
  assert record["baseline_log_density_nats"] < 0
