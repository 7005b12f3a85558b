"""Inference that runs only the stages an image needs.

This file needs JAX and NumPy alone, but for `from_workdir` and `from_model`: an export carries a
copy of it, which classifies where imta_jax is not installed.

    from engine import AdaptiveClassifier  # In an export; else from imta_jax.adaptive.engine.
    classifier = AdaptiveClassifier.load('exported', budget=20e6)
    answers = classifier.predict(images)
"""

import collections
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

Tree = Any
# What a stage reads and writes: (features, logits), or the images where the first one reads.
Carry = Any

# The batch sizes that are compiled. Images left over make smaller batches.
BATCH_SIZES = (1, 4, 16, 64, 256)

# What running a program is taken to cost besides its images until programs are timed, in
# multiply-adds that take as long: 20 to 40 million on two CPU cores, where small batches fill no
# vectors; an estimate for accelerators, where it is the host's time against a far faster device's.
_OVERHEAD = {'cpu': 4e7}
_OVERHEAD_OF_ACCELERATORS = 1e9

# One program of all stages is compiled for batch sizes at which it is expected to spare at least
# this part of the cost of a batch.
_LEAST_TO_SPARE = 0.1

# How often `compile` times programs, in turns; the least time counts.
_TIMINGS = 5

# Seconds of a batch that one turn times well enough.
_LONG_BATCH = 0.5

# Of batch sizes at which an image costs alike, but for this part, the largest is used.
_TIE = 0.1

# A threshold is the confidence of a validation image, which shall leave. Rounding differs between
# programs, so thresholds are lowered by this part of what they lack of certainty; confidences of
# trained networks were seen to differ by up to 7e-6 of it.
_SLACK = 1e-5

# Bytes of weights up to which a program has them as constants. Handing over some hundred arrays
# takes as long as a small stage; large ones would take long to compile.
_MOST_CONSTANTS = 2**25

# XLA's options that pay on a platform. YNNPACK's fusions make its CPU programs slower to load, by
# seconds where the program is large, and no faster.
_COMPILER_OPTIONS = {'cpu': {'xla_cpu_experimental_ynn_fusion_type': ''}}

MANIFEST = 'manifest.json'
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Setting:
  """Thresholds, and what they were measured to do on validation images.

  Attributes:
    thresholds: [exit]; an image leaves where its confidence is at least this.
    shares: [exit], the fraction of the images that left there.
    accuracy: The fraction that was classified correctly.
  """

  thresholds: tuple[float, ...]
  shares: tuple[float, ...]
  accuracy: float


@dataclasses.dataclass(frozen=True)
class Answers:
  """What was decided about images.

  Attributes:
    indices: [image], the number of each image in the order in which they were given.
    probabilities: [image, class], float32, of the exit that each image took.
    exits: [image], counted from 0.
  """

  indices: np.ndarray
  probabilities: np.ndarray
  exits: np.ndarray

  @property
  def labels(self) -> np.ndarray:
    """[image], the most probable class."""
    return self.probabilities.argmax(axis=-1)

  @property
  def confidences(self) -> np.ndarray:
    """[image], the probability of the label."""
    return self.probabilities.max(axis=-1)


class AdaptiveClassifier:
  """Classifies images, each of which leaves at the first exit that is sure enough of it.

  Attributes:
    thresholds: [exit], float32; what `predict` uses unless told otherwise.
    settings: What thresholds may be chosen from.
    madds: [exit], multiply-adds of an image that leaves there.
    class_names: A name a class.
    num_classes: Classes.
    image: Shape (height, width, channels) and type of an image.
    preprocessing: How an image file becomes such an image, see imta_jax.predict.
  """

  def __init__(
    self,
    stages: Sequence[Callable[[Tree, Carry], Carry]],
    weights: Sequence[Tree],
    thresholds: Sequence[float],
    image: jax.ShapeDtypeStruct,
    *,
    madds: Sequence[float],
    settings: Sequence[Setting] = (),
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
      settings: See the class.
      class_names: See the class.
      preprocessing: See the class.
      batch_sizes: The batch sizes that may be compiled; 1 must be among them.

    Raises:
      ValueError: If thresholds or multiply-adds are not one an exit.
    """
    self.stages, self.weights = tuple(stages), jax.device_put(tuple(weights))
    self.image, self.settings, self.class_names = image, tuple(settings), tuple(class_names)
    self.madds, self.preprocessing = tuple(madds), preprocessing or {}
    self.thresholds = np.asarray(thresholds, np.float32)
    for name, values in (('thresholds', thresholds), ('madds', madds)):
      if np.shape(values) != (len(self.stages),):
        raise ValueError(f'{name} {values} must be one for each of {len(self.stages)} exits')
    self._batch_sizes = tuple(sorted(batch_sizes))
    platform = jax.default_backend()
    self._join = _join_on_host if platform == 'cpu' else _join_on_device
    overhead = _OVERHEAD.get(platform, _OVERHEAD_OF_ACCELERATORS)
    stage_costs, as_one_costs = _expected_costs(self.madds, self._batch_sizes, overhead)
    self._as_one_sizes = tuple(as_one_costs)
    self._plan(stage_costs, as_one_costs)
    self._reached = {
      np.float32(setting.thresholds).tobytes(): 1 - np.cumsum((0, *setting.shares[:-1]))
      for setting in self.settings
    }
    self._steps = [
      _program(partial(_step, stage), weights)
      for stage, weights in zip(self.stages, self.weights, strict=True)
    ]
    self._all_stages = _program(partial(_all_stages, self.stages), self.weights)
    _, logits = jax.eval_shape(self.stages[0], self.weights[0], self._one_image())
    self.num_classes = logits.shape[-1]

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
    manifest_path = os.path.join(folder, MANIFEST)
    if not os.path.exists(manifest_path):
      raise ValueError(f'{folder} is no export: it has no {MANIFEST}')
    with open(manifest_path, 'rb') as file:
      try:
        manifest = json.load(file)
        checksum = manifest.pop('manifest_sha256')
      except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f'{manifest_path} is damaged: export again') from error
    if checksum != manifest_checksum(manifest):
      raise ValueError(f'{manifest_path} is not as it was written: export again')
    if manifest['format'] != FORMAT:
      raise ValueError(f'{folder} has format {manifest["format"]}, expected {FORMAT}')
    contents = {
      name: _read_checked(folder, name, checksum) for name, checksum in manifest['sha256'].items()
    }
    stages = [
      partial(_call_exported, export.deserialize(bytearray(contents[name])))
      for name in manifest['stages']
    ]
    with np.load(io.BytesIO(contents[manifest['weights']])) as arrays:
      weights = [
        [arrays[f'{index}/{leaf}'] for leaf in range(count)]
        for index, count in enumerate(manifest['weights_per_stage'])
      ]
    settings = [
      Setting(tuple(map(_from_json, row['thresholds'])), tuple(row['shares']), row['accuracy'])
      for row in manifest['settings']
    ]
    image = jax.ShapeDtypeStruct(tuple(manifest['image_shape']), manifest['image_dtype'])
    return cls(
      stages,
      weights,
      tuple(map(_from_json, manifest['thresholds'])),
      image,
      settings=settings,
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
    averages = [float(np.dot(setting.shares, costs)) for setting in self.settings]
    within = [
      (setting.accuracy, -average, setting.thresholds)
      for setting, average in zip(self.settings, averages, strict=True)
      if average <= budget
    ]
    if not within:
      least = f'{min(averages):.4g}' if averages else 'none, for there are no settings'
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
    parts = list(self.predict_as_decided(images, thresholds))
    if len(parts) == 1:
      return parts[0]
    nobody = np.zeros(0, np.int64)
    nothing = Answers(nobody, np.zeros((0, self.num_classes), np.float32), nobody)
    fields = [
      np.concatenate([getattr(part, name) for part in [nothing, *parts]]) for name in _FIELDS
    ]
    order = np.argsort(fields[0])
    return Answers(*(field[order] for field in fields))

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
      probabilities, exits = map(np.asarray, self._all_stages(images, rows))
      yield Answers(np.zeros(1, np.int64), probabilities, exits.astype(np.int64))
    else:
      yield from self._decide(iter([(images, rows)]), len(images))

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
    yield from self._decide(source, np.inf)

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
    jax.block_until_ready(self._all_stages(images, thresholds[0]))  # Compiles.
    seconds = np.zeros((repeats, num_exits))
    for repeat, exit in np.ndindex(seconds.shape):
      start = time.perf_counter()
      jax.block_until_ready(self._all_stages(images, thresholds[exit]))
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
    sizes = [
      size
      for smaller, size in itertools.pairwise((0, *self._batch_sizes))
      if largest is None or smaller < largest
    ]
    carries = [self._one_image()]
    for step in self._steps[:-1]:
      carry, _, _ = jax.eval_shape(step, carries[-1], np.zeros(1, np.float32))
      carries.append(carry)
    if self._join is _join_on_device:
      for carry, before, size in itertools.product(carries[1:], sizes, sizes):
        rows = np.zeros(size, np.int32)
        _fill(_select(_zeros(carry, before), rows), _zeros(carry, before), rows)
    programs = [
      (partial(self._run_stage, index), carry, dict.fromkeys(sizes, np.inf))
      for index, carry in enumerate(carries)
    ]
    as_one = {size: np.inf for size in sizes if size in self._as_one_sizes}
    programs.append((self._run_all_stages, carries[0], as_one))
    for turn in range(1 + _TIMINGS):  # The first one compiles.
      for run, carry, seconds in programs:
        for size, least in seconds.items():
          if turn < 2 or least < _LONG_BATCH:
            seconds[size] = min(least, self._time(run, _zeros(carry, size)))
    self._plan([seconds for _, _, seconds in programs[:-1]], as_one)
    return self

  def _one_image(self):
    return jax.ShapeDtypeStruct((1, *self.image.shape), self.image.dtype)

  def _time(self, run, carry):
    """Seconds of a batch of which no image leaves before the last exit."""
    size = len(jax.tree.leaves(carry)[0])
    rows = np.arange(size)
    thresholds = np.full((size, len(self.stages)), np.inf, np.float32)
    start = time.perf_counter()
    if isinstance(carry, tuple):  # Of a stage before.
      carry = self._join([carry], [rows], size)
    run(_Batch(carry, rows, rows, thresholds))()
    return time.perf_counter() - start

  def _plan(
    self, stage_costs: Sequence[Mapping[int, float]], as_one_costs: Mapping[int, float]
  ) -> None:
    """Decides in which batches images are run.

    Args:
      stage_costs: [exit], a batch size → what a batch costs, in any unit.
      as_one_costs: A batch size → what a batch costs as one program that runs all stages.
    """
    self._stage_costs, self._as_one_costs = stage_costs, as_one_costs
    image_costs = {
      size: sum(costs[size] for costs in stage_costs) / size for size in stage_costs[0]
    }
    most = (1 + _TIE) * min(image_costs.values())
    # One size for all stages, so that a batch that nobody leaves goes from stage to stage as it is.
    self._full_batch = max(size for size, cost in image_costs.items() if cost <= most)
    self._least_costs, self._first_batches = zip(
      *(_cheapest_batches(costs, self._full_batch) for costs in stage_costs), strict=True
    )
    # The same thresholds come again and again, and this takes as long as some of a small stage.
    self._is_faster_as_one = functools.lru_cache(maxsize=256)(self._expect_faster_as_one)

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

  def _decide(
    self, source: Iterator[tuple[np.ndarray, np.ndarray]], total: float
  ) -> Iterator[Answers]:
    """Runs stages until all images of a source have left; there are `total` of them.

    A full batch runs as soon as there is one, of the last stage that has one, so that little waits.
    When no more images come, the first stages empty themselves into the later ones. The device
    works on a batch while the host sorts the images of the one before.
    """
    queues = [_Queue(_join_on_host), *(_Queue(self._join) for _ in self.stages)]
    first_index, open_source, started = 0, True, collections.deque()
    while True:
      waiting = [index for index, queue in enumerate(queues) if queue.count]
      full = [index for index in waiting if queues[index].count >= self._full_batch]
      if full:
        started.append(self._start(full[-1], queues, total))
      elif open_source:
        images, thresholds = next(source, (None, None))
        if images is None:
          open_source = False
        else:
          indices = np.arange(first_index, first_index + len(images))
          queues[0].put(_Batch(images, np.arange(len(images)), indices, thresholds))
          first_index += len(images)
        continue
      elif waiting and not started:
        started.append(self._start(waiting[0], queues, total))
      elif not started:
        return
      if not full or len(started) > 1:
        next_queue, results = started.popleft()
        answers, stayers = results()
        next_queue.put(stayers)
        if answers is not None:
          yield answers

  def _start(self, index, queues, total):
    """Starts the next batch of a stage.

    Args:
      index: The stage's.
      queues: Of all stages.
      total: Images of which those that go on make batches together, these included.

    Returns:
      The queue of those who stay, and what waits for the results, see `_run_stage`.
    """
    count = min(queues[index].count, self._full_batch)
    batch = queues[index].take(self._first_batches[index][count])
    as_one = index == 0 and self._is_faster_as_one(
      len(batch.carry), batch.thresholds.tobytes(), total
    )
    run = self._run_all_stages if as_one else partial(self._run_stage, index)
    return queues[index + 1], run(batch)

  def _run_stage(self, index, batch):
    """Starts a stage on a batch.

    Returns:
      What waits for the results: answers of those who leave, if any do, and of the others what
      `_Queue.put` takes.
    """
    carry, probabilities, leaves = self._steps[index](batch.carry, batch.bounds(index))

    def results():
      # The last exit takes all, whatever the threshold, and what is not a number.
      leaving = np.asarray(leaves) | (index + 1 == len(self.stages))
      return batch.divide(carry, probabilities, np.where(leaving, index, -1))

    return results

  def _run_all_stages(self, batch):
    """Starts all stages on a batch of images; see `_run_stage`."""
    probabilities, exits = self._all_stages(batch.carry, batch.bounds())
    return lambda: batch.divide(None, probabilities, np.asarray(exits, np.int64))

  def _expect_faster_as_one(self, size, thresholds, total):
    """Whether a batch is likely to be done sooner by `_all_stages` than stage by stage.

    Args:
      size: Places of the batch.
      thresholds: [image, exit], of the images in it, as bytes.
      total: See `_start`.
    """
    if size not in self._as_one_costs:
      return False
    thresholds = np.frombuffer(thresholds, np.float32).reshape(-1, len(self.stages))
    count = len(thresholds)
    if (thresholds == thresholds[0]).all():
      reached = self._reached_stages(thresholds[0])
    else:
      reached = np.mean([self._reached_stages(row) for row in thresholds], axis=0)
    costs = np.array([costs[size] for costs in self._stage_costs])
    # All places run a stage that any image reaches, each at what one program costs less than many.
    runs = 1 - (1 - reached) ** count
    spared = (costs.sum() - self._as_one_costs[size]) / max(1, len(costs) - 1)
    as_one = costs[0] + np.dot(costs[1:] - spared, runs[1:])
    # Alone, the images that reach a stage do.
    by_stages = costs[0]
    for fraction, least in zip(reached[1:], self._least_costs[1:], strict=True):
      if fraction:
        together = min(total * fraction, self._full_batch)
        by_stages += np.interp(together, np.arange(len(least)), least) / together * fraction * count
    return as_one < by_stages

  def _reached_stages(self, thresholds):
    """[exit], the fraction of images that is likely to run each stage, with such thresholds.

    Settings tell. With other thresholds images are taken to leave in equal numbers at each exit
    that is left, unless a threshold lets all leave, or none.
    """
    if (reached := self._reached.get(thresholds.tobytes())) is not None:
      return reached
    even = 1 / np.arange(len(thresholds), 0, -1)
    leaving = np.select([thresholds > 1, thresholds <= 0], [0, 1], even)
    return np.cumprod((1, *(1 - leaving[:-1])))


_FIELDS = [field.name for field in dataclasses.fields(Answers)]


class _Batch(NamedTuple):
  """Images that a stage runs at once.

  Attributes:
    carry: What the stage reads, of all places; some places are no image's.
    rows: [image], its place.
    indices: [image], its number.
    thresholds: [image, exit].
  """

  carry: Carry
  rows: np.ndarray
  indices: np.ndarray
  thresholds: np.ndarray

  def bounds(self, exits: int | slice = slice(None)) -> np.ndarray:
    """Thresholds [place, exit] or [place] of one exit; where there is no image, none stays."""
    thresholds = self.thresholds[:, exits]
    size = len(jax.tree.leaves(self.carry)[0])
    bounds = np.full((size, *thresholds.shape[1:]), -np.inf, np.float32)
    bounds[self.rows] = thresholds
    return bounds

  def divide(
    self, carry: Carry, probabilities: jax.Array, exits: np.ndarray
  ) -> tuple[Answers | None, '_Batch']:
    """Images that left, and images that stay.

    Args:
      carry: What the next stage reads.
      probabilities: [place, class].
      exits: [place], negative where the image stays.

    Returns:
      Answers, None if no image left, and those who stay, at their places in the carry.
    """
    exits = exits[self.rows]
    left = exits >= 0
    answers = None
    if left.any():  # Else probabilities need not be fetched.
      probabilities = np.asarray(probabilities)[self.rows[left]]
      answers = Answers(self.indices[left], probabilities, exits[left])
    stay = ~left
    return answers, _Batch(carry, self.rows[stay], self.indices[stay], self.thresholds[stay])


class _Queue:
  """Images that wait for a stage.

  Attributes:
    join: Makes one carry of rows of several.
    count: Images that wait.
  """

  def __init__(self, join: Callable[[Sequence[Carry], Sequence[np.ndarray], int], Carry]):
    self.join, self.count = join, 0
    self._parts = collections.deque()

  def put(self, part: _Batch) -> None:
    """Adds images."""
    if len(part.rows):
      self._parts.append(part)
      self.count += len(part.rows)

  def take(self, size: int) -> _Batch:
    """Removes up to `size` images, which get a carry of exactly `size` places."""
    taken, room = [], size
    while room and self._parts:
      carry, *fields = self._parts.popleft()
      taken.append(_Batch(carry, *(field[:room] for field in fields)))
      rest = _Batch(carry, *(field[room:] for field in fields))
      if len(rest.rows):
        self._parts.appendleft(rest)
      room -= len(taken[-1].rows)
    self.count -= size - room
    carries, rows, indices, thresholds = zip(*taken, strict=True)
    if len(carries) == 1 and len(jax.tree.leaves(carries[0])[0]) == size:
      # What has left makes no smaller batch, and nobody waits.
      carry, rows = carries[0], rows[0]
    else:
      carry, rows = self.join(carries, rows, size), np.arange(size - room)
    return _Batch(carry, rows, np.concatenate(indices), np.concatenate(thresholds))


def _join_on_host(carries, rows, size):
  """Rows of several carries, which may be on a device whose memory is the host's."""

  def join(*arrays):
    joined, start = np.zeros((size, *arrays[0].shape[1:]), arrays[0].dtype), 0
    for array, part in zip(arrays, rows, strict=True):
      places = joined[start : start + len(part)]
      np.take(np.asarray(array), part, axis=0, out=places, mode='clip')  # Other modes copy twice.
      start += len(part)
    return joined

  return jax.tree.map(join, *carries)


def _join_on_device(carries, rows, size):
  """Rows of several carries, which stay where they are."""
  joined, start = None, 0
  for carry, part in zip(carries, rows, strict=True):
    places = np.full(size, -1, np.int32)
    places[start : start + len(part)] = part
    joined = (
      _select(carry, np.maximum(places, 0)) if joined is None else _fill(joined, carry, places)
    )
    start += len(part)
  return joined


@jax.jit
def _select(carry, rows):
  """Rows of a carry."""
  return jax.tree.map(lambda x: x[rows], carry)


@partial(jax.jit, donate_argnums=0)
def _fill(joined, carry, rows):
  """Puts rows of a carry in the places of another where the row's number is not negative."""

  def fill(into, x):
    is_taken = (rows >= 0).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(is_taken, x[jnp.maximum(rows, 0)], into)

  return jax.tree.map(fill, joined, carry)


def _step(stage, weights, carry, thresholds):
  """A stage, and who is sure enough after it."""
  features, logits = stage(weights, carry)
  probabilities = jax.nn.softmax(logits.astype(jnp.float32))
  lowered = thresholds - _SLACK * jnp.maximum(0, 1 - thresholds)
  return (features, logits), probabilities, probabilities.max(axis=-1) >= lowered


def _program(function, weights):
  """A function of (weights, …), compiled when first called with the rest."""
  if sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) > _MOST_CONSTANTS:
    return partial(jax.jit(function, compiler_options=compiler_options()), weights)

  def with_constants(*rest):
    # Behind the barrier, for what XLA computes of constants differs from program to program.
    return function(jax.lax.optimization_barrier(weights), *rest)

  return jax.jit(with_constants, compiler_options=compiler_options())


def _expected_costs(madds, sizes, overhead):
  """What `AdaptiveClassifier._plan` takes, by multiply-adds.

  Args:
    madds: [exit], of an image that leaves there.
    sizes: The batch sizes that there are.
    overhead: What a program costs besides.
  """
  stages = [{size: overhead + size * work for size in sizes} for work in np.diff(madds, prepend=0)]
  spared = (len(madds) - 1) * overhead
  as_one = {
    size: overhead + size * madds[-1]
    for size in sizes
    if size == 1 or spared > _LEAST_TO_SPARE * size * madds[-1]
  }
  return stages, as_one


def _cheapest_batches(costs, most):
  """How batches of images that are left are cheapest to run.

  Args:
    costs: A batch size → what a batch costs.
    most: The largest batch size to use.

  Returns:
    [count], the least cost of `count` images, up to `most`, and the size of the first of the
    batches that have it.
  """
  costs = {size: cost for size, cost in costs.items() if size <= most}
  least, first = [0], [0]
  for count in range(1, most + 1):
    cost, size = min((cost + least[max(0, count - size)], -size) for size, cost in costs.items())
    least.append(cost)
    first.append(-size)
  return np.array(least), first


def _all_stages(stages, weights, images, thresholds):
  """Probabilities [image, class] and exits [image].

  The device alone decides where images leave, and is done when all have.
  """

  def run(index, carry, answers):
    probabilities, exits = answers
    carry, here, leaves = _step(stages[index], weights[index], carry, thresholds[:, index])
    is_last = index + 1 == len(stages)
    stay = exits < 0
    answers = (
      jnp.where(stay[:, np.newaxis], here, probabilities),
      jnp.where(stay & (leaves | is_last), index, exits),
    )
    if is_last:
      return answers
    everyone_left = (answers[1] >= 0).all()
    return jax.lax.cond(
      everyone_left, lambda _, answers: answers, partial(run, index + 1), carry, answers
    )

  return run(0, images, (jnp.zeros((len(images), 1)), jnp.full(len(images), -1, jnp.int32)))


def _zeros(one, size):
  """A carry of `size` zeros on the device, shaped like the one of one image."""
  return jax.device_put(jax.tree.map(lambda x: np.zeros((size, *x.shape[1:]), x.dtype), one))


@functools.cache
def compiler_options() -> dict[str, str]:
  """Options for compilation that pay on this platform; none if this version of XLA lacks them."""
  options = _COMPILER_OPTIONS.get(jax.default_backend(), {})
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except jax.errors.JaxRuntimeError:
    return {}
  return options


def manifest_checksum(manifest: dict[str, Any]) -> str:
  """The checksum of a manifest without the field that holds it."""
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_checked(folder, name, checksum):
  path = os.path.join(folder, name)
  try:
    with open(path, 'rb') as file:
      content = file.read()
  except OSError as error:
    raise ValueError(f'{path} cannot be read ({error.strerror}): export again') from error
  if hashlib.sha256(content).hexdigest() != checksum:
    raise ValueError(f'{path} is not as it was written: export again')
  return content


def _call_exported(exported, weights, carry):
  return exported.call(weights, carry)


def _from_json(threshold):
  """A threshold; null is that of an exit where no image leaves."""
  return np.inf if threshold is None else threshold
