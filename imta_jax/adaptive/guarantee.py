"""Thresholds with a statistical guarantee: a bound on the accuracy that early exits lose.

All exits share one threshold. Starting from the strictest of a fixed list, looser ones are accepted
as long as a statistical test on validation images rejects that early exits lose more than allowed.
The first threshold that is not accepted ends the search, so that all tests together are wrong with
no more probability than each one (fixed-sequence testing; Learn then Test, Angelopoulos et al.,
2021, and for early exits Fast yet Safe, Jazbec et al., NeurIPS 2024).

The guarantee holds for images that are drawn like the validation images, independently of them. It
breaks for images of another kind (another camera, other classes, another mix of classes), and it is
weakened if the validation images have already served to choose between many networks, or to fit the
temperatures of the rule 'calibrated'. Watch the exits' shares: if they drift, validate again.
"""

import dataclasses
import functools

import numpy as np

from .rules import choose_exits

# Thresholds from strict to loose, denser towards 1, where most scores lie. They must not depend on
# the validation images.
LEVELS = 1 - np.geomspace(1e-6, 1, 121)

# Stakes of the bets, as fractions of the largest possible; see `loses_less`. High stakes need few
# images where images with a loss are rare, low ones where they are not.
_STAKES = np.array([0.05, 0.15, 0.35, 0.65, 0.95])


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
  """Calibration data.

  Attributes:
    scores: [exit, image], float32, by the exit rule.
    correct: [exit, image], whether the answer of an exit is right.

  Raises:
    ValueError: If shapes or types are others, or there is no image.
  """

  scores: np.ndarray
  correct: np.ndarray

  def __post_init__(self):
    shapes, kinds = (self.scores.shape, self.correct.shape), (self.scores.dtype, self.correct.dtype)
    if len(set(shapes)) > 1 or self.scores.ndim != 2 or not self.scores.size:
      raise ValueError(f'scores and correct, of shapes {shapes}, must both be [exit, image]')
    if [kind.kind for kind in kinds] != ['f', 'b']:
      raise ValueError(f'scores and correct, of types {kinds}, must be floats and booleans')

  @functools.cached_property
  def loss_counts(self) -> np.ndarray:
    """Number of images with a loss of -1, 0 and 1, [level, 3]; see `loses_less`."""
    num_exits, num_images = self.scores.shape
    counts = []
    for level in LEVELS.astype(np.float32):
      exits = choose_exits(self.scores, np.full(num_exits, level))
      losses = self.correct[-1].astype(int) - self.correct[exits, np.arange(num_images)]
      counts.append(np.bincount(losses + 1, minlength=3))
    return np.array(counts)


def guaranteed_thresholds(
  validation: CalibrationSet, max_loss: float, confidence: float
) -> np.ndarray:
  """The loosest thresholds whose accuracy is guaranteed to lie close to the last exit's.

  Args:
    validation: Scores of images that are like those to come.
    max_loss: By how much the accuracy may lie below that of the last exit, a fraction.
    confidence: With which probability, over the draw of the validation images, it does not lie
      lower.

  Returns:
    [exit], float32: the same at each exit but the last; infinity if nothing can be guaranteed, so
    that no image leaves early and nothing is lost.

  Raises:
    ValueError: If max_loss or confidence is not between 0 and 1.
  """
  for name, value in (('max_loss', max_loss), ('confidence', confidence)):
    if not 0 < value < 1:
      raise ValueError(f'{name} is {value}: it must be above 0 and below 1')
  accepted = loses_less(validation.loss_counts, max_loss, confidence)
  num_accepted = np.append(accepted, False).argmin()
  chosen = LEVELS[num_accepted - 1] if num_accepted else np.inf
  return np.array([chosen] * (len(validation.scores) - 1) + [-np.inf], np.float32)


def loses_less(counts: np.ndarray, max_loss: float, confidence: float) -> np.ndarray:
  """Tests whether the expected loss is below a bound.

  Whoever bets a fraction s of their capital against each image's loss L, at odds that are fair if
  the expected loss is max_loss, has Π (1 + s (max_loss - L)) in the end. If the expected loss is
  max_loss or more, the expected capital is at most 1, so that a capital of 1 / (1 - confidence) or
  more has at most the probability 1 - confidence (Markov's inequality). The capital is the mean
  over several stakes s (Estimating means of bounded random variables by betting, Waudby-Smith and
  Ramdas, 2023). No assumption is made on the distribution of losses.

  Args:
    counts: [..., 3], number of independent images with a loss of -1, 0 and 1.
    max_loss: The bound.
    confidence: The probability of not being wrong if the expected loss is not below the bound.

  Returns:
    [...], whether the test says that it is.
  """
  stakes = _STAKES / (1 - max_loss)
  logs = counts @ np.log1p(stakes * (max_loss - np.array([[-1], [0], [1]])))
  capital = np.logaddexp.reduce(logs, axis=-1) - np.log(len(stakes))
  return capital >= -np.log1p(-confidence)
