"""Handwritten digits (scikit-learn, 8x8, 17 grey levels): the main job.

Command:   python main.py            (or python main.py --config=configs/digits.py:ve, :sub_vp)
Hardware:  2 CPU cores, 10 minutes
"""

from ml_collections import ConfigDict

from errors import lookup

# the process and what the network predicts under it; the default is "vp"
PROCESSES = {
  "vp": {"sde": {"name": "vp", "args": {"beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-5}}},
  "sub_vp": {"sde": {"name": "sub_vp", "args": {"beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-3}}},
  "ve": {
    "sde": {"name": "ve", "args": {"sigma_min": 0.01, "sigma_max": 20.0}},
    "parameterization": {"output": "edm", "c_noise": "log_snr"},
  },
}


# every sampler with its options, so that --config.sampling.sampler alone changes it
SAMPLING = {
  "sampler": "ancestral",
  "options": {
    "euler_maruyama": {},
    "reverse_diffusion": {},
    "ancestral": {"variance": "posterior"},
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
  },
  "num_steps": 200,
  "spacing": "log_snr",
  "denoise": "mean",
  "num_samples": 100,
  "batch_size": 100,
  "seed": 0,
}


def get_config(process: str = "vp") -> ConfigDict:
  """The configuration; `process` is a key of `PROCESSES`."""
  config = ConfigDict()
  config.seed = 0
  config.data = {"name": "digits", "dir": "runs/data"}
  config.sde = {}
  config.parameterization = {"output": "v", "c_noise": "log_snr", "sigma_data": 0.75}
  config.model = {
    "name": "ddpm",
    "args": {
      "nf": 32,
      "ch_mult": (1, 2),
      "num_res_blocks": 1,
      "attn_resolutions": (4,),
      "dropout": 0.1,
    },
  }
  config.loss = {"weighting": "elbo", "time_sampler": "importance"}
  config.optimizer = {
    "learning_rate": 2e-3,
    "warmup_steps": 100,
    "schedule": "cosine",
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "grad_clip": 10.0,
  }
  config.ema = {"half_life_images": 10_000.0, "ramp_up": 0.05}
  config.training = {
    "num_steps": 2500,
    "batch_size": 64,
    "dequantize": True,
    "log_every": 25,
    "sample_every": 500,
    "checkpoint_every": 500,
    "keep_checkpoints": 2,
  }
  config.sampling = SAMPLING
  config.likelihood = {
    "split": "test",
    "divergence": "rademacher",
    "num_probes": 1,
    "solver": "tsit5",
    "rtol": 1e-4,
    "atol": 1e-4,
    "max_steps": 1000,
    "batch_size": 100,
    "seed": 0,
  }
  config.evaluation = {"split": "test", "num_levels": 20, "num_draws": 2, "seed": 0}
  config.update(lookup(PROCESSES, process, "--config=configs/digits.py:"))
  return config.lock()
