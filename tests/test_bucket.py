"""Runs in a bucket: killed and resumed, with a server that fails, and used afterwards."""

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

pytest.importorskip('google.cloud.storage')
pytest.importorskip('trustme')

from fake_gcs import fake_gcs

from imta_jax import workdir_lock
from imta_jax.checkpoint import Checkpoints
from imta_jax.command_line import open_classifier
from imta_jax.errors import UsageError
from imta_jax.import_tensorflow import import_tensorflow
from imta_jax.metrics import Metrics
from imta_jax.workdir import load_config

ROOT = Path(__file__).parents[1]
COMMIT = 'commit_success.txt'
# 16 training images in batches of 8: 3 + 1 epochs of 2 steps.
OVERRIDES = (
  '--config.batch_size=8',
  '--config.evaluation_batch_size=8',
  '--config.log_every_steps=1',
  '--config.checkpoint_every_epochs=1',
  '--config.tensorboard=False',
  '--config.model.num_exits=2',
  '--config.model.channels=4',
  '--config.model.growth_rate=2',
  '--config.model.scale_factors=1,2',
  '--config.model.bottleneck_factors=1,2',
  '--config.phases[0].epochs=3',
  '--config.phases[1].epochs=1',
)


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  import_tensorflow()
  with pytest.MonkeyPatch.context() as patch, fake_gcs(tmp_path_factory.mktemp('gcs')) as server:
    for name, value in server.environment.items():
      patch.setenv(name, value)
    yield server


@pytest.fixture
def folder(request, server):
  """A folder for checkpoints, in a bucket of its own."""
  yield epath.Path(f'gs://{request.node.name.strip("]")}/checkpoints/phase_1'.replace('[', '-'))
  server.fault = lambda request: None


def state(step):
  weights = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
  return {'step': np.int32(step), 'weights': weights}


def names(server, folder):
  """Returns the names of the objects in a folder."""
  prefix = f'{folder}/'.removeprefix('gs://')
  return [name.removeprefix(prefix) for name in server.objects if name.startswith(prefix)]


def save(folder, *steps):
  with Checkpoints(folder) as checkpoints:
    for step in steps:
      checkpoints.save(step, state(step), 0.5)


def restored(folder):
  """Returns the step of the checkpoint that is restored, and checks what is in it."""
  with Checkpoints(folder) as checkpoints:
    found = checkpoints.restore(state(0))
  np.testing.assert_equal(found, state(int(found['step'])))
  return int(found['step'])


def test_nothing_is_restored_of_a_save_that_was_cut_off(server, folder):
  save(folder, 1, 2)
  del server.objects[f'{folder / "2" / COMMIT}'.removeprefix('gs://')]
  assert restored(folder) == 1
  save(folder, 2)
  assert restored(folder) == 2


def test_a_damaged_checkpoint_is_moved_aside(server, folder):
  save(folder, 1, 2)
  prefix = f'{folder}/2/state/'.removeprefix('gs://')
  paths = [path for path in server.objects if path.startswith(prefix)]
  largest = max(paths, key=lambda path: len(server.objects[path][1]))
  generation, content = server.objects[largest]
  server.objects[largest] = generation, bytes(len(content))
  assert restored(folder) == 1
  assert names(server, folder / '2') == []
  assert {COMMIT, 'state/_METADATA'} <= {*names(server, folder.parent / 'phase_1_damaged' / '2_0')}


def test_requests_that_fail_are_repeated(server, folder):
  requests = []

  def fault(request):
    requests.append(request)
    return HTTPStatus.SERVICE_UNAVAILABLE if len(requests) % 20 == 0 else None

  server.fault = fault
  save(folder, 1)
  assert restored(folder) == 1
  assert len(requests) > 100


def test_metrics_go_to_a_bucket_together_and_are_kept(server, folder):
  path = folder.parent.parent / 'metrics.jsonl'
  with Metrics(path, 'phase_1', 0, None) as metrics:
    metrics.write(1, {'loss': 1.0})
    metrics.write(2, {'loss': 1.0})
    assert not path.exists()
    metrics.flush()
    assert len(path.read_text().splitlines()) == 2
    metrics.write(3, {'loss': 1.0})
  assert len(path.read_text().splitlines()) == 3
  with Metrics(path, 'phase_1', 2, None):
    assert len(path.read_text().splitlines()) == 2


def test_a_bucket_that_refuses_is_told_in_one_line(server, folder):
  server.fault = lambda request: HTTPStatus.FORBIDDEN
  with pytest.raises(UsageError, match='config.json cannot be read or written .*403'):
    load_config(folder.parent.parent)
  with pytest.raises(UsageError, match='phase_1 cannot be opened .*403.*credentials'):
    Checkpoints(folder)


OTHER = b'process 7 on elsewhere, started at 2026-01-01\ntoken\n'


@pytest.fixture
def locked(folder, monkeypatch):
  """A workdir for locks, which give a sign of life often."""
  monkeypatch.setattr(workdir_lock, '_BETWEEN_SIGNS', 0.1)
  monkeypatch.setattr(workdir_lock, '_BETWEEN_LOOKS', 0.1)
  return folder.parent.parent


@pytest.fixture
def ended(monkeypatch):
  """The messages with which the process would have been ended."""
  messages = []
  monkeypatch.setattr(workdir_lock, 'end_at_once', lambda message, status: messages.append(message))
  return messages


def lock_of(workdir):
  return f'{workdir / ".lock"}'.removeprefix('gs://')


def put(server, workdir, content):
  """Writes the lock of a workdir, as somebody else."""
  server.objects[lock_of(workdir)] = next(server.generations), content


def assert_refused(workdir, holder):
  with (
    pytest.raises(UsageError, match=f'^workdir {workdir} is in use by {holder}'),
    workdir_lock.hold(workdir),
  ):
    pytest.fail('two runs hold the lock')


def wait_for(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_a_second_run_is_refused_while_the_first_lives(server, locked):
  with workdir_lock.hold(locked):
    holder = server.objects[lock_of(locked)][1].decode().partition('\n')[0]
    assert_refused(locked, f'{holder}: wait for that run')
    assert lock_of(locked) in server.objects
  assert lock_of(locked) not in server.objects


def test_a_killed_run_refuses_nobody_after_a_minute(server, locked, monkeypatch, capsys):
  monkeypatch.setattr(workdir_lock, '_UNTIL_KILLED', 0.3)
  put(server, locked, OTHER)
  with workdir_lock.hold(locked):
    assert server.objects[lock_of(locked)][1] != OTHER
  assert (
    'in use by process 7 on elsewhere, started at 2026-01-01, unless' in capsys.readouterr().out
  )


def test_a_lock_that_is_written_while_it_is_read_is_read_again(server, locked):
  put(server, locked, OTHER)
  downloads = itertools.count()

  def fault(request):
    if 'alt=media' in request and next(downloads) % 2 == 0:
      put(server, locked, OTHER)

  server.fault = fault
  assert_refused(locked, 'process 7 on elsewhere')
  assert next(downloads) == 4


def test_a_run_that_ends_meanwhile_refuses_nobody(server, locked):
  put(server, locked, OTHER)
  end = threading.Timer(0.3, server.objects.pop, [lock_of(locked)])
  end.start()
  with workdir_lock.hold(locked):
    assert lock_of(locked) in server.objects
  end.join()


def test_of_two_runs_that_start_together_one_is_refused(server, locked):
  def fault(request):
    if 'upload' in request and lock_of(locked) not in server.objects:
      put(server, locked, OTHER)

  server.fault = fault
  assert_refused(locked, 'process 7 on elsewhere')
  assert server.objects[lock_of(locked)][1] == OTHER


def test_a_run_ends_when_another_has_taken_its_lock_which_stays(server, locked, ended):
  with workdir_lock.hold(locked):
    put(server, locked, OTHER)
    wait_for(lambda: ended)
    time.sleep(0.3)  # It does not take the lock back.
  expected = 'stopped: process 7 on elsewhere, started at 2026-01-01 has taken over workdir'
  assert ended[0].startswith(expected)
  assert server.objects[lock_of(locked)][1] == OTHER


def test_a_lock_is_held_through_lost_answers_faults_and_deletion(server, locked, ended):
  with workdir_lock.hold(locked):
    own = server.objects[lock_of(locked)][1]
    put(server, locked, own)  # As a write whose answer was lost.
    written = server.objects[lock_of(locked)][0]
    wait_for(lambda: server.objects[lock_of(locked)][0] > written)
    server.fault = lambda request: HTTPStatus.FORBIDDEN
    time.sleep(0.5)
    server.fault = lambda request: None
    del server.objects[lock_of(locked)]
    wait_for(lambda: server.objects.get(lock_of(locked), (0, b''))[1] == own)
  assert not ended
  assert lock_of(locked) not in server.objects


@pytest.mark.parametrize('status', [HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND])
def test_a_lock_that_cannot_be_written_is_told_in_one_line(server, locked, status):
  server.fault = lambda request: None if 'token' in request else status
  with (
    pytest.raises(UsageError, match=f'^{locked}/.lock cannot be read or written .{status.value}'),
    workdir_lock.hold(locked),
  ):
    pytest.fail('the lock cannot be held')


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_with_two_hosts_and_can_be_used(server, tmp_path):
  random = np.random.default_rng(0)
  for split, count in (('train', 16), ('val', 8), ('test', 8)):
    for number in range(count):
      path = tmp_path / split / ('dark', 'bright')[number % 2] / f'{number}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
  workdir = epath.Path('gs://bucket/run')
  command = [
    *(sys.executable, '-m', 'imta_jax.main', f'--config=configs/image_folder.py:{tmp_path}'),
    *(f'--workdir={workdir}', *OVERRIDES),
  ]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true'}

  is_committing, is_killed = threading.Event(), threading.Event()

  def fault(request):
    if f'phase_1/4/{COMMIT}' in request and not is_killed.is_set():
      is_committing.set()
      is_killed.wait()
      return HTTPStatus.SERVICE_UNAVAILABLE

  server.fault = fault
  run = subprocess.Popen(command, cwd=ROOT, env=environment)
  assert is_committing.wait(timeout=300)
  run.kill()
  run.wait()
  is_killed.set()
  assert 'state/_METADATA' in names(server, workdir / 'checkpoints/phase_1/4')

  with socket.socket() as free:
    free.bind(('localhost', 0))
    command += [f'--coordinator_address=localhost:{free.getsockname()[1]}', '--num_processes=2']
  hosts = [
    subprocess.Popen(
      [*command, f'--process_id={number}'],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for number in range(2)
  ]
  try:
    outputs = [host.communicate(timeout=300)[0] for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  assert [host.returncode for host in hosts] == [0, 0], outputs
  assert 'phase_1 resumes from step 2.' in outputs[0]
  assert 'damaged' not in ''.join(outputs)
  records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  steps = [record['step'] for record in records if 'train/loss' in record]
  assert steps == [1, 2, 3, 4, 5, 6, 1, 2]
  images = np.zeros((3, 32, 32, 3), np.uint8)
  assert open_classifier(str(workdir)).predict(images).labels.shape == (3,)
