"""The benchmarks for accelerators: what they run, what they skip, and the state to resume from."""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from imta_jax.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments/benchmarks'))
import agreement
import device

ROOT = Path(__file__).parents[2]


def measurement(code, least_seconds=0, output=None):
  return device.Measurement('test', (sys.executable, '-c', code), least_seconds, output)


def run(code, seconds=30.0, **fields):
  return device.run(measurement(code, **fields), time.monotonic() + seconds)


def test_a_result_has_what_the_measurement_printed_and_wrote(tmp_path):
  path = tmp_path / 'out.json'
  code = f'print("| a |"); open({str(path)!r}, "w").write("[1]")'
  result = run(code, output=path)
  assert (result['status'], result['text'], result['results']) == ('done', '| a |\n', [1])
  assert result['seconds'] > 0


def test_a_measurement_that_fails_is_reported():
  result = run('import sys; print("why"); sys.exit(3)')
  assert (result['status'], result['text']) == ('failed with status 3', 'why\n')


def test_a_measurement_without_enough_time_is_skipped():
  result = run('print(1)', seconds=10, least_seconds=60)
  assert result['status'].startswith('skipped: ') and '60 s needed' in result['status']
  assert result['text'] == ''


def test_a_measurement_is_stopped_when_time_is_up():
  start = time.monotonic()
  result = run('import time; print("begun", flush=True); time.sleep(60)', seconds=3)
  assert time.monotonic() - start < 30
  assert result['status'] == 'stopped before it finished: no time left'
  assert result['text'] == 'begun\n'


def test_compiling_first_runs_everything_at_the_same_time(tmp_path, capsys):
  # Each waits for the other, so that neither would end if they ran one after the other.
  code = """
import pathlib, sys, time
folder, mine, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]
(folder / mine).touch()
while not (folder / other).exists():
  time.sleep(0.01)
"""
  (tmp_path / 'result.json').write_text('[1]')
  command = (sys.executable, '-c', code, str(tmp_path))
  both = device.Measurement(
    'both', command, 0, tmp_path / 'result.json', compile_with=(('a', 'b'), ('b', 'a'))
  )
  never = device.Measurement('never', (*command, 'c', 'a'), 0, compile_with=())
  device.compile_all([both, never], time.monotonic() + 30)
  assert capsys.readouterr().out.count('both: done') == 2
  assert (tmp_path / 'a').exists() and not (tmp_path / 'c').exists()
  assert not (tmp_path / 'result.json').exists()


def options(**fields):
  defaults = {
    'config': 'configs/cifar100.py',
    'large_config': 'configs/imagenet.py',
    'batch_sizes': '64,512',
    'large_batch_size': '256',
    'dtype': 'bfloat16',
    'minutes': 9.0,
  }
  return argparse.Namespace(**{**defaults, **fields})


def test_measurements_are_ordered_by_importance(tmp_path):
  chosen = device.measurements(options(), tmp_path / 'kit', tmp_path, tmp_path / 'runs')
  assert [each.name for each in chosen] == [
    'agreement',
    'training step 64',
    'training step 512',
    'large training step',
    'memory',
    'evaluation',
    'short training for latency',
    'latency',
    'start-up',
  ]
  for each in chosen:
    assert Path(each.command[1]).exists() or each.command[1:3] == ('-m', 'imta_jax.main')
  small = device.measurements(options(large_config=''), tmp_path, tmp_path, tmp_path)
  assert 'large training step' not in [each.name for each in small]


def test_the_report_has_a_row_per_measurement_and_their_tables(tmp_path):
  results = [
    {'name': 'one', 'status': 'done', 'seconds': 2.4, 'text': 'note\n| a |\n| - |', 'results': [1]},
    {'name': 'two', 'status': 'skipped: no time', 'seconds': 0.0, 'text': '', 'results': None},
  ]
  device.write_page(results, options(), tmp_path)
  page = (tmp_path / 'device.md').read_text()
  assert '| one | done | 2 |' in page and '| two | skipped: no time | 0 |' in page
  assert '## One\n\n    note\n| a |\n| - |\n' in page
  assert '## Two' not in page
  assert json.loads((tmp_path / 'device.json').read_text())['results'] == results


@pytest.fixture
def workdir(tmp_path):
  workdir = tmp_path / 'run'
  for name, size in (
    ('config.json', 10),
    ('metrics.jsonl', 20),
    ('checkpoints/phase_1/3/state/a', 40_000),
    ('checkpoints/phase_1/6/state/a', 40_000),
    ('checkpoints/phase_2/2/state/a', 30_000),
    ('checkpoints/phase_2/4/state/a', 30_000),
    ('tensorboard/phase_1/events', 50_000),
  ):
    path = workdir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.random.default_rng(size).bytes(size))
  return workdir


def files(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_a_training_is_packed_in_parts(workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(device, '_PART_BYTES', 25_000)
  folder = tmp_path / 'out'
  folder.mkdir()
  (folder / 'run_99').write_bytes(b'of another stretch')
  parts = device.pack(workdir, folder)
  assert sorted(folder.iterdir()) == sorted(parts) and len(parts) > 3
  assert all(part.stat().st_size <= 25_000 for part in parts)

  device.unpack(folder, tmp_path / 'again')
  expected = files(workdir)
  del expected['tensorboard/phase_1/events']
  del expected[
    'checkpoints/phase_2/2/state/a'
  ]  # Not needed to resume, but phase II starts from phase I's best.
  assert files(tmp_path / 'again') == expected


def test_missing_parts_are_refused(workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(device, '_PART_BYTES', 25_000)
  *_, last = device.pack(workdir, tmp_path)
  last.unlink()
  with pytest.raises(UsageError, match='a part is missing'):
    device.unpack(tmp_path, tmp_path / 'again')
  with pytest.raises(UsageError, match='has no run_0'):
    device.unpack(tmp_path / 'nowhere', tmp_path / 'elsewhere')


def test_a_missing_kit_is_refused(tmp_path):
  with pytest.raises(UsageError, match=r'has no reference\.npz'):
    device.main([f'--kit={tmp_path}', f'--output={tmp_path}/out'])


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  path = tmp_path_factory.mktemp('reference') / 'reference.npz'
  agreement.main([f'--config={ROOT}/configs/mnist5k.py:exits=1', f'--write={path}'])
  return path


def test_a_device_agrees_with_itself(reference, capsys):
  agreement.main([f'--check={reference}'])
  table = capsys.readouterr().out
  assert table.count('yes') == 3 and 'NO' not in table
  highest, default, low = agreement.check(reference)
  assert highest['logits'] < 1e-6 and highest['gradient'] < 1e-6
  assert default['logits'] < 1e-6
  assert 1e-4 < low['logits'] < 0.1


def test_a_wrong_gradient_does_not_agree(reference, tmp_path):
  with np.load(reference) as file:
    content = dict(file)
  content['gradient'] = 1.01 * content['gradient']
  np.savez(tmp_path / 'other.npz', **content)
  highest, *_ = agreement.check(tmp_path / 'other.npz')
  assert highest['gradient'] == pytest.approx(0.01 / 1.01, rel=1e-3)
  assert not highest['agrees']


def test_a_reference_of_other_weights_is_refused(reference, tmp_path):
  with np.load(reference) as file:
    content = {**file, 'checksum': file['checksum'] + 1}
  np.savez(tmp_path / 'other.npz', **content)
  with pytest.raises(UsageError, match='for another config or seed'):
    agreement.check(tmp_path / 'other.npz')


def test_a_measurement_that_does_not_exist_cannot_be_skipped(tmp_path):
  (tmp_path / 'arrays').mkdir()
  for name in ('reference.npz', 'arrays/record.json'):
    (tmp_path / name).touch()
  with pytest.raises(UsageError, match='--skip=latencies is not a measurement: choose from agree'):
    device.main([f'--kit={tmp_path}', f'--output={tmp_path}/out', '--skip=latency,latencies'])
  assert not (tmp_path / 'out').exists()


def test_an_unreadable_reference_is_refused(tmp_path):
  (tmp_path / 'reference.npz').write_bytes(b'PK of nothing')
  with pytest.raises(UsageError, match='cannot be read .*: write it again'):
    agreement.check(tmp_path / 'reference.npz')
