"""The classifier: what users see of the engine."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from .batches import Answers, in_order
from .exported import read_export, thresholds_from_json
from .programs import Stage, Tree
from .runner import BATCH_SIZES, Runner


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
  """Thresholds, and what they were measured to do on validation images.

  Attributes:
    thresholds: [exit]; an image leaves where its confidence is at least this.
    exit_fractions: [exit], the fraction of the images that left at each exit.
    accuracy: The fraction that was classified correctly.
  """

  thresholds: tuple[float, ...]
  exit_fractions: tuple[float, ...]
  accuracy: float


class AdaptiveClassifier:
  """Classifies images, each of which leaves at the first exit that is sure enough of it.

  Attributes:
    thresholds: [exit], float32; what `predict` uses unless told otherwise.
    operating_points: What thresholds may be chosen from.
    madds: [exit], multiply-adds of an image that leaves there.
    class_names: A name a class.
    num_classes: Classes.
    image: Shape (height, width, channels) and type of an image.
    preprocessing: How an image file becomes such an image, see imta_jax.predict.
  """

  def __init__(
    self,
    stages: Sequence[Stage],
    weights: Sequence[Tree],
    thresholds: Sequence[float],
    image: jax.ShapeDtypeStruct,
    *,
    madds: Sequence[float],
    operating_points: Sequence[OperatingPoint] = (),
    class_names: Sequence[str] = (),
    preprocessing: dict[str, Any] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
  ):
    """Makes a classifier of stages; see also `from_workdir`, `from_model` and `load`.

    Args:
      stages: Functions (weights, carry) → carry. The first reads images, the others
        (features, logits [batch, class]), which all of them give.
      weights: What each stage gets as its weights.
      thresholds: [exit].
      image: See the class.
      madds: See the class.
      operating_points: See the class.
      class_names: See the class.
      preprocessing: See the class.
      batch_sizes: The batch sizes that may be compiled; 1 must be among them.

    Raises:
      ValueError: If thresholds or multiply-adds are not one an exit.
    """
    self.stages, self.weights = tuple(stages), jax.device_put(tuple(weights))
    self.image, self.operating_points, self.class_names = (
      image,
      tuple(operating_points),
      tuple(class_names),
    )
    self.madds, self.preprocessing = tuple(madds), preprocessing or {}
    self.thresholds = np.asarray(thresholds, np.float32)
    for name, values in (('thresholds', thresholds), ('madds', madds)):
      if np.shape(values) != (len(self.stages),):
        raise ValueError(f'{name} {values} must be one for each of {len(self.stages)} exits')
    known_exit_fractions = [
      (point.thresholds, point.exit_fractions) for point in self.operating_points
    ]
    self._runner = Runner(
      self.stages, self.weights, image, self.madds, known_exit_fractions, batch_sizes
    )
    self.num_classes = self._runner.num_classes

  @classmethod
  def from_workdir(
    cls,
    workdir: Any,
    budget: float | None = None,
    *,
    latency: float | None = None,
    phase: int = -1,
  ) -> 'AdaptiveClassifier':
    """The network that a run has trained and evaluated.

    Args:
      workdir: The run's folder.
      budget: See `choose`.
      latency: See `choose`.
      phase: The phase whose network it shall be, an index.

    Returns:
      A classifier of images of unsigned bytes.

    Raises:
      UsageError: If the folder is no run's, or the run is not through its evaluation.
    """
    from imta_jax import networks

    return networks.load_classifier(workdir, phase).choose(budget, latency)

  @classmethod
  def from_model(
    cls,
    model: Any,
    variables: Tree,
    thresholds: Sequence[float],
    image_shape: Sequence[int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    madds: Sequence[float] | None = None,
    **fields: Any,
  ) -> 'AdaptiveClassifier':
    """A network at hand.

    Args:
      model: An imta_jax.models.multi_exit.MultiExitNetwork.
      variables: Its variables.
      thresholds: [exit].
      image_shape: (height, width, channels).
      mean: [channels], of pixels between 0 and 1; if given, images are unsigned bytes and are
        normalised here, else they are normalised floats.
      std: [channels], likewise.
      madds: See the class; counted if not given.
      **fields: Of the constructor.

    Returns:
      A classifier.
    """
    from imta_jax.adaptive.cost import exit_costs
    from imta_jax.data.preprocess import normalize

    if madds is None:
      madds = [cost.madds for cost in exit_costs(model, image_shape, variables)]

    def run(index, weights, carry):
      if index:
        features, logits = carry
      else:
        images = carry if mean is None else normalize(carry, mean, std)
        features, logits = model.apply(weights, images, method='start'), None
      features, logits = model.apply(weights, index, features, logits, method='run_stage')
      return (features if index + 1 < model.num_exits else (), logits)

    def weights_of(index):
      names = [f'{part}_{index}' for part in ('stages', 'exits', 'classifiers')]
      return {
        kind: {name: trees[name] for name in names if name in trees}
        for kind, trees in variables.items()
      }

    image = jax.ShapeDtypeStruct(tuple(image_shape), np.float32 if mean is None else np.uint8)
    exits = range(model.num_exits)
    stages = [partial(run, index) for index in exits]
    weights = [weights_of(index) for index in exits]
    return cls(stages, weights, thresholds, image, madds=madds, **fields)

  @classmethod
  def load(
    cls, folder: Any, budget: float | None = None, *, latency: float | None = None
  ) -> 'AdaptiveClassifier':
    """Reads what experiments/export.py wrote.

    Args:
      folder: The export.
      budget: See `choose`.
      latency: See `choose`.

    Returns:
      A classifier of images of unsigned bytes.

    Raises:
      ValueError: If the folder is no export, or a file is not as it was written.
    """
    manifest, stages, weights = read_export(folder)
    operating_points = [
      OperatingPoint(
        thresholds_from_json(row['thresholds']), tuple(row['exit_fractions']), row['accuracy']
      )
      for row in manifest['operating_points']
    ]
    image = jax.ShapeDtypeStruct(tuple(manifest['image_shape']), manifest['image_dtype'])
    return cls(
      stages,
      weights,
      thresholds_from_json(manifest['thresholds']),
      image,
      operating_points=operating_points,
      madds=manifest['madds'],
      class_names=manifest['class_names'],
      preprocessing=manifest['preprocessing'],
    ).choose(budget, latency)

  def choose(
    self, budget: float | None = None, latency: float | None = None
  ) -> 'AdaptiveClassifier':
    """Sets `thresholds` to those that are most accurate within a budget, on validation images.

    Args:
      budget: Average multiply-adds an image.
      latency: Average seconds an image, one at a time, on this machine, which is timed for it.

    Returns:
      This classifier. Without a budget its thresholds stay as they are.

    Raises:
      ValueError: If nothing lies within the budget, or two are given.
    """
    if budget is not None and latency is not None:
      raise ValueError('budget and latency are both given: give one')
    if budget is not None:
      self.thresholds = self.thresholds_within(budget, self.madds)
    elif latency is not None:
      self.thresholds = self.thresholds_within(latency, self.measure_costs())
    return self

  def thresholds_within(self, budget: float, costs: Sequence[float]) -> np.ndarray:
    """The thresholds that are most accurate, on validation images, within a budget.

    Args:
      budget: Average cost an image.
      costs: [exit], of an image that leaves there, in the budget's unit.

    Returns:
      [exit], float32.

    Raises:
      ValueError: If no setting lies within the budget.
    """
    averages = [float(np.dot(point.exit_fractions, costs)) for point in self.operating_points]
    within = [
      (point.accuracy, -average, point.thresholds)
      for point, average in zip(self.operating_points, averages, strict=True)
      if average <= budget
    ]
    if not within:
      least = f'{min(averages):.4g}' if averages else 'none, for there are no operating_points'
      raise ValueError(f'budget {budget:g} is too small: the least that can be had is {least}')
    return np.asarray(max(within)[-1], np.float32)

  def predict(self, images: np.ndarray, thresholds: np.ndarray | None = None) -> Answers:
    """Classifies images.

    Args:
      images: [image, height, width, channels], as many as one likes, none included.
      thresholds: [exit] or [image, exit], in place of `self.thresholds`.

    Returns:
      The answers, in the images' order.

    Raises:
      ValueError: If images or thresholds do not fit.
    """
    return in_order(list(self.predict_as_decided(images, thresholds)), self.num_classes)

  def predict_as_decided(
    self, images: np.ndarray, thresholds: np.ndarray | None = None
  ) -> Iterator[Answers]:
    """Classifies images; who leaves early is answered early.

    Args:
      images: See `predict`.
      thresholds: See `predict`.

    Yields:
      Answers as they are decided, not in the images' order: see `Answers.indices`.

    Raises:
      ValueError: If images or thresholds do not fit.
    """
    images = self._check(images)
    rows = self._rows(thresholds, len(images))
    if len(images) == 1:
      yield self._runner.run_one(images, rows)
    else:
      yield from self._runner.run(iter([(images, rows)]), len(images))

  def stream(
    self, batches: Iterable[np.ndarray], thresholds: np.ndarray | None = None
  ) -> Iterator[Answers]:
    """Classifies images as they come; places that images leave are filled by those that wait.

    Every stage works on full batches, however few images reach it, and at most two batches an exit
    wait.

    Args:
      batches: [image, height, width, channels] each, of any size.
      thresholds: [exit], in place of `self.thresholds`.

    Yields:
      Answers as they are decided, not in the images' order: see `Answers.indices`.

    Raises:
      ValueError: If images or thresholds do not fit.
    """
    checked = map(self._check, batches)
    source = ((images, self._rows(thresholds, len(images))) for images in checked)
    yield from self._runner.run(source, np.inf)

  def measure_costs(self, batch_size: int = 1, repeats: int = 20) -> np.ndarray:
    """Times classification on this machine.

    Args:
      batch_size: Images at once.
      repeats: Runs to each exit, of which the median counts.

    Returns:
      [exit], seconds an image that leaves there.
    """
    images = np.zeros((batch_size, *self.image.shape), self.image.dtype)
    num_exits = len(self.stages)
    # With row i, no image leaves before exit i, and all leave there.
    rows = np.where(np.eye(num_exits, dtype=bool), np.float32(-np.inf), np.float32(np.inf))
    thresholds = [np.broadcast_to(row, (batch_size, num_exits)) for row in rows]
    run = self._runner.all_stages
    jax.block_until_ready(run(images, thresholds[0]))  # Compiles.
    seconds = np.zeros((repeats, num_exits))
    for repeat, exit in np.ndindex(seconds.shape):
      start = time.perf_counter()
      jax.block_until_ready(run(images, thresholds[exit]))
      seconds[repeat, exit] = time.perf_counter() - start
    # Whoever goes on takes no less, whatever disturbed a clock.
    return np.maximum.accumulate(np.median(seconds, axis=0)) / batch_size

  def compile(self, largest: int | None = None) -> 'AdaptiveClassifier':
    """Compiles ahead of use all that `predict` and `stream` can need, and times it.

    From then on images go in the batches that are quickest on this machine. Until then batches are
    chosen by multiply-adds: alike everywhere, and with them the last bits of probabilities.

    Args:
      largest: The most images at once to be ready for, more go in several batches; any number by
        default.

    Returns:
      This classifier.
    """
    self._runner.compile(largest)
    return self

  def _check(self, images):
    images = np.asarray(images)
    if images.shape[1:] != self.image.shape or images.dtype != self.image.dtype:
      raise ValueError(
        f'images {images.shape} of {images.dtype} must be [image, '
        f'{", ".join(map(str, self.image.shape))}] of {self.image.dtype}'
      )
    return images

  def _rows(self, thresholds, count):
    """Thresholds an image, [image, exit]."""
    thresholds = np.asarray(self.thresholds if thresholds is None else thresholds)
    rows = np.empty((count, len(self.stages)), np.float32)
    try:
      rows[:] = thresholds
    except ValueError:
      raise ValueError(
        f'thresholds of shape {thresholds.shape} must be [{len(self.stages)}] or '
        f'[{count}, {len(self.stages)}]'
      ) from None
    return rows
