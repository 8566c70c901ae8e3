"""Sample quality: metrics of generated against reference examples in the features of a network,
beside what real examples reach in the samples' place.
"""

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import devices
import tasks
from data_sources.cache import data_dir
from errors import check, lookup
from evaluation import (
  fid,
  files,
  inception_score,
  memorization,
  metrics,
  modes,
  samples,
  train_classifier,
)
from evaluation.batches import spread
from evaluation.estimate import Estimate, proportion
from evaluation.features import Extractor, Outputs, extract, make_extractor
from evaluation.trained import Job
from experiment import Experiment

FIELD = "evaluation.metrics"
MOST_TRAINING = 50_000  # training examples that samples are compared to


class Plan(NamedTuple):
  """Everything that the metrics need but the samples."""

  extractor: Extractor
  num_samples: int
  reference: Outputs
  training: Outputs
  held_out: Outputs  # the reference, where that are the training examples `evaluation.split`
  label: str  # what is compared with what: "297_test_classifier"

  def measure(self, names: tuple[str, ...], generated: Outputs) -> dict[str, Estimate]:
    """The figures of these metrics by their full names."""
    figures = {}
    for name in names:
      figures |= QUALITY[name].function(generated, self)
    return {_full_name(name, self.label): figure for name, figure in figures.items()}


def _of_features(name: str) -> metrics.Metric:
  """A metric of two sets of features, handed the outputs of samples and a `Plan`."""
  function, needed = metrics.METRICS[name]
  return metrics.Metric(lambda x, plan: function(x.features, plan.reference.features), needed)


def _modes(generated: Outputs, plan: Plan) -> dict[str, Estimate]:
  """The classes that the feature network sees, against their frequencies in the reference."""
  seen, expected = (o.probabilities.argmax(1) for o in (generated, plan.reference))
  classes = plan.reference.probabilities.shape[1]
  return modes.count_modes(seen, np.bincount(expected, minlength=classes))


def _memorization(generated: Outputs, plan: Plan) -> dict[str, Estimate]:
  parts = (outputs.features for outputs in (generated, plan.training, plan.held_out))
  return memorization.memorization(*parts).estimates


def _class_agreement(generated: Outputs, plan: Plan) -> dict[str, Estimate]:
  """The share of samples that the classifier, which has guided nothing, takes for what they were
  asked to be.
  """
  hits = generated.probabilities.argmax(1) == generated.labels
  return {"class_agreement": proportion(hits, "share classified as asked, Wilson's interval")}


# of class probabilities, which not every feature network has
OF_CLASSES = {
  "inception_score": metrics.Metric(
    lambda x, plan: inception_score.inception_score(x.probabilities),
    lambda d: 2 * inception_score.NUM_SPLITS,
  ),
  "modes": metrics.Metric(_modes, lambda d: 1),
  "class_agreement": metrics.Metric(_class_agreement, lambda d: 1),
}

# evaluation.metrics: (outputs of samples, `Plan`) -> figures by name; samples needed, given d
QUALITY: dict[str, metrics.Metric] = {
  **{name: _of_features(name) for name in metrics.METRICS},
  **OF_CLASSES,
  "memorization": metrics.Metric(_memorization, lambda d: memorization.NEEDED),
}


# what some figures are called in the features of the FID network, and only there
PUBLISHED_NAMES = {
  "frechet_distance_infinity": "fid_infinity",
  "frechet_distance": "fid",
  "kernel_distance": "kid",
}


def _full_name(figure: str, label: str) -> str:
  """A figure with the number of samples, the reference and the features:
  `frechet_distance_297_test_classifier`; `fid5k_test_inception`.
  """
  if label.endswith(("_inception", "_inception_clean")) and figure in PUBLISHED_NAMES:
    return f"{PUBLISHED_NAMES[figure]}{label}"
  return f"{figure}_{label}"


def _count(n: int) -> str:
  return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def features_name(experiment: Experiment) -> str:
  """`evaluation.features`; "auto" is a classifier where the data have classes, else random
  convolutions.
  """
  name = experiment.config.evaluation.features
  if name != "auto":
    return name
  return "classifier" if experiment.spec.num_classes > 1 else "random_conv"


def _real(experiment: Experiment, extractor: Extractor, split: str, most: int = 0) -> Outputs:
  """The outputs of (at most `most`) examples of a split, computed once and kept in a file that is
  named by their values and by what the extractor depends on.
  """
  stored = experiment.dataset.splits[split]["image"]
  values = np.ascontiguousarray(stored[spread(len(stored), most or len(stored))])
  key = hashlib.sha256(f"{extractor.identity} {values.shape} {values.dtype}".encode())
  key.update(values.data)
  path = (
    data_dir(experiment.config.data)
    / "features"
    / f"{split}-{len(values)}-{key.hexdigest()[:16]}.npz"
  )
  devices.wait_for_all("features")
  absent = not path.is_file()
  devices.wait_for_all("features are listed")
  if absent:
    outputs = extract(extractor, values, experiment.config.evaluation.batch_size)
    if devices.is_first():
      files.write_arrays(path, {n: a for n, a in outputs._asdict().items() if a is not None})
  devices.wait_for_all("features are written")
  outputs, labels = (
    Outputs(**files.read_arrays(path)),
    experiment.dataset.splits[split].get("label"),
  )
  return (
    outputs if labels is None else outputs._replace(labels=labels[spread(len(labels), len(values))])
  )


def _check_room(workdir: Path, experiment: Experiment, num_samples: int) -> None:
  """The samples fit on the disk."""
  there = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
  needed = num_samples * experiment.num_dims * experiment.spec.dtype.itemsize
  free, mend = shutil.disk_usage(there).free, "make room or lower evaluation.num_samples"
  legal = f"samples that fit on the disk: {needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free"
  check(needed < free, "evaluation.num_samples", num_samples, legal, mend)


def plan(experiment: Experiment, workdir: Path) -> Plan | None:
  """Checks all that can be missing before a sample is drawn and computes the reference; None
  without metrics.
  """
  options = experiment.config.evaluation
  if not options.metrics:
    return None
  for name in options.metrics:
    lookup(QUALITY, name, FIELD)
  if experiment.config.guidance.classes == "classifier":
    train_classifier.newest(experiment.config, workdir)
  lookup(dict.fromkeys(experiment.spec.splits), options.reference, "evaluation.reference")
  extractor = make_extractor(experiment, features_name(experiment))
  reference = _real(experiment, extractor, options.reference)
  count, width = reference.features.shape
  num_samples = options.num_samples or count
  _check_room(workdir, experiment, num_samples)
  mend = "take another evaluation.features, or leave it out of evaluation.metrics"
  for name in options.metrics:
    needed = QUALITY[name].needed(width)
    legal = f"{needed} or more for {name}; the {options.reference} split has {count} examples"
    few, leave_out = min(num_samples, count), f"leave {name} out of {FIELD}"
    check(few >= needed, "evaluation.num_samples", num_samples, legal, leave_out)
    has_classes = name not in OF_CLASSES or reference.probabilities is not None
    check(has_classes, FIELD, name, f"for features with classes, not {extractor.name}", mend)
  if "class_agreement" in options.metrics:
    name, told = extractor.name, tasks.has_classes(experiment.config, experiment.model)
    legal = f"for evaluation.features=classifier, whose classes are those of the data, not {name}"
    check(name == "classifier", FIELD, "class_agreement", legal, mend)
    legal = "for samples of which classes are asked: a network with classes, or guidance.classes"
    check(told, FIELD, "class_agreement", legal)
  training = _real(experiment, extractor, "train", MOST_TRAINING)
  of_training = options.reference == "train"
  held_out = _real(experiment, extractor, options.split) if of_training else reference
  label = f"{_count(num_samples)}_{options.reference}_{extractor.name.replace(':', '.')}"
  return Plan(extractor, num_samples, reference, training, held_out, label)


def _rows(outputs: Outputs, rows: np.ndarray) -> Outputs:
  return Outputs(*(None if a is None else a[rows] for a in outputs))


def floor(job: Job, prepared: Plan) -> dict[str, Estimate]:
  """The figures that real examples reach in the samples' place: training ones, where those are the
  reference the held-out ones.
  """
  options = job.experiment.config.evaluation
  examples = prepared.held_out if options.reference == "train" else prepared.training
  rows = spread(len(examples.features), prepared.num_samples)
  label = f"{_count(len(rows))}_{prepared.label.partition('_')[2]}"
  names = tuple(name for name in options.metrics if name != "memorization")
  return prepared._replace(label=label).measure(names, _rows(examples, rows))


def self_test(prepared: Plan) -> dict[str, Estimate]:
  """The Fréchet distance of one half of the training examples to the other."""
  examples = prepared.training.features
  halves = examples[::2], examples[1::2]
  label = f"{_count(len(halves[0]))}_train_half_{prepared.extractor.name}"
  figure = fid.fid(*halves)["frechet_distance"]
  return {_full_name("frechet_distance", label): figure}


def measured(job: Job, prepared: Plan) -> tuple[dict[str, dict], samples.Samples]:
  """(the figures of the samples, as for JSON, and the samples, drawn now where they are in no
  file).
  """
  options, drawn = job.experiment.config.evaluation, samples.draw(job, prepared.num_samples)
  outputs = extract(prepared.extractor, drawn.values, options.batch_size)
  outputs = outputs._replace(labels=drawn.labels)
  return as_json(prepared.measure(options.metrics, outputs)), drawn


def as_json(figures: dict[str, Estimate]) -> dict[str, dict]:
  """What a record holds of figures."""
  return {name: figure._asdict() for name, figure in figures.items()}


def run(job: Job, prepared: Plan) -> dict[str, Any]:
  """Draws the samples and measures them: what the record of the job holds of it."""
  options, begin = job.experiment.config.evaluation, time.perf_counter()
  quality, drawn = measured(job, prepared)
  return {
    "quality": quality,
    "floor": as_json(floor(job, prepared)),
    "self_test": as_json(self_test(prepared)),
    "features": prepared.extractor.identity,
    "num_samples": prepared.num_samples,
    "reference": f"{options.reference}, {len(prepared.reference.features)} examples",
    "sampler": job.experiment.config.sampling.sampler,
    "sampler_nfe": int(drawn.nfe.max()),
    "seconds_sampling": round(drawn.seconds, 3),
    "seconds_quality": round(time.perf_counter() - begin, 3),
  }
