"""The command line and the configuration of a workdir: what is refused, and with which words."""

import json

import pytest
from tiny import tiny_config

import settings
from errors import ConfigError
from experiment import build


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--config.training.batch_sise=8", ["no field 'batch_sise'", "batch_size", "did you mean"]),
    ("--config.trainig.batch_size=8", ["no field 'trainig'", "--config.training"]),
    ("--config.training.batch_size.x=8", ["no field 'x'"]),
    ("--config.training.batch_size=abc", ["'abc'", "int", "64"]),
    ("--config.training.batch_size=1e3", ["'1e3'", "int"]),
    ("--config.training.dequantize=maybe", ["'maybe'", "bool"]),
    ("--config.optimizer.learning_rate=fast", ["'fast'", "float"]),
    ("--config.model.args.ch_mult=a", ["'a'", "tuple"]),
    ("--config.training=8", ["is a section", "batch_size"]),
    ("--config=configs/none.py", ["configs/none.py", "configs/digits.py"]),
    ("--config=configs/digits.py:vpp", ["'vpp'", "'sub_vp'", "'ve'", "'vp'"]),
  ],
)
def test_a_wrong_argument_is_named_with_the_legal_ones(argument, words):
  with pytest.raises(ConfigError) as error:
    settings.check_command_line(["main.py", argument])
  assert all(word in str(error.value) for word in words), str(error.value)


def test_a_value_may_stand_apart_from_its_flag():
  with pytest.raises(ConfigError, match="'abc'"):
    settings.check_command_line(["main.py", "--config.training.batch_size", "abc"])


def test_right_arguments_pass():
  fields = ("optimizer.learning_rate=1", "model.args.ch_mult=1,2,2", "sde.name=ve", "seed=3")
  settings.check_command_line(
    ["main.py", "--workdir=x", *[f"--config.{field}" for field in fields]]
  )


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"sde__name": "vpp"}, ["sde.name", "'vpp'", "'sub_vp'"]),
    ({"sde__name": "ve"}, ["sde.args.beta", "sigma_max", "--config=<file>"]),
    ({"parameterization__output": "eps"}, ["parameterization.output", "'noise'"]),
    ({"parameterization__c_noise": "time"}, ["parameterization.c_noise", "'t999'"]),
    ({"parameterization__c_noise": "index"}, ["parameterization.c_noise", "grid"]),
    ({"model__name": "unet"}, ["model.name", "'ddpm'"]),
    ({"model__args__ch_mult": (1, 1, 1, 1, 1)}, ["(8, 8)", "16", "ch_mult"]),
    ({"loss__weighting": "elboo"}, ["loss.weighting", "'elbo'"]),
    ({"loss__time_sampler": "x"}, ["loss.time_sampler", "'importance'"]),
    ({"loss__time_sampler": "levels"}, ["loss.time_sampler", "'vp'", "levels"]),
    ({"loss__objective": "x"}, ["loss.objective", "'denoising'", "'hybrid'"]),
    ({"loss__objective": "hybrid"}, ["loss.objective = 'hybrid'", "sde.name"]),
    ({"loss__label_dropout": 0.1}, ["loss.label_dropout = 0.1", "no class"]),
    ({"loss__options": {"elbo": {"gamma": 1.0}}}, ["loss.options.elbo.gamma"]),
    ({"optimizer__name": "adamm"}, ["optimizer.name", "'adamw'", "'lion'"]),
    ({"optimizer__options": {"adam": {"b3": 0.9}}}, ["optimizer.options.adam.b3", "b1, b2"]),
    ({"optimizer__schedule": "x"}, ["optimizer.schedule", "'cosine'"]),
    (
      {"optimizer__schedule": "polynomial_schedule"},
      ["schedule_options.polynomial_schedule.end_value", "it has no default"],
    ),
    ({"ema__use": 1}, ["ema.use = 1", "below 1"]),
    ({"ema__half_life_images": ()}, ["ema.half_life_images", "at least"]),
    ({"data__augment": 0.1}, ["data.augment = 0.1", "model.args.augment_dim"]),
    ({"training__fsdp": 3}, ["training.fsdp = 3", "1, 2, 4"]),
    ({"training__wandb": "x"}, ["training.wandb = 'x'", "pip install wandb"]),
    ({"training__max_skipped": 0}, ["training.max_skipped", "above 0"]),
    ({"optimizer__learning_rate": -1.0}, ["optimizer.learning_rate", "-1.0", "above 0"]),
    ({"training__num_steps": 0}, ["training.num_steps", "0", "above 0"]),
    ({"training__batch_size": 6}, ["training.batch_size", "6", "4 devices", "4 or 8"]),
    ({"sampling__batch_size": 7}, ["sampling.batch_size", "4 devices"]),
    ({"likelihood__kind": "bound"}, ["likelihood.kind", "'exact', 'variational'"]),
    ({"likelihood__dequantization": "x"}, ["likelihood.dequantization", "'truncated_normal'"]),
    ({"sampling__sampler": "ddpm"}, ["sampling.sampler", "'ancestral'"]),
    ({"sampling__options__ancestral__variance": "big"}, ["variance", "'posterior'"]),
    (
      {"sampling__options__ancestral": {"eta": 1.0}},
      ["sampling.options.ancestral.eta", "variance"],
    ),
    ({"sampling__spacing": "x"}, ["sampling.spacing", "'karras'"]),
    ({"sampling__spacing": "trained"}, ["spacing = 'trained'", "levels"]),
    ({"sampling__skip": 1.0}, ["sampling.skip = 1.0", "below 1"]),
    ({"sampling__init": "data"}, ["sampling.init", "'unit_uniform'"]),
    ({"sampling__sampler": "reverse_sde", "sampling__skip": 0.1}, ["sampling.skip", "reverse_sde"]),
    (
      {"sampling__sampler": "reverse_sde", "sampling__options__reverse_sde": {"num_steps": 5}},
      ["reverse_sde.num_steps = 5", "exponential"],
    ),
    (
      {
        "sampling__sampler": "adaptive_reverse_sde",
        "sampling__options__adaptive_reverse_sde": {"solver": "sea"},
      },
      ["adaptive_reverse_sde.solver = 'sea'", "'heun', 'shark', 'sra1'"],
    ),
    (
      {"sampling__options__ancestral__variance": "learned"},
      ["ancestral.variance = 'learned'", "model.args.learned_variance=True"],
    ),
    ({"sampling__denoise": "x"}, ["sampling.denoise", "'tweedie'"]),
    ({"likelihood__divergence": "x"}, ["likelihood.divergence", "'exact'"]),
    ({"likelihood__solver": "x"}, ["likelihood.solver", "'tsit5'"]),
    ({"likelihood__split": "dev"}, ["likelihood.split", "'test'"]),
    ({"data__name": "cifar"}, ["data.name", "'digits'"]),
    ({"data__image_size": 16}, ["data.image_size", "16", "as they are stored"]),
    ({"data__centered": False}, ["model.args.centered = True", "False, as data.centered"]),
    ({"model__args": {"num_classes": 3}}, ["model.args.num_classes", "3", "the 10 classes"]),
  ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_compiles(changes, words):
  with pytest.raises(ConfigError) as error:
    build(tiny_config(**changes))
  assert all(word in str(error.value) for word in words), str(error.value)


def test_data_that_cannot_be_loaded_are_refused_last():
  with pytest.raises(ConfigError, match="'tfds:cifar10' is not in data"):
    _ = build(settings.load_config_file("configs/ddpm/cifar10.py")).dataset


@pytest.mark.parametrize("sampler, repeated", [("annealed_langevin", 1), ("ancestral", 0)])
def test_langevin_dynamics_visit_the_largest_level_too(sampler, repeated):
  times = build(tiny_config(sampling__sampler=sampler)).times
  assert len(times) == 5 + repeated and (times[0] == times[1]) == repeated


@pytest.mark.parametrize("denoise", ["mean", "tweedie", "none"])
def test_every_way_to_denoise_builds(denoise):
  build(tiny_config(sampling__denoise=denoise))


@pytest.mark.parametrize("process", ["vp", "sub_vp", "ve"])
def test_every_variant_of_every_configuration_builds(process):
  build(settings.load_config_file(f"configs/digits.py:{process}"))


def test_a_saved_configuration_is_read_back_as_it_was(tmp_path):
  settings.save(tiny_config(), tmp_path)
  assert settings.flatten(settings.read(tmp_path)) == settings.flatten(tiny_config())


def resolve(workdir, mode="run", explicit=False, given=None, **overrides):
  overrides = {k.replace("__", "."): v for k, v in overrides.items()}
  return settings.resolve(given or tiny_config(), explicit, overrides, workdir, mode)


def test_the_saved_configuration_is_used_with_the_overrides(tmp_path, capsys):
  settings.save(tiny_config(seed=5), tmp_path)
  config = resolve(tmp_path, "sample", sampling__num_steps=9)
  assert (config.seed, config.sampling.num_steps) == (5, 9)
  assert "sampling.num_steps: 4 -> 9" in capsys.readouterr().out


def test_what_the_weights_depend_on_cannot_change(tmp_path):
  settings.save(tiny_config(), tmp_path)
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(ConfigError, match=r"model.args.nf: 8 here, 16 asked for"):
    resolve(tmp_path, model__args__nf=16)
  with pytest.raises(ConfigError, match=r"adam.b1: 0.9 here, 0.5 asked for"):
    resolve(tmp_path, explicit=True, given=tiny_config(optimizer__options__adam__b1=0.5))
  assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("mode", ["sample", "likelihood", "evaluate"])
def test_modes_that_need_a_trained_run_refuse_an_empty_workdir(tmp_path, mode):
  for workdir in (tmp_path, tmp_path / "missing"):
    with pytest.raises(ConfigError, match=r"--workdir = .*\n.*trained before\n.*train first"):
      resolve(workdir, mode)
  assert not (tmp_path / "missing").exists()


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match=r"--workdir = .*file/run"):
    settings.save(tiny_config(), tmp_path / "file" / "run")


def test_the_digest_follows_what_a_result_depends_on():
  digest = settings.digest(tiny_config(), "sampling")
  assert digest == settings.digest(
    tiny_config(likelihood__rtol=0.5, training__log_every=7), "sampling"
  )
  assert digest != settings.digest(tiny_config(sampling__num_steps=9), "sampling")
  assert digest != settings.digest(tiny_config(seed=1), "sampling")


def test_the_command_line_may_say_import():
  """ "import" is a word of Python, which the flag library refuses in a field's name."""
  argv = ["main.py", "--mode=import", "--config.import.path=a.pth"]
  assert settings.check_command_line(argv)[-1] == "--config.import_.path=a.pth"
  with pytest.raises(ConfigError, match=r"did you mean --config\.import_\.path"):
    settings.check_command_line(["main.py", "--config.import.paht=a.pth"])


def test_fields_newer_than_a_saved_configuration_have_their_defaults(tmp_path):
  config = settings.load_config_file(settings.DEFAULT_CONFIG)
  old = json.loads(config.to_json())
  del old["sampling"]["skip"], old["import_"], old["data"]["centered"]
  (tmp_path / "config.json").write_text(json.dumps(old))
  assert settings.flatten(settings.read(tmp_path)) == settings.flatten(config)
