"""The table of the metrics that compare two sets of feature vectors.

`inception_score`, `modes` and `memorization` take something else: class probabilities, known modes,
a training and a held-out set.
"""

from collections.abc import Callable
from typing import NamedTuple

from evaluation import fid, kid, precision_recall, two_sample, wasserstein
from evaluation.estimate import Estimate


class Metric(NamedTuple):
  """`function`: (generated [n, d], reference [m, d]) -> its figures by name; `needed`: how many
  generated samples it refuses to do without, given d.
  """

  function: Callable[..., dict[str, Estimate]]
  needed: Callable[[int], int]


METRICS = {
  "fid": Metric(fid.fid, lambda d: fid.NEEDED),
  "fid_infinity": Metric(fid.fid_infinity, fid.needed_for_infinity),
  "kid": Metric(kid.kid, lambda d: kid.NEEDED),
  "precision_recall": Metric(precision_recall.precision_recall, lambda d: precision_recall.NEEDED),
  "mmd": Metric(two_sample.mmd, lambda d: two_sample.NEEDED),
  "classifier_test": Metric(two_sample.classifier_test, lambda d: two_sample.NEEDED),
  "sliced_wasserstein": Metric(wasserstein.sliced_wasserstein, lambda d: wasserstein.NEEDED),
  "wasserstein": Metric(wasserstein.wasserstein, lambda d: wasserstein.NEEDED),
}
