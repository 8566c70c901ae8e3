"""The configuration of a run: the command line, the copy saved in the workdir, and what may differ
between them.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import bases
from errors import ConfigError, check, invalid

UNTRAINED = ("inspect", "validate", "import")  # modes that need nothing trained before
MODES = ("train", "train_classifier", "sample", "likelihood", "evaluate", "run", *UNTRAINED)
DEFAULT_CONFIG = "configs/digits.py"

# What may change between training and later use of its checkpoints: none of it changes what the
# weights mean.
FREE = (
  "sampling",
  "guidance",
  "classifier",
  "likelihood",
  "evaluation",
  "import_",
  "data.dir",
  "data.num_workers",
  "ema.use",
  "ema.post_hoc",
  "ema.snapshot_every",
  "training.num_steps",
  "training.batch_per_device",
  "training.memory_gib",
  "training.steps_per_call",
  "training.fsdp",
  "training.max_skipped",
  "training.log_every",
  "training.sample_every",
  "training.evaluate_every",
  "training.frechet_samples",
  "training.checkpoint_every",
  "training.keep_checkpoints",
  "training.profile_steps",
  "training.peak_tflops",
  "training.wandb",
)


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
  """{"section.field": value} of a nested configuration."""
  flat = {}
  for name, value in config.items():
    nested = isinstance(value, ConfigDict | dict)
    flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
  return flat


def load_config_file(spec: str) -> ConfigDict:
  """`get_config(variant)` of "path.py" or "path.py:variant"."""
  path, _, variant = spec.partition(":")
  files = (p for p in Path("configs").rglob("*.py") if "bases" not in p.parts)
  names = sorted(str(p) for p in files if p.stem != "__init__")
  close = ", ".join([DEFAULT_CONFIG, *difflib.get_close_matches(path, names, 2)])
  legal = f"one of the {len(names)} files below configs/, such as {close}; or one of yours"
  check(Path(path).is_file(), "--config", path, legal)
  module_spec = importlib.util.spec_from_file_location("_config", path)
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  check(hasattr(module, "get_config"), "--config", path, "a file that defines get_config()")
  return module.get_config(variant) if variant else module.get_config()


def _literal(text: str, kind: type) -> bool:
  """Whether the command-line text reads as a value of the field's type."""
  if kind in (str, type(None)):
    return True
  if kind is bool:
    return text.lower() in ("true", "false")
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return False
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if kind in (tuple, list):
    return isinstance(value, tuple | list | int)
  return type(value) is kind


def _field(config: ConfigDict, name: str) -> Any:
  """The value that "config.section.field" has in `config`; one that is not there lists its
  neighbours.
  """
  node, where = config, "--config"
  for part in name.split(".")[1:]:
    legal = sorted(node) if isinstance(node, ConfigDict) else []
    if part not in legal:
      close = difflib.get_close_matches(part, legal, 1)
      mend = f"\n  mend:  did you mean {where}.{close[0]}?" if close else ""
      fields = ", ".join(legal) or "nothing below it"
      raise ConfigError(f"--{name}: {where} has no field {part!r}.\n  legal: {fields}{mend}")
    node, where = node[part], f"{where}.{part}"
  if isinstance(node, ConfigDict):
    raise ConfigError(f"--{name} is a section.\n  mend:  set one of its fields: {', '.join(node)}")
  return node


def check_command_line(argv: list[str]) -> list[str]:
  """Rejects misspelled fields and values of a wrong type before absl sees them; returns what it may
  see: the flag library cannot read "import", a word of Python.
  """
  argv, words = [word.replace("--config.import.", "--config.import_.", 1) for word in argv], []
  for word, after in zip(argv[1:], [*argv[2:], "--"]):
    name, equals, text = word.partition("=")
    if name.startswith("--"):
      separate = "" if equals or after.startswith("--") else after
      words.append((name.removeprefix("--"), text or separate))
  spec = next((text for name, text in words if name == "config" and text), DEFAULT_CONFIG)
  config = load_config_file(spec)
  for name, text in words:
    if name.startswith("config."):
      value = _field(config, name)
      if text and not _literal(text, type(value)):
        raise invalid(f"--{name}", text, f"a value of type {type(value).__name__}, as {value!r}")
  return argv


def _tuples(value):
  if isinstance(value, dict):
    return {name: _tuples(v) for name, v in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def read(workdir: Path) -> ConfigDict | None:
  """The configuration saved in the workdir, None without one; fields that are newer than it have
  their defaults.
  """
  path = workdir / "config.json"
  if not path.is_file():
    return None
  try:
    return bases.config(_tuples(json.loads(path.read_text()))).unlock()
  except (ValueError, TypeError) as error:
    raise ConfigError(
      f"{path} is not a configuration of this version ({error}); restore it or choose another "
      "--workdir"
    ) from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
  """A temporary path beside `path`, which takes its place at the end: whole or not at all."""
  temporary = path.with_name(path.name + ".tmp")
  yield temporary
  os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
  """Writes a file whole or not at all."""
  with written_whole(path) as temporary:
    temporary.write_text(text)


def save(config: ConfigDict, workdir: Path) -> None:
  """Makes the workdir and writes the resolved configuration into it."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / "config.json", config.to_json(indent=2) + "\n")
  except OSError as error:
    reason = f"a folder that can be created and written ({error.strerror})"
    raise invalid("--workdir", str(workdir), reason, "choose another --workdir") from error


def digest(config: ConfigDict, *sections: str) -> str:
  """Twelve hex digits that change with anything that changes the weights, or with one of the free
  `sections`.
  """
  sections = (*sections, "ema.")  # which average is used
  kept = {k: v for k, v in flatten(config).items() if not _free(k) or k.startswith(sections)}
  kept.pop("likelihood.check", None)  # it prints more, and changes nothing
  asked = config.guidance
  if asked.task == asked.classes == "none" and not asked.labels:
    kept = {k: v for k, v in kept.items() if not k.startswith("guidance.")}
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _free(field: str) -> bool:
  return any(field == name or field.startswith(name + ".") for name in FREE)


def resolve(
  given: ConfigDict, explicit: bool, overrides: dict[str, Any], workdir: Path, mode: str
) -> ConfigDict:
  """The configuration of this run: the one saved in the workdir with the overrides, else the given
  one.

  Args:
    given: the --config file with the overrides applied.
    explicit: whether --config stands on the command line; it must then agree with the saved one.
    overrides: {"section.field": value} from the command line.
  """
  saved = read(workdir)
  if saved is None:
    check(
      mode in ("train", "run", "train_classifier", *UNTRAINED),
      "--workdir",
      str(workdir),
      f"for --mode={mode}, the folder of a run that was trained before",
      f"train first: python main.py --mode=train --workdir={workdir}",
    )
    return given
  wanted = (given if explicit else saved).copy_and_resolve_references()
  if not explicit:
    wanted.update_from_flattened_dict(overrides)
  old, new = flatten(saved), flatten(wanted)
  changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
  fixed = [f"  {k}: {old.get(k)!r} here, {new.get(k)!r} asked for" for k in changed if not _free(k)]
  if fixed and mode not in UNTRAINED:
    raise ConfigError(
      f"{workdir} holds a run of another configuration:\n"
      + "\n".join(fixed)
      + "\n  mend:  choose another --workdir, or leave these fields as they are"
    )
  for k in changed:
    print(f"changed: {k}: {old.get(k)!r} -> {new.get(k)!r}")
  return wanted
