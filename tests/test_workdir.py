"""Names of phases in figures."""

import pytest

from imta_jax import config as config_lib
from imta_jax import workdir


@pytest.mark.parametrize(
  ('phase', 'changes', 'label'),
  [
    (config_lib.phase_one(), {}, 'p (with GE)'),
    (config_lib.phase_one(), {'gradient_equilibrium': 'off'}, 'p'),
    (config_lib.phase_two(), {}, 'p (with ISC and OFA)'),
    (config_lib.phase_two(), {'loss': 'cross_entropy'}, 'p (with ISC)'),
    (config_lib.phase_two(), {'collaboration': 'off'}, 'p (with OFA)'),
  ],
)
def test_figures_name_the_techniques_of_a_phase(phase, changes, label):
  phase.update(changes)
  assert workdir.phase_label('p', phase) == label
