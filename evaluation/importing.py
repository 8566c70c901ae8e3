"""`--mode=import`: the weights of a published checkpoint become a run that every mode can go on
from.
"""

import functools
from pathlib import Path

import jax
from ml_collections import ConfigDict

import ema
import settings
from checkpoint import Checkpoints
from checkpoint_import import load_variables
from errors import check
from experiment import build
from optimizers import make_optimizer
from training import first_state


def run(config: ConfigDict, workdir: Path) -> None:
  """Reads `import.path` into the network of `config` and writes step 0 of a run: weights and their
  average from the file, an optimizer that has seen nothing.
  """
  source, experiment = config.import_, build(config)
  check(bool(source.path), "import.path", source.path, "the file of a published checkpoint")
  directory = workdir / "checkpoints"
  with Checkpoints(directory, read_only=True) as checkpoints:
    legal = "a folder without checkpoints: an import overwrites nothing"
    check(checkpoints.latest() is None, "--workdir", str(workdir), legal, "choose another")
  model, shape = experiment.model, experiment.spec.shape
  params = load_variables(source.path, model, weights=source.weights, shape=shape)["params"]
  optimizer = make_optimizer(config, experiment.sde)
  begin = functools.partial(first_state, optimizer=optimizer, num_averages=len(ema.decays(config)))
  state = jax.jit(begin)(params)
  settings.save(config, workdir)
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(0, state)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(f"imported {count:,} parameters ({source.weights}) of {source.path} into {workdir}")
  print(f"next: python main.py --mode=sample --workdir={workdir}", flush=True)
