"""Runs in a bucket: killed and resumed, with a server that fails, and used afterwards."""

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

from imta_jax.command_line import open_classifier
from imta_jax.errors import UsageError
from imta_jax.runtime import import_tensorflow
from imta_jax.training import workdir_lock
from imta_jax.training.checkpoint import Checkpoints
from imta_jax.training.metrics import Metrics
from imta_jax.training.workdir import load_config

ROOT = Path(__file__).parents[2]
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


def test_a_corrupt_checkpoint_is_moved_aside(server, folder):
  save(folder, 1, 2)
  prefix = f'{folder}/2/state/'.removeprefix('gs://')
  paths = [path for path in server.objects if path.startswith(prefix)]
  largest = max(paths, key=lambda path: len(server.objects[path][1]))
  generation, content = server.objects[largest]
  server.objects[largest] = generation, bytes(len(content))
  assert restored(folder) == 1
  assert names(server, folder / '2') == []
  assert {COMMIT, 'state/_METADATA'} <= {*names(server, folder.parent / 'phase_1_corrupt' / '2_0')}


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


def test_a_second_run_is_refused_until_the_first_ends_or_its_lock_expires(folder, monkeypatch):
  workdir = folder.parent.parent
  monkeypatch.setattr(workdir_lock, '_SECONDS_BETWEEN_HEARTBEATS', 0.1)
  monkeypatch.setattr(workdir_lock, '_SECONDS_BETWEEN_LOOKS', 0.2)
  with workdir_lock.hold(workdir):
    first = (workdir / '.lock').read_text()
    time.sleep(1.1)
    assert (workdir / '.lock').read_text() > first
    refusal = f'^workdir {workdir} is in use by process {os.getpid()} on .*: wait'
    with pytest.raises(UsageError, match=refusal), workdir_lock.hold(workdir):
      pytest.fail('two runs hold the lock')
  assert not (workdir / '.lock').exists()
  # As a run leaves it that was killed a moment ago.
  (workdir / '.lock').write_text(f'{time.time():.0f} process 7 on elsewhere')
  monkeypatch.setattr(workdir_lock, '_SECONDS_TO_EXPIRE', 2)
  with workdir_lock.hold(workdir):
    assert (workdir / '.lock').read_text() > first


def test_a_lock_that_cannot_be_written_is_refused_in_one_line(server, folder):
  server.fault = lambda request: None if 'token' in request else HTTPStatus.FORBIDDEN
  workdir = folder.parent.parent
  with (
    pytest.raises(UsageError, match=f'^{workdir}/.lock cannot be read or written .*403'),
    workdir_lock.hold(workdir),
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
  assert 'corrupt' not in ''.join(outputs)
  records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  steps = [record['step'] for record in records if 'train/loss' in record]
  assert steps == [1, 2, 3, 4, 5, 6, 1, 2]
  images = np.zeros((3, 32, 32, 3), np.uint8)
  assert open_classifier(str(workdir)).predict(images).labels.shape == (3,)
