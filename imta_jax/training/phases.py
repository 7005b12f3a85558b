"""Sets up a training phase: its network, optimizer, initial state, teacher and steps."""

import collections
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from imta_jax import config as config_lib
from imta_jax.adaptive.cost import ExitCost, exit_costs
from imta_jax.errors import UsageError, first_line
from imta_jax.models.folding import unfold_batch_norm
from imta_jax.models.initial_values import initialize, transplant
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.training import steps, train_state
from imta_jax.training import workdir as layout

Variables = Mapping[str, Any]


class Phase:
  """A phase that is ready for its first step.

  Its arrays are on the host or the default device, not yet replicated.

  Attributes:
    name: Its name in folders and output.
    config: Its entry in config.phases.
    model: Its network.
    num_steps: The number of training steps.
    schedule: The learning rate of each step.
    state: The state before the first step.
    teacher: Variables of the teacher if it is the network of the previous phase; otherwise empty.
    loaded: What was loaded from config.init_from; empty if nothing was.
    train_step: See `steps.make_train_step`.
  """

  def __init__(
    self,
    config: ConfigDict,
    index: int,
    predecessor: tuple[MultiExitNetwork, Variables] | None = None,
    donor: Callable[[MultiExitNetwork, tuple[int, int, int]], Variables] | None = None,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    steps_per_epoch: int,
  ):
    """Sets up a phase.

    Args:
      config: A complete config; see imta_jax.config.
      index: Index of the phase, counted from 0.
      predecessor: Network and variables of the previous phase, from which it starts; None for the
        first phase.
      donor: Loads the variables of config.init_from, from which the first phase starts, for its
        network and image shape; None if that is not set.
      num_classes: Number of classes of the data set.
      image_shape: (height, width, channels) of the images.
      steps_per_epoch: Training steps per epoch.

    Raises:
      UsageError: If a field of config.model is wrong, the network does not fit the images, the
        donor has nothing in common with it, or the first phase freezes layers that have no donor.
    """
    phase = config.phases[index]
    self.name, self.config, self.loaded = layout.phase_name(index), phase, ''
    self.model = config_lib.create_model(config, phase, num_classes)
    self._image_shape, self._cuda_graphs = image_shape, config.cuda_graphs
    variables = fresh = initial_variables(self.model, config.seed, image_shape)
    if predecessor is not None:
      variables = transplant(predecessor[1], fresh)
    else:
      if donor is not None:
        variables, self.loaded = start_from(donor(self.model, image_shape), fresh)
      _check_frozen(phase, variables['params'], fresh['params'])
    self.num_steps = phase.steps or max(1, round(phase.epochs * steps_per_epoch))
    self.schedule = train_state.create_schedule(
      phase, self.num_steps, steps_per_epoch, config.batch_size
    )
    optimizer = train_state.create_optimizer(phase, self.schedule)
    self.state = train_state.create_state(variables, phase, optimizer)
    teacher_model, self.teacher = _teacher(phase, predecessor)
    self.train_step = steps.make_train_step(self.model, teacher_model, phase, optimizer)

  @functools.cached_property
  def costs(self) -> list[ExitCost]:
    """The cost up to each exit, [exit]."""
    return exit_costs(self.model, self._image_shape, self.state.weights.variables)

  @functools.cached_property
  def predict(self) -> Callable:
    """The mapped evaluation step; see `steps.make_predict_step`."""
    step = steps.make_predict_step(self.model)
    return steps.on_devices(step, (None, 0), cuda_graphs=self._cuda_graphs)


def initial_variables(
  model: MultiExitNetwork, seed: int, image_shape: tuple[int, int, int]
) -> Variables:
  """Draws the initial variables of a network.

  Raises:
    UsageError: If the network does not fit the images.
  """
  try:
    return initialize(model, seed, image_shape)
  except (ValueError, ZeroDivisionError) as error:
    raise UsageError(
      f'config.model does not fit images of {image_shape}: {first_line(error)}'
    ) from error


def start_from(donor: Variables, fresh: Variables) -> tuple[Variables, str]:
  """Takes the variables of a trained network whose names and shapes agree with a new one's.

  Classifiers of networks with and without ISC have the rows of the embedding in common.

  Args:
    donor: Variables of the trained network, which may have other exits or classes, and be folded.
    fresh: Initial variables of the new network.

  Returns:
    Variables with the structure of `fresh`, and what was loaded: 'loaded 294 of 326 arrays; new:
    exits_0 to exits_3, classifiers_0 to classifiers_4 (12 classes); unused: 2 of the trained
    network'.

  Raises:
    UsageError: If nothing agrees.
  """
  donor = unfold_batch_norm(donor, fresh)
  variables = transplant(donor, fresh)
  flat_donor, flat, flat_fresh = (flatten_dict(v, sep='/') for v in (donor, variables, fresh))
  new = [name for name, leaf in flat_fresh.items() if flat[name] is leaf]
  if len(new) == len(flat_fresh):
    raise UsageError(
      'the network of config.init_from has no layer in common with this one: give config.model the '
      'fields of that network'
    )
  unused = len(flat_donor.keys() - flat.keys())
  return variables, (
    f'loaded {len(flat) - len(new)} of {len(flat)} arrays; new: {_summary(new, flat)}; unused: '
    f'{unused} of the trained network'
  )


def _check_frozen(phase: ConfigDict, params: Variables, fresh: Variables) -> None:
  """Refuses a first phase that keeps initial values as they are."""
  for name in params:
    leaves = zip(jax.tree.leaves(params[name]), jax.tree.leaves(fresh[name]), strict=True)
    if not train_state.is_trained(name, phase) and any(leaf is new for leaf, new in leaves):
      raise UsageError(
        f'config.phases[0] does not train {name}, which has no weights to start from: set '
        'config.init_from to a network with all layers that are not trained'
      )


def _summary(new: Sequence[str], flat: Mapping[str, Any]) -> str:
  """Summarizes new variables by their stages, exits and classifiers."""
  totals = collections.Counter(name.split('/')[1] for name in flat)
  counts = collections.Counter(name.split('/')[1] for name in new)
  parts = []
  for kind in ('stages', 'exits', 'classifiers'):
    numbers = sorted(int(module.split('_')[1]) for module in totals if module.startswith(kind))
    of_kind = [f'{kind}_{number}' for number in numbers]
    for is_new, run in itertools.groupby(of_kind, lambda module: counts[module] == totals[module]):
      first, *others = run
      if is_new:
        parts.append(f'{first} to {others[-1]}' if others else first)
      else:
        parts += [
          f'{counts[module]} of {totals[module]} arrays of {module}'
          for module in (first, *others)
          if counts[module]
        ]
    if kind == 'classifiers' and any(module in counts for module in of_kind):
      parts[-1] += f' ({len(flat[f"params/{of_kind[-1]}/dense/bias"])} classes)'
  return ', '.join(parts) or 'none'


def _teacher(
  phase: ConfigDict, predecessor: tuple[MultiExitNetwork, Variables] | None
) -> tuple[MultiExitNetwork | None, Variables]:
  """Returns the teacher's network and variables if it is the previous phase's network."""
  if phase.loss != 'one_for_all' or phase.teacher != 'frozen':
    return None, {}
  assert predecessor is not None  # `config.validate` refuses it in the first phase.
  model, variables = predecessor
  if phase.trained == 'last_layers':  # The student has the same backbone.
    variables = {
      kind: {name: tree for name, tree in trees.items() if name.startswith('classifiers_')}
      for kind, trees in variables.items()
    }
  return model, variables
