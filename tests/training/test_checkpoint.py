"""Checkpoints: restored states equal the saved ones, and corrupt checkpoints are skipped."""

import contextlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils

from imta_jax.errors import UsageError
from imta_jax.training.checkpoint import Checkpoints


def make_state(step):
  random = np.random.default_rng(step)
  return {
    'step': np.int32(step),
    'trained': {'dense': {'kernel': random.normal(size=(300, 40)).astype(np.float32)}},
    'frozen': {},
    'totals': [random.normal(size=7).astype(np.float32), np.bool_(True)],
  }


LIKE = jax.tree.map(jnp.zeros_like, make_state(0))


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert jax.tree.structure(one) == jax.tree.structure(other)
  assert jax.tree.map(lambda leaf: leaf.dtype, one) == jax.tree.map(lambda leaf: leaf.dtype, other)


def open_folder(folder, **options):
  return Checkpoints(epath.Path(folder), **options)


@contextlib.contextmanager
def saved(folder, accuracies):
  """Saves a checkpoint for each {step: validation accuracy}."""
  with open_folder(folder) as checkpoints:
    for step, accuracy in accuracies.items():
      checkpoints.save(step, make_state(step), accuracy)
    checkpoints.wait()
    yield checkpoints


@pytest.fixture
def folder(tmp_path):
  return tmp_path / 'checkpoints' / 'phase_1'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A folder with checkpoints 1, 2 and 3, of which the first is the best."""
  folder = tmp_path_factory.mktemp('whole') / 'phase_1'
  with saved(folder, {1: 0.9, 2: 0.5, 3: 0.4}):
    return folder


@pytest.fixture
def copy(whole, folder):
  shutil.copytree(whole, folder)
  return folder


def largest_file(checkpoint):
  files = [path for path in checkpoint.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def truncate(checkpoint):
  path = largest_file(checkpoint)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_data(checkpoint):
  largest_file(checkpoint).write_bytes(b'')


def flip_bits(checkpoint):
  path = largest_file(checkpoint)
  content = bytearray(path.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 4] = bytes(byte ^ 0xFF for byte in content[middle : middle + 4])
  path.write_bytes(bytes(content))


def delete_data(checkpoint):
  largest_file(checkpoint).unlink()


def delete_state(checkpoint):
  shutil.rmtree(checkpoint / 'state')


def delete_record(checkpoint):
  shutil.rmtree(checkpoint / 'record')


def delete_everything(checkpoint):
  shutil.rmtree(checkpoint)
  checkpoint.mkdir()


FAULTS = [
  truncate,
  empty_data,
  flip_bits,
  delete_data,
  delete_state,
  delete_record,
  delete_everything,
]


def warnings_of(caplog):
  """The warnings that name a checkpoint as corrupt; Orbax may add its own."""
  return [
    record.getMessage() for record in caplog.records if 'Skipping corrupt' in record.getMessage()
  ]


def test_restore_gives_what_was_saved_also_of_states_on_devices(folder):
  with open_folder(folder) as checkpoints:
    assert checkpoints.steps('last') == checkpoints.steps('best') == []
    assert checkpoints.restore(LIKE) is None
    checkpoints.save(7, jax.tree.map(jnp.asarray, make_state(7)), 0.5)
    assert_same(checkpoints.restore(LIKE), make_state(7))
  for read_only in (False, True):
    with open_folder(folder, read_only=read_only) as checkpoints:
      assert_same(checkpoints.restore(LIKE), make_state(7))


def test_what_is_saved_is_the_state_of_that_moment_and_the_first_of_a_step(folder):
  state = make_state(1)
  with open_folder(folder) as checkpoints:
    checkpoints.save(1, state, 0.5)
    checkpoints.wait()
    state['trained']['dense']['kernel'][:] = 0
    checkpoints.save(1, state, 0.9)
    assert_same(checkpoints.restore(LIKE), make_state(1))
  with open_folder(folder) as checkpoints:
    checkpoints.save(1, state, 0.9)
    assert_same(checkpoints.restore(LIKE), make_state(1))


@pytest.mark.parametrize(
  ('accuracies', 'last', 'best'),
  [
    ({1: 0.5, 2: 0.9, 3: 0.3, 4: 0.1, 5: 0.2}, [5, 4, 2], [2, 5, 4]),
    ({1: 0.0, 2: None, 3: None}, [3, 2, 1], [1, 3, 2]),
    ({1: 0.5, 2: 0.9, 3: 0.9, 4: 0.1, 5: 0.2}, [5, 4, 2], [2, 5, 4]),  # The earliest of equals,
    ({10: 0.9, 15: None, 20: 0.9}, [20, 15, 10], [10, 20, 15]),  # also after a stop in between.
  ],
)
def test_the_latest_two_and_the_best_are_kept(accuracies, last, best, folder):
  with saved(folder, accuracies) as checkpoints:
    assert (checkpoints.steps('last'), checkpoints.steps('best')) == (last, best)
    assert int(checkpoints.restore(LIKE)['step']) == last[0]
    assert int(checkpoints.restore(LIKE, 'best')['step']) == best[0]
  with open_folder(folder, read_only=True) as checkpoints:
    assert (checkpoints.steps('last'), checkpoints.steps('best')) == (last, best)


@pytest.mark.parametrize('fault', FAULTS)
def test_a_corrupt_checkpoint_is_skipped_with_one_warning(fault, copy, caplog):
  fault(copy / '3')
  with open_folder(copy) as checkpoints:
    assert_same(checkpoints.restore(LIKE), make_state(2))
    (warning,) = warnings_of(caplog)
    assert str(copy / '3') in warning and '\n' not in warning
    assert checkpoints.steps('last') == [2, 1]
    checkpoints.save(3, make_state(3), 0.4)
    assert_same(checkpoints.restore(LIKE), make_state(3))


def test_a_corrupt_best_checkpoint_gives_way_to_the_next_best(copy, caplog):
  flip_bits(copy / '1')
  with open_folder(copy) as checkpoints:
    assert_same(checkpoints.restore(LIKE, 'best'), make_state(2))
  assert len(warnings_of(caplog)) == 1


def test_a_checkpoint_that_another_host_cannot_read_is_skipped_by_all(copy, caplog, monkeypatch):
  of_others = iter([[True, False]])  # The first of them is corrupt, not only for the moment.

  def gather(value):
    return np.array([value, next(of_others, value)])

  with open_folder(copy) as checkpoints:
    monkeypatch.setattr(multihost_utils, 'process_allgather', gather)
    assert_same(checkpoints.restore(LIKE), make_state(2))
  (warning,) = warnings_of(caplog)
  assert str(copy / '3') in warning and 'on another host' in warning


def test_if_all_checkpoints_are_corrupt_there_is_none(copy, caplog):
  for step, fault in zip('123', (truncate, flip_bits, delete_everything), strict=True):
    fault(copy / step)
  with open_folder(copy) as checkpoints:
    assert checkpoints.restore(LIKE) is None
  assert len(warnings_of(caplog)) == 3


def test_what_killed_runs_leave_is_removed_without_a_warning(copy, caplog):
  for step in (4, 5):  # The next run saves one of them.
    shutil.copytree(copy / '3', copy / f'{step}.orbax-checkpoint-tmp')
  with saved(copy, {4: 0.6}):
    pass
  assert sorted(path.name for path in copy.iterdir()) == ['1', '3', '4']
  assert not [record for record in caplog.records if record.levelname == 'WARNING']


def test_a_half_written_checkpoint_is_no_checkpoint(copy, caplog):
  shutil.copytree(copy / '3', copy / '4.orbax-checkpoint-tmp-123')
  delete_data(copy / '4.orbax-checkpoint-tmp-123')
  with open_folder(copy) as checkpoints:
    assert checkpoints.steps('last') == [3, 2, 1]
    assert_same(checkpoints.restore(LIKE), make_state(3))
    assert warnings_of(caplog) == []
    checkpoints.save(4, make_state(4), 0.1)
    assert_same(checkpoints.restore(LIKE), make_state(4))


def test_a_corrupt_accuracy_is_skipped_in_training(copy, caplog):
  (copy / '1' / 'record' / 'metadata').write_bytes(b'{"validation_acc')
  with open_folder(copy) as checkpoints:
    checkpoints.save(4, make_state(4), 0.3)
    (warning,) = warnings_of(caplog)
    assert str(copy / '1') in warning
    assert_same(checkpoints.restore(LIKE, 'best'), make_state(2))


@pytest.mark.parametrize('content', [b'', b'{"validation_accuracy": "high"}'])
def test_reading_alone_refuses_to_choose_the_best_without_all_accuracies(content, copy):
  (copy / '1' / 'record' / 'metadata').write_bytes(content)
  with open_folder(copy, read_only=True) as checkpoints:
    with pytest.raises(UsageError, match=r'checkpoint .*/1 is corrupt \(.*run the training comman'):
      checkpoints.restore(LIKE, 'best')
    assert_same(checkpoints.restore(LIKE), make_state(3))


def test_reading_alone_changes_nothing(copy, tmp_path):
  truncate(copy / '3')
  files = sorted(copy.rglob('*'))
  refused = pytest.raises(UsageError, match=r'checkpoint .*/3 is corrupt \(.*run the training')
  with open_folder(copy, read_only=True) as checkpoints, refused:
    checkpoints.restore(LIKE)  # Another state would silently give other answers.
  assert sorted(copy.rglob('*')) == files
  with open_folder(tmp_path / 'absent', read_only=True) as checkpoints:
    assert checkpoints.restore(LIKE) is None
  assert not (tmp_path / 'absent').exists()


def test_a_temporary_error_moves_nothing(copy, monkeypatch):
  files = set(copy.rglob('*'))

  def fail(*_):
    raise TimeoutError(110, 'Connection timed out')

  with open_folder(copy) as checkpoints:
    monkeypatch.setattr(checkpoints, '_read', fail)
    with pytest.raises(UsageError, match='cannot be read .*timed out.*: try again'):
      checkpoints.restore(LIKE)
    monkeypatch.undo()
    assert_same(checkpoints.restore(LIKE), make_state(3))
  assert files <= set(copy.rglob('*'))


def test_a_save_that_fails_is_refused_in_one_line_and_keeps_what_is_there(copy):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpoints = open_folder(copy)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # No room for a kernel.
  try:
    with pytest.raises(UsageError, match=r'could not be saved \(.*File too large.*, and earlier'):
      checkpoints.save(4, make_state(4), 0.3)
      checkpoints.wait()
    checkpoints.__exit__(UsageError)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  with open_folder(copy) as again:
    assert again.steps('last') == [3, 2, 1]
    again.save(4, make_state(4), 0.3)
    assert_same(again.restore(LIKE), make_state(4))


def test_a_save_without_room_on_the_disk_is_not_begun(copy, monkeypatch):
  usage = shutil.disk_usage(copy)
  with open_folder(copy) as checkpoints:
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=48_000))
    with pytest.raises(UsageError, match='has 48,000 bytes free, but a checkpoint takes 48,033;'):
      checkpoints.save(4, make_state(4), 0.3)
    assert checkpoints.steps('last') == [3, 2, 1]


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    ({'step': LIKE['step']}, 'its frozen|its totals'),
    ({**LIKE, 'more': LIKE['step']}, 'its more is absent, expected int32'),
    ({**LIKE, 'step': jnp.zeros((), jnp.float32)}, 'its step is int32.*, expected float32'),
    (
      {**LIKE, 'trained': {'dense': {'kernel': jnp.zeros((4, 4))}}},
      r'its trained/dense/kernel is .*, expected float32\(4, 4\)',
    ),
  ],
  ids=['less', 'more', 'type', 'shape'],
)
def test_a_state_of_another_structure_is_refused_and_removes_nothing(other, message, copy):
  refused = pytest.raises(UsageError, match=f'does not fit the network of this config: {message}')
  with open_folder(copy) as checkpoints, refused:
    checkpoints.restore(other)
  with open_folder(copy) as checkpoints:
    assert checkpoints.steps('last') == [3, 2, 1]


def test_a_relative_folder_is_read(copy, monkeypatch):
  monkeypatch.chdir(copy.parent)
  with open_folder(copy.name, read_only=True) as checkpoints:
    assert_same(checkpoints.restore(LIKE), make_state(3))
