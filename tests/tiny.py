"""The main job made small: a configuration whose every part compiles and runs in seconds."""

import ast

from settings import load_config_file

TINY = {
  "data.dir": "runs/data",
  "model.args.nf": 8,
  "model.args.ch_mult": (1,),
  "model.args.attn_resolutions": (),
  "model.args.dropout": 0.0,
  "optimizer.warmup_steps": 2,
  "training.num_steps": 6,
  "training.batch_size": 8,
  "training.log_every": 2,
  "training.sample_every": 3,
  "training.evaluate_every": 3,
  "training.checkpoint_every": 3,
  "sampling.num_steps": 4,
  "sampling.num_samples": 12,
  "sampling.batch_size": 8,
  "likelihood.batch_size": 160,
  "likelihood.rtol": 1e-2,
  "likelihood.atol": 1e-2,
  "evaluation.batch_size": 160,
  "evaluation.num_levels": 3,
  "evaluation.num_draws": 1,
  "evaluation.metrics": ("fid",),
  "evaluation.features": "pixels",
  "evaluation.num_samples": 12,
}


def _changed(path, flat, changes):
  config = load_config_file(path)
  changes = {k.replace("__", "."): v for k, v in changes.items()}
  with config.unlocked():
    if "sde.args" in changes:  # those of another process are no base for it
      config.sde.args = changes.pop("sde.args")
    config.update_from_flattened_dict(flat | changes)
  return config


def tiny_config(**changes):
  """configs/digits.py made small; `changes` are section__field=value."""
  return _changed("configs/digits.py", TINY, changes)


def toy_config(**changes):
  """configs/toy.py made small: compiles in a second."""
  flat = {k: v for k, v in TINY.items() if not k.startswith("model.")}
  return _changed("configs/toy.py", flat | {"model.args.hidden": (16, 16)}, changes)


def tiny_arguments(**changes) -> list[str]:
  """The same as command-line arguments."""
  values = TINY | {k.replace("__", "."): v for k, v in changes.items()}
  assert all(ast.literal_eval(repr(v)) == v for v in values.values())
  return [f"--config.{k}={v}" for k, v in values.items()]
