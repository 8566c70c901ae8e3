"""The job of conditional samples: what is known stays, what is hidden does not leak, results by
index, labels, latents, what is written.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_sample_quality import changed
from tiny import toy_config

import settings
import tasks
from errors import ConfigError
from evaluation import conditional, jobs, records, sample_quality, samples, train_classifier
from evaluation.batches import keys_of
from evaluation.features import Extractor, Outputs
from evaluation.trained import Job
from experiment import Experiment, Weights, abstract_init, build
from operators import colour_basis
from sde_lib import fold_in, marginal, normal

SMALL = {"data__dir": "runs/data", "model__args__hidden": (32,), "sampling__num_steps": 6}
SMALL |= {"guidance__num_inputs": 2, "guidance__num_results": 3}
SMALL |= {"guidance__options__smc__num_particles": 4, "parameterization__sigma_data": 0.5}
DIGITS = SMALL | {"data__name": "digits"}
CLASSES = DIGITS | {"model__args__num_classes": 10, "loss__label_dropout": 0.1}
EXACT = {"rtol": 1e-6, "atol": 1e-6}
FLOW = {f"sampling__options__probability_flow__{k}": v for k, v in EXACT.items()}
FLOW |= {"sampling__sampler": "probability_flow"}
FLOW |= {f"likelihood__{k}": v for k, v in EXACT.items()}


def untrained(workdir, scale, **options):
  """A job of random weights; with scale 0 the score is that of N(0, sigma_data^2)."""
  experiment, rng = build(toy_config(**options)), np.random.default_rng(0)
  shapes = abstract_init(experiment.model, experiment.spec.shape)[1]
  draw = lambda leaf: rng.normal(scale=scale, size=leaf.shape).astype(np.float32)
  return Job(experiment, jax.tree.map(draw, shapes), 0, workdir)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  return untrained(tmp_path_factory.mktemp("digits"), 0.1, **DIGITS)


@pytest.fixture(scope="module")
def conditional_job(tmp_path_factory):
  return untrained(tmp_path_factory.mktemp("classes"), 0.1, **CLASSES)


def asked(job, workdir=None, num_devices=4, **options):
  """`changed` with the fields of `guidance` by their own names."""
  own = job.experiment.config.guidance
  named = lambda k: f"guidance__{k}" if k.split("__")[0] in own else k
  return changed(job, workdir, num_devices, **{named(k): v for k, v in options.items()})


def in_model_units(job, values):
  return np.asarray(job.experiment.transform.forward(jnp.asarray(values)))


def drawn(job, **options):
  """Results [n, k, *d] in model units, of inputs [n, *d] of the test split or given ones."""
  x = options.pop("x", None)
  wanted = asked(job, **options)
  if x is None:
    x = in_model_units(wanted, wanted.experiment.dataset.splits["test"]["image"][:2])
  return x, conditional._results(wanted, x)[0]


def written(folder):
  return dict(np.load(folder / "results" / "conditional.npz"))


# the others have the hooks of these two
REPEATED = {name: pytest.mark.exhaustive for name in ("null_space", "pigdm")}
METHODS = [pytest.param(name, marks=REPEATED.get(name, ())) for name in tasks.METHODS]


@pytest.mark.parametrize("task", METHODS)
def test_known_pixels_stay_and_hidden_ones_do_not_leak(job, task):
  """USERS F8: what the mask hides of an input changes no bit of its results."""
  image = np.asarray(job.experiment.dataset.splits["test"]["image"][:2])
  hidden = image.copy()
  hidden[:, 4:] = 16 - hidden[:, 4:]
  values = [drawn(job, x=in_model_units(job, k), task=task)[1] for k in (image, hidden)]
  np.testing.assert_array_equal(*values)
  stored = np.asarray(job.experiment.transform.inverse(jnp.asarray(values[0])))
  known = np.broadcast_to(image[:, None, :4], stored[:, :, :4].shape)
  np.testing.assert_array_equal(stored[:, :, :4], known)
  unknown = stored[:, :, 4:]
  assert (unknown != image[:, None, 4:]).any() and (unknown.std(1) > 0).mean() > 0.5


def test_what_is_written(job, tmp_path):
  record = conditional.run(asked(job, tmp_path, task="repaint"))
  results = tmp_path / "results"
  assert json.loads((results / "sample.json").read_text()) == json.loads(json.dumps(record))
  fields = {"task": "repaint", "operator": "inpainting", "classes": "none", "num_samples": 6}
  fields |= {"nfe": 60, "sampler": "ancestral", "seed": 0, "grid": "conditional.png"}
  assert fields.items() <= record.items() and record["largest_measurement_error"] == 0
  assert record["rms_difference"] > record["rms_difference_of_mean"] > 0
  with Image.open(results / "conditional.png") as picture:
    assert min(picture.size) > 100
  arrays, split = written(tmp_path), job.experiment.dataset.splits["test"]["image"]
  assert arrays["result"].shape == (2, 3, 8, 8, 1) and arrays["nfe"].shape == (2, 3)
  np.testing.assert_array_equal(arrays["input"], split[[0, len(split) // 2]])


@pytest.mark.parametrize("operator", ["super_resolution", "deblurring"])
def test_other_measurements_are_met(job, operator):
  options = {"task": "null_space", "operator": operator}
  x, results = drawn(job, **options)
  config = asked(job, **options).experiment.config
  errors = conditional._errors(x, results, tasks.operator_of(config, x.shape[1:]))
  assert errors["largest_measurement_error"] < 2e-6 < 0.1 < errors["rms_difference"]


def test_the_start_shares_its_noise_with_no_step(job, monkeypatch):
  """What is measured starts from noise of its own, not from that of the prior or of a step."""
  experiment, starts = asked(job, task="null_space").experiment, []
  operator = tasks.operator_of(experiment.config, experiment.spec.shape)
  keys, y = keys_of(jax.random.key(0), np.arange(3)), jnp.zeros((3, 8, 8, 1))
  monkeypatch.setattr(Experiment, "draw", lambda *_, init, **__: (starts.append(init) or init, 0))
  conditional._measured(experiment, operator, Weights(job.params), keys, y, None)
  known, sigma = operator.forward(starts[0]), marginal(experiment.sde, experiment.sde.t_max)[1]
  for i in range(8):
    noise = sigma * operator.forward(normal(fold_in(keys, i), y.shape))
    assert jnp.abs(known - noise).max() > 0.1


def test_an_operator_of_the_users_own_is_met(job, tmp_path, monkeypatch):
  """It is tested on numbers, which needs to be outside of what jax traces."""
  (tmp_path / "upper_rows.py").write_text(
    "import jax.numpy as jnp\n\n"
    "def make(shape):\n"
    "  missing = jnp.zeros((1, 4, 8, 1))\n"
    "  up = lambda y: jnp.concatenate([y, jnp.broadcast_to(missing, y.shape)], 1)\n"
    "  return lambda x: x[:, :4], up\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  wanted = asked(job, tmp_path / "run", task="dps", operator="upper_rows:make")
  assert conditional.run(wanted)["largest_measurement_error"] == 0


@pytest.mark.parametrize("task", ["replacement", "smc"])
def test_results_depend_on_their_index_alone(job, task):
  """On none of the batch, the devices, the other inputs; of particles a group stays together."""
  x, straight = drawn(job, task=task)
  _, alone = drawn(job, task=task, x=x[:1], num_devices=1, sampling__batch_size=12)
  np.testing.assert_allclose(alone, straight[:1], atol=2e-5)
  assert abs(straight[:, 0] - straight[:, 1]).max() > 0.1


def test_particles_have_noise_of_their_own(job):
  """Else a group of them is one particle, which resampling leaves as it is."""
  one, four = (drawn(job, task="smc", options__smc__num_particles=n)[1] for n in (1, 4))
  moved = abs(one - four).max((2, 3, 4)) > 0.1
  assert 0.3 < moved.mean()


def test_the_more_is_skipped_the_closer_to_the_input(job):
  options = {"task": "image_to_image", "sampling__num_steps": 20}
  differences = []
  for skip in (0.3, 0.9):
    x, results = drawn(job, sampling__skip=skip, **options)
    differences.append(np.sqrt(np.square(results - x[:, None]).mean()))
  assert differences[0] > 4 * differences[1] > 0


def test_a_latent_without_guidance_is_decoded_to_its_input(job):
  x, results = drawn(job, task="latent_edit", **FLOW)
  np.testing.assert_allclose(results, np.broadcast_to(x[:, None], results.shape), atol=1e-4)


def test_an_interpolation_begins_at_the_input_and_ends_at_the_next(job):
  x, results = drawn(job, task="interpolation", **FLOW)
  np.testing.assert_allclose(results[:, 0], x, atol=1e-4)
  np.testing.assert_allclose(results[:, -1], np.roll(x, -1, 0), atol=1e-4)
  np.testing.assert_allclose(results[0, 1], results[1, 1], atol=1e-4)
  assert abs(results[0, 1] - x).max((1, 2, 3)).min() > 0.1


def test_labels_are_in_turn_over_the_results(conditional_job):
  of = lambda *labels: drawn(conditional_job, task="replacement", labels=labels)[1]
  both, four, seven = of(4, 7), of(4), of(7)
  np.testing.assert_allclose(both[:, ::2], four[:, ::2], atol=1e-6)
  np.testing.assert_allclose(both[:, 1], seven[:, 1], atol=1e-6)
  assert abs(four - seven).max() > 1e-2


def test_labels_are_in_turn_over_the_samples(conditional_job, tmp_path):
  wanted = asked(conditional_job, tmp_path, labels=(4, 7))
  jobs.run_sample(wanted)
  found, keys = (
    np.load(tmp_path / "results" / "samples.npz"),
    keys_of(jax.random.key(0), np.arange(8)),
  )
  np.testing.assert_array_equal(found["label"], [4, 7] * 6)
  experiment, keys = wanted.experiment, keys_of(jax.random.key(0), np.arange(8))
  x, _ = experiment.sampler(Weights(wanted.params), keys, np.full(8, 4, np.int32))
  four = np.asarray(experiment.transform.inverse(x))
  same = (four == found["image"][:8]).all((1, 2, 3))
  np.testing.assert_array_equal(same, [True, False] * 4)


def test_without_labels_samples_are_of_random_classes(conditional_job, job):
  keys, index = keys_of(jax.random.key(0), np.arange(400)), np.arange(400)
  labels = conditional_job.experiment.asked(keys, index)
  assert set(np.asarray(labels)) == set(range(10)) and np.bincount(labels).max() < 80
  np.testing.assert_array_equal(conditional_job.experiment.asked(keys[7:], index[7:]), labels[7:])
  assert job.experiment.asked(keys, index) is None


def test_classifier_free_guidance_costs_two_evaluations(conditional_job):
  options = {"labels": (3,), "task": "replacement", "options__classifier_free__scale": 3.0}
  x, plain = drawn(conditional_job, **options)
  guided = conditional._results(asked(conditional_job, classes="classifier_free", **options), x)
  assert set(guided[1].flat) == {12} and abs(guided[0] - plain).max() > 0.1


def test_the_noise_of_a_measurement_is_of_splits_alone(job, tmp_path):
  image = job.experiment.dataset.splits["test"]["image"]
  np.save(tmp_path / "image.npy", image)
  x = in_model_units(job, image)
  keys = keys_of(jax.random.key(0), np.arange(3 * len(x)))
  options = {"task": "pigdm", "operator": "super_resolution", "noise_std": 0.3}
  measured = {}
  for inputs in ("test", str(tmp_path / "image.npy")):
    wanted = asked(job, inputs=inputs, **options)
    states = conditional._begin(wanted, Weights(job.params), x, keys).states
    measured[inputs] = np.asarray(states).reshape(len(x), 3, 4, 4, 1)
  noisy, exact = measured.values()
  blocks = x.reshape(len(x), 1, 4, 2, 4, 2, 1).mean((3, 5))
  np.testing.assert_allclose(exact, np.broadcast_to(blocks, exact.shape), atol=1e-6)
  np.testing.assert_array_equal(noisy[:, 0], noisy[:, 2])
  noise = (noisy - exact)[:, 0]
  assert noise.std() == pytest.approx(0.3, rel=0.05) and abs(noise.mean()) < 0.02


def test_the_digests_of_results_without_guidance_stay():
  digest = lambda mode, **options: settings.digest(
    toy_config(**{f"guidance__{k}": v for k, v in options.items()}), *records.SECTIONS[mode]
  )
  for mode in ("sample", "evaluate"):
    unused = {"num_results": 9, "noise_std": 0.5, "options__dps__step_size": 3.0}
    assert digest(mode) == digest(mode, **unused)
    changes = ({"task": "dps"}, {"task": "dps", **unused}, {"labels": (1,)})
    changes += ({"classes": "classifier"},)
    assert len({digest(mode, **options) for options in ({}, *changes)}) == 5
  assert digest("likelihood") == digest("likelihood", task="dps")


GMM = SMALL | {"data__name": "toy:gmm", "parameterization__sigma_data": 5.0}
GMM |= {"sampling__num_steps": 50, "sampling__batch_size": 400, "evaluation__num_samples": 400}
GMM |= {"evaluation__num_levels": 4, "evaluation__num_examples": 400}
GMM |= {"evaluation__batch_size": 10_000, "classifier__args__hidden": (32, 32)}
GMM |= {f"classifier__{k}": 300 for k in ("num_steps", "log_every", "checkpoint_every")}


@pytest.fixture(scope="module")
def gmm(tmp_path_factory):
  """Modes at (5, 5) and (-5, -5), their classifier, and a score that knows of none."""
  workdir = tmp_path_factory.mktemp("gmm")
  train_classifier.run(toy_config(**GMM), workdir)
  return untrained(workdir, 0.0, **GMM)


def test_a_classifier_guides_to_its_mode(gmm):
  options = {"classes": "classifier", "labels": (1, 1, 0)}
  share = lambda **options: samples.draw(asked(gmm, **options), 400).values.sum(1) < 0
  right = share(**options) == (np.arange(400) % 3 < 2)
  assert share(classes="classifier", options__classifier__scale=0.0).mean() == pytest.approx(
    0.5, abs=0.1
  )
  assert right.mean() > 0.95


def test_the_share_that_a_classifier_finds_as_asked(gmm, monkeypatch, tmp_path):
  """By Bayes' rule in the place of the trained judge."""
  mode = lambda values: np.eye(2, dtype=np.float32)[(values.sum(1) < 0).astype(int)]
  judge = Extractor("classifier", "exact", lambda values: Outputs(values, mode(values)))
  monkeypatch.setattr(sample_quality, "make_extractor", lambda *_: judge)
  options = {"evaluation__metrics": ("class_agreement",), "data__dir": str(tmp_path)}
  found = []
  for scale in (1.0, 0.0):
    options |= {"classes": "classifier", "options__classifier__scale": scale}
    wanted = asked(gmm, **options)
    result = sample_quality.run(wanted, sample_quality.plan(wanted.experiment, gmm.workdir))
    assert result["floor"]["class_agreement_400_test_classifier"]["value"] == 1
    found.append(result["quality"]["class_agreement_400_test_classifier"]["value"])
  assert found[0] > 0.95 and found[1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
  "options, said",
  [
    ({"evaluation__features": "pixels", "classes": "classifier"}, "evaluation.features=classifier"),
    ({"evaluation__features": "classifier"}, "samples of which classes are asked"),
  ],
)
def test_where_no_class_is_asked_none_is_found(gmm, monkeypatch, options, said):
  name = options["evaluation__features"]
  judge = Extractor(name, "one", lambda x: Outputs(x, np.ones((len(x), 2), np.float32)))
  monkeypatch.setattr(sample_quality, "make_extractor", lambda *_: judge)
  monkeypatch.setattr(sample_quality, "_real", lambda *_: judge.function(np.zeros((400, 2))))
  wanted = asked(gmm, evaluation__metrics=("class_agreement",), **options)
  with pytest.raises(ConfigError, match=said):
    sample_quality.plan(wanted.experiment, gmm.workdir)


def test_an_edit_of_the_latent_goes_to_the_asked_mode(gmm):
  x = np.array([[5.0, 5.0], [4.0, 6.0]], np.float32)
  options = {"classes": "classifier", "labels": (0, 1), "sampling__sampler": "ddim"}
  _, results = drawn(gmm, x=x, task="latent_edit", **options)
  assert (results[:, ::2] > 0).all() and (results[:, 1].sum(1) < 0).all()


def test_samples_of_a_classifier_that_was_trained_further_are_drawn_anew(gmm, monkeypatch):
  wanted = asked(gmm, classes="classifier")
  folder = samples._folder(wanted)
  monkeypatch.setattr(train_classifier, "complete_steps", lambda _: [300, 600])
  assert samples._folder(wanted) != folder
  monkeypatch.undo()
  assert samples._folder(wanted) == folder != samples._folder(asked(gmm))


def test_a_classifier_that_is_not_there_is_told(job, tmp_path, monkeypatch):
  monkeypatch.setattr(conditional, "_begin", None)
  for options in ({"task": "replacement"}, {}):
    with pytest.raises(ConfigError, match=r"mend:  train it first: .*--mode=train_classifier"):
      jobs.run_sample(asked(job, tmp_path, classes="classifier", labels=(3,), **options))
  monkeypatch.setattr(jobs, "_held_out_loss", None)
  with pytest.raises(ConfigError, match=r"mend:  train it first: .*--mode=train_classifier"):
    jobs.run_evaluate(asked(job, tmp_path, classes="classifier"))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
  folder = tmp_path_factory.mktemp("colours")
  values = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
  np.savez(folder / "colours.npz", image=values)
  data = {"data__name": f"npz:{folder}/colours.npz", "data__dir": str(folder)}
  options = {"guidance__operator": "colorization", "guidance__task": "replacement"}
  return untrained(folder, 0.1, **SMALL | data | options)


def test_colours_are_found_and_grey_stays(colours):
  x, results = drawn(colours)
  grey = lambda x: x.astype(np.float64) @ colour_basis()[:, 0]
  np.testing.assert_allclose(grey(results), np.repeat(grey(x)[:, None], 3, 1), atol=1e-6)
  assert abs(results - x[:, None]).max() > 0.1 and results.std(1).mean() > 0.1


def test_a_grey_picture_is_coloured(colours, tmp_path):
  values = np.random.default_rng(1).integers(80, 176, (8, 8), np.uint8)
  Image.fromarray(values).save(tmp_path / "grey.png")
  conditional.run(asked(colours, tmp_path, inputs=str(tmp_path / "grey.png")))
  found = written(tmp_path)
  np.testing.assert_array_equal(found["input"], values[None, ..., None].repeat(3, -1))
  inside = ((found["result"] > 0) & (found["result"] < 255)).all(-1)
  grey = found["result"].mean(-1)
  assert inside.mean() > 0.2 and abs(grey - values[None, None])[inside].max() <= 1
  assert found["result"].std(-1).mean() > 5


def test_a_grey_picture_of_another_shape_is_told(colours, tmp_path, monkeypatch):
  monkeypatch.setattr(conditional, "_results", None)
  Image.new("L", (9, 8)).save(tmp_path / "grey.png")
  with pytest.raises(ConfigError) as error:
    conditional.run(asked(colours, tmp_path, inputs=str(tmp_path / "grey.png")))
  assert all(w in str(error.value) for w in ("guidance.inputs", "(8, 8, 3)", "resize to 8x8"))
