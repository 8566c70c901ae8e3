"""What of `config.guidance` cannot work is told before anything compiles, what can work is not."""

import jax
import pytest
from PIL import Image
from test_main import call
from tiny import tiny_arguments, toy_config

import tasks
from errors import ConfigError
from experiment import outline

DIGITS = {"data__name": "digits", "data__dir": "runs/data", "model__args__hidden": (16,)}
CLASSES = DIGITS | {"model__args__num_classes": 10, "loss__label_dropout": 0.1}
ALWAYS_TOLD = CLASSES | {"loss__label_dropout": 0.0}
GMM, UNLABELLED = {"data__name": "toy:gmm"}, {"data__name": "toy:checkerboard"}
COMPILED = "/jax/core/compile/backend_compile_duration"


def settled(base, **changes):
  """The parts of a run; changes without a section's name are those of `guidance`."""
  named = lambda k: k if k.startswith("sampling__") else f"guidance__{k}"
  return outline(toy_config(**base | {named(k): v for k, v in changes.items()}))


def latent(**options):
  return {"task": "interpolation", "sampling__sampler": "ddim"} | options


# base, changes of `config.guidance` (and others by their whole names), words of the message
REFUSED = [
  (DIGITS, {"task": "inpaint"}, "guidance.task = 'inpaint'", "'replacement'", "mend:"),
  (DIGITS, {"classes": "cfg"}, "guidance.classes = 'cfg'", "'classifier_free'", "mend:"),
  (DIGITS, {"task": "dps", "operator": "blur"}, "guidance.operator = 'blur'", "'deblurring'"),
  (DIGITS, {"task": "dps", "operator": "no:no"}, "guidance.operator = 'no:no'", "imported"),
  (
    DIGITS,
    {"task": "repaint", "options__repaint__steps": 3},
    "guidance.options.repaint.steps = 3",
    "legal: num_resamplings",
  ),
  (
    CLASSES,
    {"classes": "classifier_free", "options__classifier_free__weight": 3.0},
    "guidance.options.classifier_free.weight = 3.0",
    "legal: scale, low, high",
  ),
  (
    DIGITS,
    {"task": "dps", "operators__inpainting__box": 3},
    "guidance.operators.inpainting.box is not an option",
    "legal: mask",
  ),
  # masks and operators that do not fit the data
  (
    DIGITS,
    {"task": "dps", "operators__inpainting__mask": "box:0,0,9,1"},
    "guidance.operators.inpainting.mask = 'box:0,0,9,1'",
    "(8, 8) positions",
  ),
  (
    DIGITS,
    {"task": "dps", "operators__inpainting__mask": "bottom"},
    "guidance.operators.inpainting.mask = 'bottom'",
    "no such file",
  ),
  (GMM, {"task": "dps"}, "guidance.operators.inpainting.mask = 'lower_half'", "halves are those"),
  (
    DIGITS,
    {"task": "dps", "operator": "colorization"},
    "guidance.operator = 'colorization'",
    "3 channels",
    "(8, 8, 1)",
  ),
  (
    DIGITS,
    {"task": "dps", "operator": "super_resolution", "operators__super_resolution__factor": 3},
    "guidance.operators.super_resolution.factor = 3",
    "the nearest are 2 and 4",
  ),
  # the measurement's noise
  (DIGITS, {"task": "pigdm", "noise_std": -0.1}, "guidance.noise_std = -0.1", "from 0 up"),
  *[
    (DIGITS, {"task": name, "noise_std": 0.1}, "guidance.noise_std = 0.1", f"0 with {name}", "smc")
    for name in ("null_space", "replacement", "repaint", "dps")
  ],
  # samplers that a method cannot use
  *[
    (
      DIGITS,
      {"task": task, "sampling__sampler": sampler},
      f"sampling.sampler = {sampler!r}",
      f"guidance.task={task}, such as ancestral",
    )
    for task in ("repaint", "dps")
    for sampler in ("probability_flow", "reverse_sde", "adaptive_reverse_sde")
  ],
  (DIGITS, {"task": "smc", "sampling__sampler": "ddim"}, "sampling.sampler = 'ddim'", "ancestral"),
  (
    DIGITS,
    {"task": "image_to_image"},
    "sampling.skip = 0.0",
    "above 0 for guidance.task=image_to_image",
    "mend:  --config.sampling.skip=0.5",
  ),
  (DIGITS, latent(sampling__sampler="ancestral"), "sampling.sampler = 'ancestral'", "ddim"),
  (
    DIGITS,
    latent(task="latent_edit", sampling__options__ddim__eta=1.0),
    "sampling.sampler = 'ddim'",
    "one without noise for guidance.task=latent_edit",
  ),
  (DIGITS, latent(sampling__skip=0.5), "sampling.skip = 0.5", "0 for guidance.task=interpolation"),
  *[
    (
      DIGITS,
      {"task": name, "sampling__skip": 0.5},
      "sampling.skip = 0.5",
      f"0 for guidance.task={name}",
    )
    for name in tasks.METHODS
  ],
  # how many
  (DIGITS, {"num_inputs": 0}, "guidance.num_inputs = 0", "from 1 up"),
  (DIGITS, latent(num_inputs=1), "guidance.num_inputs = 1", "2 or more"),
  (DIGITS, {"num_results": -1}, "guidance.num_results = -1", "from 1 up"),
  (
    DIGITS,
    {"task": "smc", "options__smc__num_particles": 0},
    "guidance.options.smc.num_particles = 0",
    "above 0",
  ),
  (
    DIGITS,
    {"task": "repaint", "options__repaint__num_resamplings": 0},
    "guidance.options.repaint.num_resamplings = 0",
    "above 0",
  ),
  (
    DIGITS,
    {"task": "pigdm", "options__pigdm__data_std": 0.0},
    "guidance.options.pigdm.data_std = 0.0",
    "above 0",
  ),
  # classes
  (CLASSES, {"labels": (3, 10)}, "guidance.labels = (3, 10)", "from 0 to 9"),
  (CLASSES, {"labels": (-1,)}, "guidance.labels = (-1,)", "from 0 to 9"),
  (CLASSES, {"labels": ("3",)}, "guidance.labels = ('3',)", "from 0 to 9"),
  (DIGITS, {"labels": (3,)}, "guidance.labels = (3,)", "nothing is told", "classes=classifier"),
  (UNLABELLED, {"labels": (3,)}, "guidance.labels = (3,)", "nothing is told of classes"),
  (UNLABELLED, {"classes": "classifier"}, "guidance.classes = 'classifier'", "no class labels"),
  (
    DIGITS,
    {"classes": "classifier_free"},
    "guidance.classes = 'classifier_free'",
    "the network has no classes",
    "mend:  train with model.args.num_classes",
  ),
  (
    ALWAYS_TOLD,
    {"classes": "classifier_free"},
    "guidance.classes = 'classifier_free'",
    "loss.label_dropout = 0",
    "loss.label_dropout=0.1",
  ),
  (ALWAYS_TOLD, {"task": "replacement"}, "guidance.labels = ()", "label_dropout = 0"),
  (ALWAYS_TOLD, latent(labels=(3,)), "guidance.task = 'interpolation'", "never told of no class"),
  (
    CLASSES,
    {"classes": "classifier_free", "task": "replacement"},
    "guidance.labels = ()",
    "guidance.classes=classifier_free",
  ),
]


@pytest.fixture(scope="module")
def compiled():
  """The times that compilations took, for ever longer."""
  seen = []
  listen = lambda event, seconds, **_: seen.append(seconds) if event == COMPILED else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  jax.jit(lambda x: 3 * x - 7)(1.0)
  assert len(seen) == 1, "the event has another name"
  return seen


@pytest.mark.parametrize("base, changes, field, words", [(b, c, f, w) for b, c, f, *w in REFUSED])
def test_what_cannot_work_is_told_before_anything_compiles(base, changes, field, words, compiled):
  before = len(compiled)
  with pytest.raises(ConfigError) as error:
    settled(base, **changes)
  message = str(error.value)
  assert message.startswith(field) and "\n  legal: " in message, message
  assert all(word in message for word in words), message
  assert len(compiled) == before


def test_a_mask_of_another_size_is_told(tmp_path):
  Image.new("L", (9, 8), "white").save(tmp_path / "mask.png")
  with pytest.raises(ConfigError) as error:
    settled(DIGITS, task="dps", operators__inpainting__mask=str(tmp_path / "mask.png"))
  assert all(
    word in str(error.value)
    for word in ("guidance.operators.inpainting.mask", "8x8 pixels; it has 9x8", "mend:  resize")
  )


ACCEPTED = [
  *[(DIGITS, {"task": name}) for name in tasks.METHODS],
  *[(CLASSES, {"task": name, "labels": (9, 0)}) for name in tasks.METHODS],
  *[(DIGITS, {"task": name, "noise_std": 0.1}) for name in ("pigdm", "moment_matching", "smc")],
  *[
    (DIGITS, {"task": name, "sampling__sampler": "probability_flow"})
    for name in ("null_space", "replacement", "pigdm", "moment_matching")
  ],
  (GMM, {"task": "dps", "operators__inpainting__mask": "box:0,1"}),
  (DIGITS, {"task": "image_to_image", "sampling__skip": 0.5}),
  *[(DIGITS, latent(sampling__sampler=name)) for name in tasks.DETERMINISTIC],
  (DIGITS, latent(sampling__sampler="edm", sampling__options__edm__churn_max=50.0)),
  (CLASSES, latent(task="latent_edit", labels=(3,), classes="classifier_free")),
  (GMM, {"classes": "classifier"}),
  (GMM, {"classes": "classifier", "labels": (1,)}),
  (ALWAYS_TOLD, {"labels": (3,), "task": "replacement"}),
  (ALWAYS_TOLD, {}),
  (CLASSES, {"classes": "classifier_free"}),
]


@pytest.mark.parametrize("base, changes", ACCEPTED)
def test_what_can_work_is_accepted(base, changes):
  settled(base, **changes)


@pytest.mark.parametrize("mode", ["run", "evaluate"])
@pytest.mark.parametrize("task", sorted(tasks.TASKS))
def test_only_sampling_carries_out_a_task(task, mode):
  config = toy_config(guidance__task=task)
  tasks.refuse_task(config, "sample")
  tasks.refuse_task(config, "train")
  if task == "none":
    tasks.refuse_task(config, mode)
    return
  with pytest.raises(ConfigError, match=f"guidance.task = '{task}' is for --mode=sample.*{mode}"):
    tasks.refuse_task(config, mode)


def test_the_options_of_a_method_are_its_own():
  config = toy_config(guidance__task="pigdm", guidance__noise_std=0.1)
  assert tasks.method_options(config) == {"data_std": 1.0, "noise_std": 0.1}
  config = toy_config(guidance__task="replacement")
  assert tasks.method_options(config) == {}
  for name, method in tasks.METHODS.items():
    tree = toy_config().guidance.options.get(name, {})
    assert set(tree) <= set(method.options), name


def test_the_command_line_has_no_traceback(tmp_path):
  arguments = tiny_arguments(guidance__labels=(3,))
  code, output = call(f"--workdir={tmp_path}/none", "--mode=train", *arguments)
  assert code == 1 and "Traceback" not in output, output
  assert "error: guidance.labels = (3,) is not usable." in output and "\n  mend:  " in output
  assert not list(tmp_path.iterdir())
