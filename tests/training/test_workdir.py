"""The files of a workdir, and names of phases in figures."""

import json
import os

import jax
import pytest
from etils import epath

from imta_jax import config as config_lib
from imta_jax import files
from imta_jax.errors import UsageError
from imta_jax.training import workdir


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


def test_workdirs_are_absolute_as_checkpoints_need_them(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert os.fspath(workdir.open_workdir('runs/mnist5k')) == f'{tmp_path}/runs/mnist5k'


def test_a_run_records_each_environment_once(tmp_path, monkeypatch):
  folder = epath.Path(tmp_path)
  assert workdir.load_environments(folder) == []
  for count in (8, 8, 4, 8):
    monkeypatch.setattr(jax, 'device_count', lambda count=count: count)
    workdir.record_environment(folder)
  first, second = workdir.load_environments(folder)
  assert first == {**second, 'devices': '8 × cpu'} and second['devices'] == '4 × cpu'
  assert first['jax'] == jax.__version__


NAMES, DATA = ['a', 'b'], {'num_images': {'train': 8, 'test': 2}, 'fingerprint': 1}


def saved(folder):
  (folder / 'checkpoints/phase_1/6').mkdir(parents=True)
  return folder


def test_a_workdir_without_checkpoints_may_be_reused(tmp_path):
  folder, config, other = epath.Path(tmp_path), config_lib.default(), config_lib.default()
  other.seed = 1
  workdir.claim(config, folder, NAMES, **DATA)
  workdir.claim(other, folder, ['c', 'd'], **DATA)
  assert workdir.load_config(folder).seed == 1 and workdir.load_class_names(folder) == ['c', 'd']


def test_a_workdir_with_checkpoints_belongs_to_its_config(tmp_path):
  folder, config, other = epath.Path(tmp_path), config_lib.default(), config_lib.default()
  other.seed = 1
  workdir.claim(config, folder, NAMES, **DATA)
  workdir.claim(config, saved(folder), NAMES, **DATA)
  with pytest.raises(UsageError, match='belongs to another config or other data .config.seed'):
    workdir.claim(other, folder, NAMES, **DATA)


@pytest.mark.parametrize(
  ('names', 'changes', 'difference'),
  [
    (['a', 'wolf'], {}, r"classes\[1\]: 'b' → 'wolf'"),
    (['a', 'b', 'c'], {}, r"classes: \['a', 'b'\] → \['a', 'b', 'c'\]"),
    (NAMES, {'num_images': {'train': 9, 'test': 2}}, r'data.num_images.train: 8 → 9'),
    (NAMES, {'fingerprint': 2}, r'data.fingerprint: 1 → 2'),
  ],
)
def test_a_workdir_with_checkpoints_belongs_to_its_data(names, changes, difference, tmp_path):
  folder = epath.Path(tmp_path)
  workdir.claim(config_lib.default(), folder, NAMES, **DATA)
  with pytest.raises(UsageError, match=rf'or other data \({difference}\): choose'):
    workdir.claim(config_lib.default(), saved(folder), names, **DATA | changes)
  assert workdir.load_class_names(folder) == NAMES


def test_a_workdir_of_an_earlier_version_records_its_data_when_it_goes_on(tmp_path):
  folder = epath.Path(tmp_path)
  workdir.claim(config_lib.default(), folder, NAMES, **DATA)
  (saved(folder) / 'data.json').unlink()
  workdir.claim(config_lib.default(), folder, NAMES, **DATA | {'fingerprint': 2})
  with pytest.raises(UsageError, match='data.fingerprint: 2 → 1'):
    workdir.claim(config_lib.default(), folder, NAMES, **DATA)


def test_what_changes_no_result_may_change(tmp_path):
  folder, config = epath.Path(tmp_path), config_lib.default()
  workdir.claim(config, folder, NAMES, **DATA)
  config.checkpoint_every_minutes = 10.0
  config.cuda_graphs = 'whole'
  config.profile_steps = 20
  config.tensorboard = False
  config.dataset.data_dir, config.dataset.arrays_dir = '/elsewhere', '/elsewhere/arrays'
  workdir.claim(config, saved(folder), NAMES, **DATA)
  # Evaluation finds the data where it lies now.
  assert workdir.load_config(folder).dataset.data_dir == '/elsewhere'


def test_checkpoints_without_their_config_are_not_adopted(tmp_path):
  folder = saved(epath.Path(tmp_path))
  workdir.claim(config_lib.default(), folder, NAMES)  # Another run's phase I, to go on from.
  (folder / 'config.json').unlink()
  workdir.metrics_path(folder).write_text('{}\n')
  with pytest.raises(UsageError, match='has been trained in, but has no config.json'):
    workdir.claim(config_lib.default(), folder, NAMES)


DEFAULT = json.dumps(config_lib.to_dict(config_lib.default()))


@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    ('{"seed": ', 'JSONDecodeError'),
    ('[]', ''),
    ('{"phases": 3, "dataset": {}}', ''),
    ('[' * 100_000, 'RecursionError'),
    (DEFAULT.replace('"seed": 0', '"seed": "x"'), "config.seed is 'x'"),
  ],
)
def test_a_corrupt_config_is_named(content, reason, tmp_path):
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(UsageError, match=rf'config.json is corrupt \({reason}.*: restore it'):
    workdir.load_config(epath.Path(tmp_path))


@pytest.mark.parametrize('content', ['', '[1, 2]', '"ab"'])
def test_corrupt_class_names_are_named(content, tmp_path):
  (tmp_path / 'classes.json').write_text(content)
  with pytest.raises(UsageError, match='classes.json is corrupt.*run the training command again'):
    workdir.load_class_names(epath.Path(tmp_path))


def test_a_full_disk_is_told_in_one_line_and_leaves_what_was_there(tmp_path):
  path = epath.Path(tmp_path / 'table.csv')
  path.write_text('before')
  (tmp_path / 'table.csv.part').symlink_to('/dev/full')
  with pytest.raises(UsageError, match=r'table.csv cannot be .* \(No space left on device\)'):
    files.write_whole(path, b'after')
  assert path.read_text() == 'before'
