"""Points of a plane with a small network, to see every mode within a minute.

Command:   python main.py --config=configs/toy.py --workdir=runs/toy    (or toy.py:checkerboard)
Hardware:  2 CPU cores, 1 minute
"""

from configs import bases

VP = bases.process("vp", beta_min=0.1, beta_max=20.0, t_min=1e-4)
MLP = bases.network("mlp", hidden=(256, 256, 256))
OUTPUT = {"parameterization": {"output": "edm", "sigma_data": 2.5}}
OFTEN = {"log_every": 500, "sample_every": 2000, "evaluate_every": 2000, "checkpoint_every": 2000}
TRAINED = {"training": {"num_steps": 6000, "batch_size": 256, **OFTEN}}
MANY = {"sampling": {"num_samples": 2000, "batch_size": 2000, "num_steps": 100}}
FEW = {"evaluation": {"num_examples": 2000, "batch_size": 1000}, "likelihood": {"batch_size": 1000}}
PERCEPTRON = {"architecture": "mlp", "hidden": (128, 128, 128)}
CLASSIFIER = {"classifier": {"args": PERCEPTRON, "num_steps": 2000, "batch_size": 256}}


def get_config(name: str = "gaussians25"):
  """The configuration; `name` is a key of `data_sources.toy.TOYS`."""
  data = {"data": {"name": f"toy:{name}"}}
  return bases.config(data, VP, MLP, OUTPUT, TRAINED, MANY, FEW, CLASSIFIER)
