"""Several hosts and devices train as one does: processes over the loopback, in both phases."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from PIL import Image

from imta_jax.training import loop, workdir_lock
from imta_jax.training.workdir import load_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# 16 training images in batches of 8; 2 + 1 epochs.
OVERRIDES = (
  '--config.batch_size=8',
  '--config.evaluation_batch_size=16',
  '--config.log_every_steps=1',
  '--config.tensorboard=False',
  '--config.model.num_exits=2',
  '--config.model.channels=4',
  '--config.model.growth_rate=2',
  '--config.model.base=1',
  '--config.model.step=1',
  '--config.model.scale_factors=1,',
  '--config.model.bottleneck_factors=1,',
  '--config.phases[0].epochs=2',
  '--config.phases[1].epochs=1',
  '--config.phases[0].learning_rate=0.01',
  '--config.phases[1].learning_rate=0.01',
)
# Sums have another order on other devices; training amplifies the difference. The loss of a step
# agrees to this factor, and parameters to this part of the largest one in an array.
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 1e-3, 0.02
LAST_STEPS = {'phase_1': 4, 'phase_2': 2}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """A folder of images: brighter ones belong to the second class."""
  folder, random = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
  for split, count in (('train', 16), ('val', 10), ('test', 11)):
    for number in range(count):
      path = folder / split / ('dark', 'bright')[number % 2] / f'{number}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      pixels = random.integers(0, 128, (20, 20, 3)) + 127 * (number % 2)
      Image.fromarray(pixels.astype(np.uint8)).save(path)
  return folder


@pytest.fixture(scope='module')
def start(images):
  """A function that starts to train on (processes, devices per process), and returns the hosts."""

  def run(num_processes, num_devices, workdir, *flags, program=('-m', 'imta_jax.main')):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    cluster = (f'--coordinator_address=localhost:{port}', f'--num_processes={num_processes}')
    command = [
      *(sys.executable, *program, f'--config=configs/image_folder.py:{images}'),
      *(f'--workdir={workdir}', *OVERRIDES, *flags, *cluster),
    ]
    environment = {
      **os.environ,
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={num_devices}',
      'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
      'PYTHONUNBUFFERED': '1',
    }
    return [
      subprocess.Popen(
        [*command, f'--process_id={number}'],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for number in range(num_processes)
    ]

  return run


def outputs_of(hosts, status):
  """Waits for hosts that end with a status, and returns their outputs."""
  outputs = [host.communicate(timeout=400)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [status] * len(hosts), outputs
  return outputs


def read_until(host, line_start):
  """Reads the output of a host until a line begins so."""
  assert any(line.startswith(line_start) for line in host.stdout), f'no line {line_start!r}'


@pytest.mark.parametrize(
  ('shape', 'in_memory'),
  [
    ((2, 2), True),
    ((2, 2), False),
    ((4, 1), True),
    ((1, 8), True),
  ],
  ids=['2 hosts with 2 devices', 'streamed', '4 hosts', '8 devices'],
)
def test_hosts_and_devices_train_as_one_does(shape, in_memory, start, tmp_path):
  together, alone = (epath.Path(tmp_path / name) for name in ('together', 'alone'))
  outputs = outputs_of(start(*shape, together, f'--config.dataset.in_memory={in_memory}'), 0)
  assert f'{shape[0] * shape[1]} × cpu, {shape[0]} host(s)' in outputs[0]
  # The first host alone writes and prints.
  assert not any('phase_1' in output for output in outputs[1:])
  loop.train_and_evaluate(load_config(together), alone)
  assert_trained_alike(alone, together)


def test_a_signal_to_one_host_stops_all_at_one_step_and_other_hosts_go_on(start, tmp_path, capfd):
  workdir, alone = (epath.Path(tmp_path / name) for name in ('stopped', 'alone'))
  hosts = start(2, 2, workdir)
  read_until(hosts[0], 'phase_1: cross_entropy')
  hosts[1].send_signal(signal.SIGTERM)
  outputs = outputs_of(hosts, 128 + signal.SIGTERM)
  (saved,) = (int(path.name) for path in workdir.glob('checkpoints/*/*'))
  assert f'phase_1 was saved at step {saved};' in outputs[0]
  for folder in (workdir, alone):
    loop.train_and_evaluate(load_config(workdir), folder)
  assert f'phase_1 resumes from step {saved}.' in capfd.readouterr().out
  assert_trained_alike(alone, workdir)


def test_hosts_that_profile_and_take_several_steps_at_once_stop_at_one_step(start, tmp_path):
  flags = (
    'steps_per_dispatch=4',
    'profile_steps=3',
    'log_every_steps=100',
    'phases[0].epochs=5000',
  )
  hosts = start(2, 1, tmp_path, *(f'--config.{flag}' for flag in flags))
  read_until(hosts[0], 'phase_1 epoch 10/')  # The profile ends at step 13, in the seventh epoch.
  hosts[1].send_signal(signal.SIGTERM)
  outputs = outputs_of(hosts, 128 + signal.SIGTERM)
  saved = re.search(r'phase_1 was saved at step (\d+);', outputs[0])[1]
  assert (tmp_path / 'checkpoints/phase_1' / saved).exists()
  assert list(tmp_path.glob('tensorboard/phase_1/plugins/profile/*/*.xplane.pb'))


# The reader of one host hangs when it is opened, or before a batch.
HANGING = """
import sys
import time
from imta_jax import main, runtime
from imta_jax.data.folder_reader import FolderReader
victim, place = sys.argv.pop(1), sys.argv.pop(1)
runtime._SECONDS_TO_HANG = 60
open_reader, train_batches = FolderReader.__init__, FolderReader.train_batches
def hanging(this_place):
  if this_place == place and f'--process_id={victim}' in sys.argv:
    time.sleep(1000)
def open_or_hang(*arguments):
  hanging('opening')
  open_reader(*arguments)
def batches_or_hang(*arguments):
  for number, batch in enumerate(train_batches(*arguments)):
    hanging(f'batch {number}')
    yield batch
FolderReader.__init__, FolderReader.train_batches = open_or_hang, batches_or_hang
main.run()
"""


@pytest.mark.parametrize(
  ('victim', 'number'), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_a_host_that_dies_or_stops_ends_the_other_with_a_reason(victim, number, start, tmp_path):
  hosts = start(2, 1, tmp_path, '--config.phases[0].epochs=5000')
  read_until(hosts[0], 'phase_1: first step')
  hosts[victim].send_signal(number)
  try:
    output, _ = hosts[1 - victim].communicate(timeout=200)
  finally:
    hosts[victim].kill()
  assert hosts[1 - victim].returncode not in (0, None)
  assert 'another host has ended' in output or 'another task died' in output


@pytest.mark.parametrize(('victim', 'place'), [(0, 'opening'), (1, 'batch 0'), (1, 'batch 3')])
def test_a_host_that_hangs_ends_all_and_shows_where(victim, place, start, tmp_path):
  path = tmp_path / 'hanging.py'
  path.write_text(HANGING)
  program, flag = (path, str(victim), place), '--config.dataset.in_memory=False'
  hosts = start(2, 1, tmp_path / 'run', flag, program=program)
  outputs = [host.communicate(timeout=200)[0] for host in hosts]
  assert all(host.returncode not in (0, None) for host in hosts)
  assert 'Timeout (0:01:00)!' in ''.join(outputs) and 'in hanging' in outputs[victim]


# One of the hosts has lost an image.
DIFFERENT = """
import sys
from imta_jax import main
from imta_jax.data import image_folder
scan = image_folder.scan
def scan_less(root):
  folder = scan(root)
  if '--process_id=1' in sys.argv:
    folder.paths['train'].pop()
    folder.labels['train'] = folder.labels['train'][:-1]
  return folder
image_folder.scan = scan_less
main.run()
"""


def test_hosts_with_other_images_are_refused(start, tmp_path):
  path = tmp_path / 'different.py'
  path.write_text(DIFFERENT)
  refusal = 'error: image_folder is not the same on all hosts: process 1 has other'
  hosts = start(2, 1, tmp_path / 'run', program=(path,))
  assert all(refusal in output for output in outputs_of(hosts, 1))


def test_an_error_of_the_first_host_alone_ends_all(start, tmp_path):
  with workdir_lock.hold(epath.Path(tmp_path)):
    hosts = start(2, 1, tmp_path)
    first, second = [host.communicate(timeout=120)[0] for host in hosts]
  assert 'is in use by' in first and 'another task died' in second
  assert hosts[0].returncode == 1 and hosts[1].returncode not in (0, None)


def losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [record for record in map(json.loads, lines) if 'train/loss' in record]
  return {(record['phase'], record['step']): record['train/loss'] for record in records}


def assert_trained_alike(workdir, other):
  ours, theirs = losses(workdir), losses(other)
  steps = [(phase, step + 1) for phase, last in LAST_STEPS.items() for step in range(last)]
  assert list(ours) == list(theirs) == steps
  np.testing.assert_allclose(list(theirs.values()), list(ours.values()), rtol=LOSS_TOLERANCE)
  exits, exits_of_other = (
    json.loads((folder / 'evaluation/evaluation.json').read_text())['exits']
    for folder in (workdir, other)
  )
  for row, other_row in zip(exits, exits_of_other, strict=True):
    # All images were counted: 11 test images have accuracies in elevenths.
    assert abs(11 * other_row['test_top1'] - round(11 * other_row['test_top1'])) < 1e-4
    assert abs(row['test_top1'] - other_row['test_top1']) < 1.5 / 11

  def compare(array, array_of_other):
    scale = np.abs(array).max() + 1e-3
    np.testing.assert_allclose(array_of_other / scale, array / scale, atol=PARAMETER_TOLERANCE)

  for phase, step in LAST_STEPS.items():
    one, another = (
      ocp.StandardCheckpointer().restore(folder / 'checkpoints' / phase / str(step) / 'state')
      for folder in (workdir, other)
    )
    for part in ('trained', 'batch_stats'):
      jax.tree.map(compare, one[part], another[part])
