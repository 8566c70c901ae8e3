"""The whole default tree of a configuration, and what every published configuration shares.

A configuration is `config(...)` or `published(...)` of parts: nested dictionaries laid over the
tree in turn.
"""

import math

from ml_collections import ConfigDict

# every sampler with its options, so that --config.sampling.sampler alone changes it
SAMPLING = {
  "sampler": "ancestral",
  "options": {
    "euler_maruyama": {},
    "reverse_diffusion": {},
    "ancestral": {"variance": "posterior", "clip": False, "temperature": 1.0},
    "ddim": {"eta": 0.0},
    "edm": {"gamma": 0.0},
    "dpm_solver": {"order": 2, "eta": 0.0},
    "unipc": {},
    "predictor_corrector": {
      "predictor": "reverse_diffusion",
      "corrector": "langevin",
      "snr": 0.16,
      "num_corrector_steps": 1,
      "per_example": True,
    },
    "annealed_langevin": {"step_lr": 2e-5, "num_steps": 5},
    "probability_flow": {"solver": "tsit5", "rtol": 1e-4, "atol": 1e-4, "max_steps": 1000},
    "reverse_sde": {"solver": "heun", "exponential": False},
    "adaptive_reverse_sde": {"solver": "heun", "exponential": False, "rtol": 1e-2, "atol": 1e-2},
  },
  "init": "prior",
  "skip": 0.0,
  "num_steps": 200,
  "spacing": "log_snr",
  "denoise": "mean",
  "num_samples": 100,
  "batch_size": 100,
  "seed": 0,
}

# of objectives, weightings and time samplers, by name
LOSS_OPTIONS = {
  "sliced": {"num_probes": 1},
  "sliced_vr": {"num_probes": 1},
  "vlb": {"variance": "posterior"},
  "hybrid": {"vlb_weight": 0.001},
  "edm": {"sigma_data": 0.5},
  "min_snr": {"gamma": 5.0},
  "sigmoid": {"bias": 2.0},
  "power": {"p": 2.0},
  "log_normal": {"p_mean": -1.2, "p_std": 1.2},
}

OPTIMIZER_OPTIONS = {
  "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
  "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-2},
  "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 1e-3},
  "sgd": {"momentum": 0.9},
}

# what samples are asked for (guidance.py): every method with its options
GUIDANCE = {
  "classes": "none",
  "labels": (),
  "task": "none",
  "operator": "inpainting",
  "operators": {
    "inpainting": {"mask": "lower_half"},
    "colorization": {},
    "super_resolution": {"factor": 2},
    "deblurring": {"blur_std": 1.0},
  },
  "noise_std": 0.0,
  "inputs": "test",
  "num_inputs": 8,
  "num_results": 6,
  "options": {
    "classifier": {"scale": 1.0},
    "classifier_free": {"scale": 1.0, "low": 0.0, "high": math.inf},
    "repaint": {"num_resamplings": 10},
    "dps": {"step_size": 0.5},
    "pigdm": {"data_std": 1.0},
    "moment_matching": {"num_iterations": 2},
    "smc": {"num_particles": 16, "data_std": 1.0},
  },
}

# without a process and a network; image_size 0: as stored; centered: in [-1, 1], else in [0, 1]
TREE = {
  "seed": 0,
  "data": {
    "name": "digits",
    "dir": "runs/data",
    "image_size": 0,
    "crop": 0,
    "resize": "bilinear",
    "centered": True,
    "levels": 0,
    "held_out": 0.1,
    "flip": False,
    "augment": 0.0,
    "num_workers": 0,
  },
  "sde": {},
  "parameterization": {"output": "v", "c_noise": "log_snr", "sigma_data": 0.5},
  "model": {"name": "ddpm", "args": {}},
  "loss": {
    "objective": "denoising",
    "weighting": "elbo",
    "time_sampler": "importance",
    "stratified": True,
    "label_dropout": 0.0,
    "options": LOSS_OPTIONS,
  },
  "optimizer": {
    "name": "adam",
    "learning_rate": 2e-3,
    "warmup_steps": 100,
    "schedule": "cosine",
    "grad_clip": 10.0,
    "options": OPTIMIZER_OPTIONS,
    "schedule_options": {"cosine": {"alpha": 0.0}, "exponential_decay": {"decay_rate": 0.1}},
  },
  # averages: one for each half-life, one for each relative width of a power function
  "ema": {
    "half_life_images": (10_000.0,),
    "ramp_up": 0.05,
    "sigma_rel": (),
    "snapshot_every": 0,
    "use": 0,
    "post_hoc": 0.0,
  },
  "training": {
    "num_steps": 2500,
    "batch_size": 64,
    "batch_per_device": 0,
    "memory_gib": 0.0,
    "steps_per_call": 1,
    "fsdp": 1,
    "dequantize": True,
    "max_skipped": 20,
    "log_every": 25,
    "sample_every": 500,
    "evaluate_every": 500,
    "frechet_samples": 0,
    "checkpoint_every": 500,
    "keep_checkpoints": 2,
    "profile_steps": 0,
    "peak_tflops": 0.0,
    "wandb": "",
  },
  "sampling": SAMPLING,
  "guidance": GUIDANCE,
  "likelihood": {
    "split": "test",
    "num_examples": 0,
    "kind": "exact",
    "dequantization": "uniform",
    "dequantizer": {"num_steps": 500, "batch_size": 64, "learning_rate": 2e-3, "features": 32},
    "num_draws": 1,
    "divergence": "rademacher",
    "num_probes": 1,
    "control": False,
    "start": "none",
    "num_levels": 1000,
    "variance": "posterior",
    "decoder": "discretized",
    "save_latents": False,
    "check": False,
    "solver": "tsit5",
    "rtol": 1e-4,
    "atol": 1e-4,
    "max_steps": 1000,
    "batch_size": 100,
    "seed": 0,
  },
  "evaluation": {
    "split": "test",
    "num_examples": 0,
    "batch_size": 100,
    "num_levels": 20,
    "num_draws": 2,
    "seed": 0,
    "metrics": ("fid", "kid", "precision_recall", "memorization"),
    "features": "auto",
    "reference": "test",
    "num_samples": 0,
    "sweep": {"checkpoints": (), "samplers": (), "num_steps": ()},
  },
  # p(y | x_t) for guidance; args: of models/classifier.py, whose num_classes are those of the data
  "classifier": {
    "args": {
      "architecture": "wide_resnet",
      "depth": 10,
      "widen": 2,
      "embedding": "positional",
    },
    "num_steps": 1500,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "log_every": 100,
    "checkpoint_every": 500,
  },
  "import_": {"path": "", "weights": "ema"},
}

PUBLISHED = {
  "loss": {"weighting": "simple", "time_sampler": "uniform", "stratified": False},
  "optimizer": {"schedule": "constant", "warmup_steps": 5000, "grad_clip": 1.0},
  "ema": {"ramp_up": 0.0},
  "training": {
    "dequantize": False,
    "log_every": 50,
    "sample_every": 50_000,
    "evaluate_every": 50_000,
    "checkpoint_every": 10_000,
  },
  "sampling": {
    "options": {"predictor_corrector": {"per_example": False}},
    "num_samples": 64,
    "batch_size": 64,
  },
  "likelihood": {"batch_size": 64},
  "evaluation": {"features": "inception", "reference": "train", "num_samples": 50_000},
}

FLIPPED = {"data": {"flip": True}}
AT_LEVELS = {"loss": {"time_sampler": "levels"}}  # a discrete-time model

# an optimizer without warm-up and clipping
PLAIN = {"optimizer": {"warmup_steps": 0, "grad_clip": math.inf}}


def config(*parts: dict) -> ConfigDict:
  """The default tree with `parts` laid over it in turn, locked."""
  tree = ConfigDict(TREE)
  for part in parts:
    tree.update(part)
  return tree.lock()


def published(*parts: dict) -> ConfigDict:
  """The same, over what most published trainings share: a constant learning rate after 5,000 steps
  of warm-up, gradients clipped at norm 1, the simple loss.
  """
  return config(PUBLISHED, *parts)


def ema_half_life(rate: float, batch_size: int) -> float:
  """Images after which the EMA with factor `rate` per step has forgotten half; 0 for no EMA."""
  return batch_size * math.log(0.5) / math.log(rate) if rate else 0.0


def batch(batch_size: int, ema_rate: float) -> dict:
  """The part that sets the batch, and the EMA whose factor is per step."""
  half_life = (ema_half_life(ema_rate, batch_size),)
  return {"training": {"batch_size": batch_size}, "ema": {"half_life_images": half_life}}


def training(learning_rate: float, batch_size: int, num_steps: int, ema_rate: float) -> dict:
  """The part that sets how a published network was trained."""
  part = batch(batch_size, ema_rate)
  steps = {"batch_size": batch_size, "num_steps": num_steps}
  return part | {"optimizer": {"learning_rate": learning_rate}, "training": steps}


def changed(**args) -> dict:
  """The part that changes arguments of the network."""
  return {"model": {"args": args}}


def process(name: str, **args) -> dict:
  """The part that chooses the process `sde_lib.SDES[name](**args)`."""
  return {"sde": {"name": name, "args": args}}


def network(name: str, **args) -> dict:
  """The part that chooses the network `models/<name>.py` with arguments of its `Model`."""
  return {"model": {"name": name, "args": args}}


def told(output: str, c_noise: str) -> dict:
  """The part that says what the network predicts and what it is told about time."""
  return {"parameterization": {"output": output, "c_noise": c_noise}}


def noise_scales(sigma_max: float, num_scales: int) -> dict:
  """The part for a geometric sequence of noise levels from `sigma_max` down to 0.01, sampled level
  by level.
  """
  scales = {"sigma_max": sigma_max, "sigma_min": 0.01, "num_scales": num_scales}
  sampling = {"spacing": "trained", "num_steps": num_scales - 1}
  return process("ncsn", **scales) | AT_LEVELS | {"sampling": sampling}


def annealed(sigma_max: float, num_scales: int, step_lr: float, num_steps: int) -> dict:
  """The same, sampled by annealed Langevin dynamics of `num_steps` per level."""
  part = noise_scales(sigma_max, num_scales)
  options = {"annealed_langevin": {"step_lr": step_lr, "num_steps": num_steps}}
  return part | {
    "sampling": part["sampling"] | {"sampler": "annealed_langevin", "options": options}
  }


# 999 steps between the 1000 levels of DDPM and a last one to the data
LEVELS = {
  "sampling": {"sampler": "ancestral", "spacing": "trained", "num_steps": 999, "denoise": "tweedie"}
}
CHAIN = process("ddpm", beta_min=1e-4, beta_max=0.02, num_steps=1000) | LEVELS | AT_LEVELS
