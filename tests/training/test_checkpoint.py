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


def save_all(folder, accuracies):
  """Saves a checkpoint for each {step: validation accuracy}."""
  checkpoints = open_folder(folder)
  for step, accuracy in accuracies.items():
    checkpoints.save(step, make_state(step), accuracy)
  checkpoints.wait()
  return checkpoints


@pytest.fixture
def folder(tmp_path):
  return tmp_path / 'checkpoints' / 'phase_1'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A folder with checkpoints 1, 2 and 3, of which the first is the best."""
  folder = tmp_path_factory.mktemp('whole') / 'phase_1'
  save_all(folder, {1: 0.9, 2: 0.5, 3: 0.4}).close()
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


DAMAGES = [
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


def test_restore_gives_what_was_saved(folder):
  state = make_state(7)
  checkpoints = save_all(folder, {7: 0.5})
  assert_same(checkpoints.restore(LIKE), state)
  checkpoints.close()
  for read_only in (False, True):
    again = open_folder(folder, read_only=read_only)
    assert_same(again.restore(LIKE), state)
    again.close()


def test_states_on_devices_are_saved(folder):
  checkpoints = open_folder(folder)
  checkpoints.save(1, jax.tree.map(jnp.asarray, make_state(1)), None)
  assert_same(checkpoints.restore(LIKE), make_state(1))
  checkpoints.close()


def test_what_is_saved_is_the_state_of_that_moment(folder):
  state = make_state(1)
  checkpoints = open_folder(folder)
  checkpoints.save(1, state, 0.5)
  checkpoints.wait()
  state['trained']['dense']['kernel'][:] = 0
  assert_same(checkpoints.restore(LIKE), make_state(1))
  checkpoints.close()


def test_an_empty_folder_gives_none(folder):
  checkpoints = open_folder(folder)
  assert checkpoints.steps('last') == checkpoints.steps('best') == []
  assert checkpoints.restore(LIKE) is None
  checkpoints.close()


def test_orders_and_what_is_kept(folder):
  checkpoints = save_all(folder, {1: 0.5, 2: 0.9, 3: 0.3, 4: 0.1, 5: 0.2})
  assert checkpoints.steps('last') == [5, 4, 2]
  assert checkpoints.steps('best') == [2, 5, 4]
  assert int(checkpoints.restore(LIKE)['step']) == 5
  assert int(checkpoints.restore(LIKE, 'best')['step']) == 2
  checkpoints.close()
  again = open_folder(folder, read_only=True)
  assert again.steps('last') == [5, 4, 2]
  assert again.steps('best') == [2, 5, 4]
  again.close()


@pytest.mark.parametrize('accuracy', [0.0, 0.5])
def test_states_without_accuracy_come_after_those_with_one(accuracy, folder):
  checkpoints = save_all(folder, {1: accuracy, 2: None, 3: None})
  assert checkpoints.steps('last') == [3, 2, 1]
  assert checkpoints.steps('best') == [1, 3, 2]
  checkpoints.close()


def test_of_equals_the_earliest_is_best(folder):
  checkpoints = save_all(folder, {1: 0.9, 2: 0.9})
  assert checkpoints.steps('best') == [1, 2]
  checkpoints.close()


def test_the_earliest_of_equals_is_kept_when_others_follow(folder):
  checkpoints = save_all(folder, {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.1, 5: 0.2})
  assert checkpoints.steps('best')[0] == 2
  checkpoints.close()


def test_a_stop_in_between_does_not_change_what_is_best(folder):
  straight = save_all(folder / 'straight', {10: 0.9, 20: 0.9})
  stopped = save_all(folder / 'stopped', {10: 0.9, 15: None, 20: 0.9})
  assert straight.steps('best')[0] == stopped.steps('best')[0]
  straight.close()
  stopped.close()


def test_a_second_save_of_a_step_keeps_the_first(folder):
  checkpoints = save_all(folder, {1: 0.5})
  checkpoints.save(1, make_state(99), 0.9)
  checkpoints.wait()
  assert_same(checkpoints.restore(LIKE), make_state(1))
  checkpoints.close()
  again = open_folder(folder)
  again.save(1, make_state(99), 0.9)
  again.wait()
  assert_same(again.restore(LIKE), make_state(1))
  again.close()


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_corrupt_checkpoint_is_passed_over_with_one_warning(damage, copy, caplog):
  damage(copy / '3')
  checkpoints = open_folder(copy)
  assert_same(checkpoints.restore(LIKE), make_state(2))
  (warning,) = warnings_of(caplog)
  assert str(copy / '3') in warning
  assert '\n' not in warning
  assert checkpoints.steps('last') == [2, 1]
  checkpoints.save(3, make_state(3), 0.4)
  assert_same(checkpoints.restore(LIKE), make_state(3))
  checkpoints.close()


def test_a_corrupt_best_checkpoint_gives_way_to_the_next_best(copy, caplog):
  flip_bits(copy / '1')
  checkpoints = open_folder(copy)
  assert_same(checkpoints.restore(LIKE, 'best'), make_state(2))
  assert len(warnings_of(caplog)) == 1
  checkpoints.close()


def test_a_checkpoint_that_another_host_cannot_read_is_skipped_by_all(copy, caplog, monkeypatch):
  of_others = iter([[True, False]])  # The first of them is not intact, nor only so at the moment.

  def gather(value):
    return np.array([value, next(of_others, value)])

  checkpoints = open_folder(copy)
  monkeypatch.setattr(multihost_utils, 'process_allgather', gather)
  assert_same(checkpoints.restore(LIKE), make_state(2))
  (warning,) = warnings_of(caplog)
  assert str(copy / '3') in warning and 'on another host' in warning
  checkpoints.close()


def test_corrupt_checkpoints_one_after_the_other_are_skipped(copy, caplog):
  truncate(copy / '3')
  flip_bits(copy / '2')
  checkpoints = open_folder(copy)
  assert_same(checkpoints.restore(LIKE), make_state(1))
  assert len(warnings_of(caplog)) == 2
  checkpoints.close()


def test_no_whole_checkpoint_gives_none(copy, caplog):
  for step, damage in zip('123', (truncate, flip_bits, delete_everything), strict=True):
    damage(copy / step)
  checkpoints = open_folder(copy)
  assert checkpoints.restore(LIKE) is None
  assert len(warnings_of(caplog)) == 3
  checkpoints.close()


@pytest.mark.parametrize('name', ['4.orbax-checkpoint-tmp', '4.orbax-checkpoint-tmp-123'])
def test_a_half_written_checkpoint_is_no_checkpoint(name, copy, caplog):
  shutil.copytree(copy / '3', copy / name)
  delete_data(copy / name)
  checkpoints = open_folder(copy)
  assert checkpoints.steps('last') == [3, 2, 1]
  assert_same(checkpoints.restore(LIKE), make_state(3))
  assert warnings_of(caplog) == []
  checkpoints.save(4, make_state(4), 0.1)
  assert_same(checkpoints.restore(LIKE), make_state(4))
  checkpoints.close()


@pytest.mark.parametrize('content', [b'', b'{"validation_acc'])
def test_a_corrupt_accuracy_does_not_stop_a_run(content, copy):
  (copy / '3' / 'record' / 'metadata').write_bytes(content)
  checkpoints = open_folder(copy)
  assert checkpoints.restore(LIKE) is not None
  assert checkpoints.steps('best')[0] == 1
  checkpoints.close()


@pytest.mark.parametrize('content', [b'', b'{"validation_accuracy": "high"}'])
def test_reading_alone_refuses_to_choose_the_best_without_all_accuracies(content, copy):
  (copy / '1' / 'record' / 'metadata').write_bytes(content)
  checkpoints = open_folder(copy, read_only=True)
  with pytest.raises(UsageError, match=r'checkpoint .*/1 is corrupt \(.*run the training command'):
    checkpoints.restore(LIKE, 'best')
  assert_same(checkpoints.restore(LIKE), make_state(3))
  checkpoints.close()


def test_a_corrupt_accuracy_is_reported_before_another_checkpoint_is_the_best(copy, caplog):
  (copy / '1' / 'record' / 'metadata').write_bytes(b'')
  checkpoints = open_folder(copy)
  checkpoints.save(4, make_state(4), 0.3)
  (warning,) = warnings_of(caplog)
  assert str(copy / '1') in warning
  assert_same(checkpoints.restore(LIKE, 'best'), make_state(2))
  checkpoints.close()


def test_reading_alone_removes_nothing(copy):
  truncate(copy / '3')
  files = sorted(copy.rglob('*'))
  checkpoints = open_folder(copy, read_only=True)
  # Another state than the preferred one would give other answers without a word.
  with pytest.raises(UsageError, match=r'checkpoint .*/3 is corrupt \(.*run the training command'):
    checkpoints.restore(LIKE)
  checkpoints.close()
  assert sorted(copy.rglob('*')) == files


def test_an_error_of_the_moment_moves_nothing_aside(copy, monkeypatch):
  files = sorted(copy.rglob('*'))
  checkpoints = open_folder(copy)

  def fail(*_):
    raise TimeoutError(110, 'Connection timed out')

  monkeypatch.setattr(checkpoints, '_read', fail)
  with pytest.raises(UsageError, match='cannot be read .*timed out.*: try again'):
    checkpoints.restore(LIKE)
  monkeypatch.undo()
  assert_same(checkpoints.restore(LIKE), make_state(3))
  checkpoints.close()
  assert set(files) <= set(copy.rglob('*'))


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


def test_reading_alone_makes_no_folder(folder):
  checkpoints = open_folder(folder, read_only=True)
  assert checkpoints.restore(LIKE) is None
  checkpoints.close()
  assert not folder.exists()


@pytest.mark.parametrize(
  'other',
  [
    {'step': LIKE['step']},
    {**LIKE, 'more': LIKE['step']},
    {**LIKE, 'step': jnp.zeros((), jnp.float32)},
  ],
  ids=['less', 'more', 'type'],
)
def test_asking_for_a_state_of_another_structure_removes_nothing(other, copy):
  checkpoints = open_folder(copy)
  with pytest.raises(UsageError, match='does not fit the network of this config'):
    checkpoints.restore(other)
  checkpoints.close()
  again = open_folder(copy)
  assert again.steps('last') == [3, 2, 1]
  again.close()


def test_asking_for_another_shape_is_refused(copy):
  other = {**LIKE, 'trained': {'dense': {'kernel': jnp.zeros((4, 4))}}}
  checkpoints = open_folder(copy)
  with pytest.raises(UsageError, match=r'its trained/dense/kernel is .*, expected float32\(4, 4\)'):
    checkpoints.restore(other)
  checkpoints.close()


def test_a_relative_folder_is_read(copy, monkeypatch):
  monkeypatch.chdir(copy.parent)
  with contextlib.closing(open_folder(copy.name, read_only=True)) as checkpoints:
    assert_same(checkpoints.restore(LIKE), make_state(3))
