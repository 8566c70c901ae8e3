"""`--mode=import`: a published file becomes a run that can be sampled, and overwrites nothing."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import settings
from errors import ConfigError
from evaluation import importing, jobs, trained

PARITY = Path(__file__).parents[2] / "shared" / "parity"
FILE = PARITY / "score_sde_ddpm.pth"


@pytest.fixture
def config():
  if not FILE.is_file():
    pytest.skip(f"{FILE} is absent")
  pytest.importorskip("torch")
  config = settings.load_config_file("configs/vp/ddpm/cifar10.py")
  overrides = json.loads(FILE.with_suffix(".json").read_text())["overrides"]
  names = {"nf", "ch_mult", "num_res_blocks", "attn_resolutions"}
  args = {n: overrides[f"model.{n}"] for n in names}
  args = {n: tuple(v) if isinstance(v, list) else v for n, v in args.items()} | {"group_size": 1}
  flat = {"import_.path": str(FILE), "data.name": "tfds:celeb_a", "data.image_size": 16}
  flat |= {"sampling.num_samples": 4, "sampling.batch_size": 4, "sampling.num_steps": 3}
  with config.unlocked():
    config.model.args.update(args)
    config.update_from_flattened_dict(flat)
  return config


def test_an_imported_run_has_the_published_network_and_can_be_sampled(config, tmp_path, capsys):
  importing.run(config, tmp_path)
  assert "685,731 parameters (ema)" in capsys.readouterr().out
  job = trained.start(settings.read(tmp_path), tmp_path, train=False)
  assert job.step == 0
  example = np.load(FILE.with_suffix(".npz"))
  x, t = (np.asarray(example[name]) for name in ("x", "time_cond"))
  with jax.default_matmul_precision("highest"):
    out = jax.jit(job.experiment.model.apply)({"params": job.params}, x, t)
  expected = example["output"]
  assert np.abs(out - expected).max() < 1e-4 * np.abs(expected).max()
  record = jobs.run_sample(job)
  assert record["num_samples"] == 4 and (tmp_path / "results" / "samples.png").is_file()
  assert "no process.png" in capsys.readouterr().out  # these data cannot be loaded


@pytest.mark.exhaustive
def test_an_import_overwrites_nothing_and_names_what_is_missing(config, tmp_path):
  importing.run(config, tmp_path)
  with pytest.raises(ConfigError, match="overwrites nothing"):
    importing.run(config, tmp_path)
  config.import_.path = ""
  with pytest.raises(ConfigError, match=r"import\.path = ''"):
    importing.run(config, tmp_path / "other")
  config.import_.path = str(FILE.with_name("score_sde_ddpmpp_vp.pth"))
  with pytest.raises(ConfigError, match=r"does not fit models\.ddpm"):
    importing.run(config, tmp_path / "other")
  assert not (tmp_path / "other").exists()
