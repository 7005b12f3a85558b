"""What the host does after which training step."""

import dataclasses

# The first steps, and what compiling leaves to do, are not typical.
_STEPS_BEFORE_PROFILE = 10


@dataclasses.dataclass(frozen=True)
class Events:
  """The events of a phase, as pure functions of the step, so that all hosts agree on them.

  Hosts have to take the same steps together and ask equally often whether to stop, so nothing else
  decides where a dispatch of several steps ends.

  Attributes:
    first_step: The step that the phase starts or resumes from.
    num_steps: Number of steps of the phase.
    steps_per_epoch: Steps per epoch.
    log_every_steps: Steps between two logs of the metrics.
    validate_every_epochs: Epochs between two validations, after which the state is saved.
    steps_per_dispatch: Largest number of steps that are sent to the devices at once; None for no
      limit but the next event.
    profile_steps: Number of steps to profile.

  Example:
    >>> events = Events(0, 12, 6, log_every_steps=4, validate_every_epochs=2)
    >>> [events.next_after(step) for step in (0, 1, 4, 6, 8)]
    [1, 4, 6, 8, 12]
  """

  first_step: int
  num_steps: int
  steps_per_epoch: int
  log_every_steps: int
  validate_every_epochs: int
  steps_per_dispatch: int | None = None
  profile_steps: int = 0

  @property
  def profile(self) -> range:
    """The steps that are profiled, counted from 0."""
    start = self.first_step + _STEPS_BEFORE_PROFILE
    return range(start, start + self.profile_steps)

  def next_after(self, step: int) -> int:
    """Returns the number of steps taken at the next event."""
    edges = [self.first_step + 1, self.num_steps]  # The first step compiles.
    if self.profile:
      edges += [self.profile.start, self.profile.stop]
    for period in (self.steps_per_epoch, self.log_every_steps, self.steps_per_dispatch):
      if period is not None:
        edges.append((step // period + 1) * period)
    return min(edge for edge in edges if edge > step)

  def logs_at(self, step: int) -> bool:
    """Whether metrics are written; always at the end of an epoch."""
    return step % self.log_every_steps == 0 or self.ends_epoch_at(step)

  def ends_epoch_at(self, step: int) -> bool:
    """Whether an epoch or the phase ends."""
    return step % self.steps_per_epoch == 0 or step == self.num_steps

  def validates_at(self, step: int) -> bool:
    """Whether the network is validated and the state saved; always at the end of the phase."""
    epoch, position = divmod(step, self.steps_per_epoch)
    return step == self.num_steps or (position == 0 and epoch % self.validate_every_epochs == 0)
