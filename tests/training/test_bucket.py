"""Runs in a bucket: one at a time, killed and resumed, and used afterwards."""

import json
import os
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

ROOT = Path(__file__).parents[2]
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
  '--config.model.base=1',
  '--config.model.step=1',
  '--config.model.scale_factors=1,',
  '--config.model.bottleneck_factors=1,',
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


def test_a_second_run_is_refused_until_the_first_ends_or_its_lock_expires(server, monkeypatch):
  workdir = epath.Path('gs://lock/run')
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


@pytest.mark.slow
def test_a_run_killed_while_it_commits_resumes_and_can_be_used(server, tmp_path):
  random = np.random.default_rng(0)
  for split, count in (('train', 16), ('val', 8), ('test', 8)):
    for number in range(count):
      path = tmp_path / split / ('dark', 'bright')[number % 2] / f'{number}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
  workdir = epath.Path('gs://bucket/run')
  command = [
    *(sys.executable, '-m', 'imta_jax.main', f'--config=configs/image_folder.py:{tmp_path}'),
    *(f'--workdir={workdir}', *OVERRIDES),
  ]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true'}

  is_committing, is_killed = threading.Event(), threading.Event()

  def fault(request):
    if 'phase_1/4/commit_success.txt' in request and not is_killed.is_set():
      is_committing.set()
      is_killed.wait()
      return HTTPStatus.SERVICE_UNAVAILABLE

  server.fault = fault
  run = subprocess.Popen(command, cwd=ROOT, env=environment)
  assert is_committing.wait(timeout=300)
  run.kill()
  run.wait()
  is_killed.set()
  assert 'bucket/run/checkpoints/phase_1/4/state/_METADATA' in server.objects

  result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert 'corrupt' not in result.stdout + result.stderr
  assert 'phase_1 resumes from step 2.' in result.stdout
  records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  steps = [record['step'] for record in records if 'train/loss' in record]
  assert steps == [1, 2, 3, 4, 5, 6, 1, 2]
  images = np.zeros((3, 20, 20, 3), np.uint8)
  assert open_classifier(str(workdir)).predict(images).labels.shape == (3,)
