"""The job of sample quality: samples by index in files, the reference computed once, the checks
before anything is drawn, names, sweep and watching.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny import toy_config

import devices
from errors import ConfigError
from evaluation import records, sample_quality, samples, sweep, trained, watch
from evaluation.features import Outputs

SMALL = {
  "data__name": "digits",
  "data__dir": "runs/data",
  "model__args__hidden": (32,),
  "training__evaluate_every": 0,
  "training__sample_every": 0,
  "evaluation__num_samples": 40,
  "evaluation__metrics": ("fid", "precision_recall", "memorization"),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  return trained.start(toy_config(**SMALL), tmp_path_factory.mktemp("run"), train=True)


def changed(job, workdir=None, num_devices=4, **options):
  """The same network with other options, another folder, another mesh."""
  config = job.experiment.config.copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in options.items()})
  mesh = devices.make_mesh(1, jax.devices()[:num_devices])
  experiment = dataclasses.replace(job.experiment, config=config, mesh=mesh)
  params = jax.device_get(job.params)
  return dataclasses.replace(
    job, experiment=experiment, workdir=workdir or job.workdir, params=params
  )


@pytest.fixture(scope="module")
def straight(job, tmp_path_factory):
  return samples.draw(changed(job, tmp_path_factory.mktemp("straight")), 20)


def test_a_killed_drawing_goes_on(job, straight, tmp_path, monkeypatch):
  draw, blocks = samples._draw, []

  def killed(job, weights, block, path):
    blocks.append(block)
    if len(blocks) == 2:
      raise KeyboardInterrupt
    draw(job, weights, block, path)

  monkeypatch.setattr(samples, "_draw", killed)
  with pytest.raises(KeyboardInterrupt):
    samples.draw(changed(job, tmp_path), 20)
  again = samples.draw(changed(job, tmp_path), 20)
  assert blocks == [0, 1, 1, 2]
  np.testing.assert_array_equal(again.values, straight.values)
  np.testing.assert_array_equal(again.nfe, straight.nfe)


def test_more_samples_are_added_to_those_that_are_there(job, straight, tmp_path):
  few, more = (samples.draw(changed(job, tmp_path), n) for n in (9, 20))
  assert len(few.values) == len(few.nfe) == 9 and len(list(tmp_path.rglob("*.npz"))) == 3
  np.testing.assert_array_equal(few.values, more.values[:9])
  np.testing.assert_array_equal(more.values, straight.values)


@pytest.mark.parametrize("options", [{"num_devices": 1}, {"sampling__batch_size": 20}])
def test_samples_depend_on_their_index_alone(job, straight, tmp_path, options):
  other = samples.draw(changed(job, tmp_path, **options), 20)
  differ = (other.values.astype(int) != straight.values.astype(int)).mean()
  assert differ < 0.01, "rounding may tip a level"


def test_stale_samples_are_not_taken(job, tmp_path):
  plain = changed(job, tmp_path)
  samples.draw(plain, 8)
  folders = lambda: {path.parent.name for path in tmp_path.rglob("*.npz")}
  samples.draw(changed(job, tmp_path, sampling__num_samples=99), 8)
  assert len(folders()) == 1
  samples.draw(changed(job, tmp_path, sampling__num_steps=5), 8)
  samples.draw(changed(job, tmp_path, sampling__seed=5), 8)
  samples.draw(dataclasses.replace(plain, step=7), 8)
  assert len(folders()) == 4


def plan_of(job, **options):
  return sample_quality.plan(changed(job, **options).experiment, job.workdir)


def test_the_reference_is_computed_once(job, tmp_path, monkeypatch):
  options = {"data__dir": str(tmp_path)}
  experiment = changed(job, **options).experiment
  experiment.__dict__["dataset"] = job.experiment.dataset
  first = sample_quality.plan(experiment, job.workdir)
  monkeypatch.setattr(sample_quality, "extract", None)
  second = sample_quality.plan(experiment, job.workdir)
  np.testing.assert_array_equal(first.reference.features, second.reference.features)
  splits = {
    name: {**split, "image": 16 - split["image"]}
    for name, split in job.experiment.dataset.splits.items()
  }
  experiment.__dict__["dataset"] = dataclasses.replace(job.experiment.dataset, splits=splits)
  with pytest.raises(TypeError):
    sample_quality.plan(experiment, job.workdir)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"metrics": ("fdi",)}, ["evaluation.metrics", "fdi", "'fid'"]),
    ({"features": "resnet"}, ["evaluation.features", "resnet", "classifier"]),
    ({"reference": "valid"}, ["evaluation.reference", "valid", "'test'"]),
    ({"num_samples": 10}, ["evaluation.num_samples", "10", "20 or more for memorization"]),
    ({"metrics": ("inception_score",)}, ["inception_score", "not pixels", "another"]),
    ({"num_samples": 10**13}, ["fit on the disk", "are free", "make room"]),
    ({"features": "inception"}, ["6726825d", "random_conv"]),
  ],
)
def test_what_is_missing_is_told_before_anything_is_drawn(job, options, words, monkeypatch):
  monkeypatch.setattr(samples, "_draw", None)
  offline = lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
  monkeypatch.setattr("urllib.request.urlopen", offline)
  with pytest.raises(ConfigError) as error:
    plan_of(job, **{f"evaluation__{name}": value for name, value in options.items()})
  assert all(word in str(error.value) for word in words), str(error.value)


def test_without_metrics_nothing_is_asked(job):
  assert plan_of(job, evaluation__metrics=(), evaluation__features="nonsense") is None


def test_only_features_of_the_fid_network_give_an_fid():
  name = sample_quality._full_name
  assert name("frechet_distance", "5k_test_inception") == "fid5k_test_inception"
  assert name("frechet_distance", "297_test_classifier") == "frechet_distance_297_test_classifier"
  assert name("recall", "5k_test_inception") == "recall_5k_test_inception"
  for figure, label in (("frechet_distance", "297_test_pixels"), ("kernel_distance", "5k_x")):
    assert records.figure_of(name(figure, label)) == (figure, label)
  assert records.figure_of("fid5k_test_inception") == ("fid", "5k_test_inception")


def test_perfect_samples_reach_the_floor_and_noise_does_not(job):
  """Training examples in the samples' place give the figures of the floor, to the last digit."""
  prepared, names = plan_of(job), ("fid", "precision_recall")
  rows = sample_quality.spread(len(prepared.training.features), 40)
  real = prepared.measure(names, Outputs(prepared.training.features[rows]))
  floor = sample_quality.floor(changed(job, evaluation__metrics=names), prepared)
  assert {n: f.value for n, f in real.items()} == {n: f.value for n, f in floor.items()}
  noise = prepared.measure(names, Outputs(np.random.default_rng(0).normal(size=(40, 64))))
  key = "frechet_distance_40_test_pixels"
  assert noise[key].value > 3 * real[key].value
  assert noise["precision_40_test_pixels"].value < 0.1 < real["precision_40_test_pixels"].value


def test_of_the_training_split_the_held_out_one_is_the_floor(job):
  """Training examples in the samples' place are copies of it, held-out ones are none."""
  prepared = plan_of(job, evaluation__reference="train")
  assert prepared.label == "40_train_pixels" and len(prepared.reference.features) == 1500
  assert len(prepared.held_out.features) == 297
  copies = prepared.measure(("memorization",), Outputs(prepared.training.features[:40]))
  assert copies["copied_40_train_pixels"].value == 1
  held_out = prepared.measure(("memorization",), Outputs(prepared.held_out.features[:40]))
  assert held_out["copied_40_train_pixels"].value < 0.1
  floor = sample_quality.floor(changed(job, evaluation__reference="train"), prepared)
  assert floor["frechet_distance_40_train_pixels"].value > 0


def test_the_record_says_what_was_compared(job):
  prepared = plan_of(job)
  result = sample_quality.run(job, prepared)
  figures = ("quality", "floor", "self_test")
  assert json.loads(json.dumps({name: result[name] for name in figures}))
  assert result["reference"] == "test, 297 examples" and result["num_samples"] == 40
  assert "frechet_distance_40_test_pixels" in result["quality"] and "copying_z" in str(result)
  assert set(result["self_test"]) == {"frechet_distance_750_train_half_pixels"}
  half = result["self_test"]["frechet_distance_750_train_half_pixels"]["value"]
  assert half < result["floor"]["frechet_distance_40_test_pixels"]["value"]


def test_a_sweep_checks_all_before_it_draws_any(job, monkeypatch):
  options = {"evaluation__sweep__samplers": ("unipc", "unpic")}
  monkeypatch.setattr(samples, "_draw", None)
  with pytest.raises(ConfigError, match="unpic"):
    sweep.run(changed(job, **options), plan_of(job))
  with pytest.raises(ConfigError, match=r"sweep.checkpoints = 5 .*\n.*3, 6"):
    sweep.run(changed(job, evaluation__sweep__checkpoints=(5,)), plan_of(job))


def test_a_sweep_makes_one_row_of_each_combination(job, capsys):
  options = {"checkpoints": (3, 6), "samplers": ("unipc", "ddim"), "num_steps": (2,)}
  options = {f"evaluation__sweep__{name}": value for name, value in options.items()}
  rows = sweep.run(changed(job, **options), plan_of(job, evaluation__metrics=("fid",)))
  combinations = [(row["checkpoint"], row["sampler"], row["num_steps"]) for row in rows]
  assert combinations == [(s, n, 2) for s in (3, 6) for n in ("unipc", "ddim")]
  results = job.workdir / "results"
  assert json.loads((results / "sweep.json").read_text())["rows"] == rows
  assert (results / "sweep.png").is_file() and capsys.readouterr().out.count("unipc") == 2
  assert len({str(row["quality"]) for row in rows}) == 4


def test_watching_ends_with_the_training_or_with_patience(job, monkeypatch, capsys):
  seen = []
  evaluate = lambda job: seen.append(job.step) or {"checkpoint_step": job.step}
  monkeypatch.setattr(watch.jobs, "run_evaluate", evaluate)
  monkeypatch.setattr(watch.records, "summary", lambda *_: "a table")
  appearing = iter([[], [3], [3], [3, 6]])
  monkeypatch.setattr(watch, "complete_steps", lambda _: next(appearing))
  monkeypatch.setattr(watch, "PAUSE", 0.0)
  newest = {3: [3], 6: [3, 6]}
  steps = iter([3, 6])

  def start(config, workdir, train):
    return dataclasses.replace(job, step=newest[next(steps)][-1])

  monkeypatch.setattr(watch.trained, "start", start)
  assert watch.run(job.experiment.config, job.workdir, 1.0)["evaluate"]["checkpoint_step"] == 6
  assert seen == [3, 6]
  monkeypatch.setattr(watch, "complete_steps", lambda _: [])
  assert watch.run(job.experiment.config, job.workdir, 1e-4) == {}
  assert "stopped waiting" in capsys.readouterr().out
