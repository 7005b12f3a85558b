"""The command line: errors for invalid input, and default workdirs."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
from absl.testing import flagsaver
from etils import epath

from imta_jax import config as config_lib
from imta_jax import main
from imta_jax.errors import UsageError
from imta_jax.training import loop
from imta_jax.training import workdir as layout

ROOT = Path(__file__).parents[1]
# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')
MNIST = f'--config={ROOT}/configs/mnist5k.py'


BAD_INPUT = [
  ([], ['--config is missing', '--config=mnist5k']),
  ([MNIST, 'extra'], ["'extra'", '--help']),
  (['--confg=x.py'], ["'confg'", 'config']),
  ([MNIST, '--config.batch_sise=3'], ['config.batch_sise', "'batch_size'"]),
  (['--config', MNIST[9:], '--config.batch_sise', '3'], ['config.batch_sise', "'batch_size'"]),
  ([MNIST, '--config.phases[0].epoch=3'], ['config.phases[0].epoch ', "'epochs'"]),
  ([MNIST, '--config.model.exits=3'], ['config.model.exits', "'num_exits'"]),
  ([MNIST, '--config.batch_size=many'], ['config.batch_size', 'many']),
  ([MNIST, '--config.batch_size='], ['config.batch_size']),
  ([MNIST, '--config.dataset=3'], ['config.dataset', '3']),
  ([MNIST, '--config.seed'], ['config.seed']),
  ([MNIST, '--config.batch_size=-8'], ['config.batch_size is -8']),
  ([MNIST, '--config.model.name=vgg'], ["'vgg'", 'msdnet', 'resnet']),
  ([MNIST, '--config.model.num_exits=0'], ['config.model', 'num_exits 0']),
  (['--config=nope.py'], ['nope.py', 'cifar10, cifar100, image_folder, imagenet, mnist5k']),
  ([f'--config={ROOT}/configs'], ['configs']),
  ([f'{MNIST}:exits=many'], ["'many'", 'int']),
  ([MNIST, '--num_processes=2'], ['--coordinator_address', '--process_id']),
  ([MNIST, '--process_id=0'], ['--num_processes']),
  ([MNIST, '--num_processes=two'], ['num_processes', 'two']),
]


@pytest.fixture
def call(monkeypatch, tmp_path):
  """A function that runs a command line in this process."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(main, 'set_up_compilation_cache', lambda: None)
  join = main.join_cluster

  def join_alone(*flags):
    if flags != (None, None, None):
      join(*flags)

  monkeypatch.setattr(main, 'join_cluster', join_alone)

  def run(*arguments):
    monkeypatch.setattr(sys, 'argv', ['imta_jax', *arguments])
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)  # The config file before.
    with flagsaver.flagsaver():
      main.main(main.parse_flags(sys.argv))

  return run


@pytest.fixture
def refusal(call):
  """A function that returns the error message for a command line."""

  def message_of(*arguments):
    with pytest.raises(UsageError) as caught:
      call(*arguments)
    message = str(caught.value)
    assert '\n' not in message
    assert 'Traceback' not in message
    return message

  return message_of


@pytest.fixture
def trained(call, monkeypatch):
  """A function that returns the config and the workdir that a command line would train."""
  calls = []
  monkeypatch.setattr(loop, 'train_and_evaluate', lambda *args, handle_signals: calls.append(args))

  def arguments_of(*arguments):
    call(*arguments)
    return calls.pop()

  return arguments_of


@pytest.mark.parametrize(
  ('arguments', 'words'), BAD_INPUT, ids=[' '.join(a).replace(f'{ROOT}/', '') for a, _ in BAD_INPUT]
)
def test_bad_input_is_refused_in_one_line(arguments, words, refusal):
  message = refusal(*arguments)
  for word in words:
    assert word in message


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    ('1 / 0', ['division by zero']),
    ('def get_config(argument=""):\n  raise KeyError("lost")', ['lost']),
    ('def get_config(argument="")\n  return 1', ['SyntaxError']),
    ('', ['get_config']),
    ('def get_config(argument=""):\n  return 3', ['config file']),
  ],
  ids=['raises', 'raises in get_config', 'syntax', 'empty', 'number'],
)
def test_a_config_file_that_gives_no_config_is_refused(content, words, refusal, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(content)
  message = refusal(f'--config={path}')
  for word in (*words, path.name):
    assert word in message


def test_a_file_that_is_no_config_is_refused(refusal, tmp_path):
  (tmp_path / 'mine.txt').write_text('batch_size: 3')
  assert 'mine.txt' in refusal(f'--config={tmp_path}/mine.txt')


def test_the_workdir_of_another_config_is_refused_and_stays(refusal, tmp_path):
  workdir = tmp_path / 'run'
  config = config_lib.default()
  config.phases[1].epochs = 1234.0
  layout.claim(config, epath.Path(workdir), ['a', 'b'])
  (workdir / 'checkpoints/phase_1/6').mkdir(parents=True)
  before = (workdir / 'config.json').read_bytes()
  message = refusal(MNIST, f'--workdir={workdir}')
  assert str(workdir) in message
  assert "config.dataset.name: 'cifar100' → 'mnist5k'" in message
  assert 'config.phases[1].epochs: 1234.0 → ' in message
  assert 'config.batch_size' not in message
  assert '--workdir' in message
  assert (workdir / 'config.json').read_bytes() == before
  names = {'.lock', 'checkpoints', 'classes.json', 'config.json', 'data.json', 'environment.jsonl'}
  assert {path.name for path in workdir.iterdir()} == names


def test_the_run_is_trained_as_the_command_line_says(trained, tmp_path):
  config, workdir = trained(
    f'{MNIST}:exits=3',
    '--config.batch_size=128',
    '--config.phases[1].epochs=77',
    '--config.dataset.mean=(0.5,)',
    f'--workdir={tmp_path}/here',
  )
  assert config.model.num_exits == 3
  assert config.batch_size == 128
  assert config.phases[0].epochs == trained(MNIST)[0].phases[0].epochs
  assert config.phases[1].epochs == 77
  assert tuple(config.dataset.mean) == (0.5,)
  assert workdir == f'{tmp_path}/here'


def test_exits_of_a_network_of_comparison_can_be_moved(trained):
  config, _ = trained(
    f'--config={ROOT}/configs/cifar100.py:network=resnet-20,exits=3',
    '--config.model.exits_after=(1, 2)',
  )
  assert config.model.exits_after == (1, 2)
  assert len(config.phases) == 2


def test_fields_may_stand_apart_from_their_values(trained):
  config, _ = trained('--config', MNIST[9:], '--config.batch_size', '128')
  assert config.batch_size == 128


def test_configs_are_found_by_name_in_any_folder(trained):
  config, workdir = trained('--config=cifar100:exits=5', '--config.batch_size=128')
  assert (config.dataset.name, config.model.num_exits, config.batch_size) == ('cifar100', 5, 128)
  assert workdir == 'runs/cifar100-exits=5-batch_size=128'


@pytest.mark.parametrize(
  ('arguments', 'workdir'),
  [
    (['--config=configs/mnist5k.py'], 'runs/mnist5k'),
    (['-config=configs/mnist5k.py'], 'runs/mnist5k'),
    (['--config', 'configs/mnist5k.py', '--config.seed', '1'], 'runs/mnist5k-seed=1'),
    (['--config=configs/cifar100.py:exits=5'], 'runs/cifar100-exits=5'),
    (['--config=cifar100:exits=5'], 'runs/cifar100-exits=5'),
    (['--config=/else/where/mine.py'], 'runs/mine'),
    (
      ['--config=configs/cifar100.py:exits=5', '--config.batch_size=128', '--config.seed=1'],
      'runs/cifar100-exits=5-batch_size=128-seed=1',
    ),
    (
      ['--config.seed=1', '--config=configs/cifar100.py', '--num_processes=1'],
      'runs/cifar100-seed=1',
    ),
  ],
)
def test_the_default_workdir_names_config_and_overrides(arguments, workdir):
  assert main.default_workdir(arguments) == workdir


def test_default_workdirs_are_folders_right_below_runs_and_differ():
  lines = [
    [],
    ['--config.seed=1'],
    ['--config.seed=11'],
    ['--config.phases[0].epochs=1'],
    ['--config.phases[1].epochs=1'],
    ['--config.phases[0].steps=1'],
    ['--config.dataset.data_dir=/data/../x y'],
  ]
  workdirs = [main.default_workdir(['--config=configs/mnist5k.py', *line]) for line in lines]
  assert len(set(workdirs)) == len(lines)
  for workdir in workdirs:
    assert workdir.startswith('runs/mnist5k') and workdir.count('/') == 1
    assert not set(' []\'"$*?;&|<>') & set(workdir)


def test_long_default_workdirs_are_cut_and_differ():
  line = [f'--config.phases[{n}].weight_decay=0.000{n}' for n in range(9)]
  lines = [line, [*line[:-1], line[-1] + '1'], line[:-1], ['--config.name=' + '𝟏' * 99]]
  workdirs = [main.default_workdir(['--config=configs/mnist5k.py', *line]) for line in lines]
  assert len(set(workdirs)) == len(lines)
  assert all(len(os.fsencode(workdir)) < 250 for workdir in workdirs)
  assert workdirs[0].startswith('runs/mnist5k-phases_0_.weight_decay=0.0000-phases_1_')
  assert main.default_workdir(['--config=configs/mnist5k.py', *line]) == workdirs[0]


def test_one_process_runs_alone_whatever_the_environment_announces(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **options: calls.append(args))
  main.join_cluster(None, 1, None)
  assert not calls


def test_who_waits_for_other_processes_says_so_and_gives_up(monkeypatch, capsys):
  ended = threading.Event()
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **options: ended.wait(20))
  monkeypatch.setattr(main, '_QUIET_SECONDS', 0.01)
  monkeypatch.setattr(main, '_JOIN_SECONDS', 0.01)
  monkeypatch.setattr(os, '_exit', lambda status: ended.set())
  monkeypatch.setenv('SLURM_NTASKS', '4')
  main.join_cluster(None, None, None)
  hint = 'start all processes of this run (SLURM_NTASKS=4), or run alone with --num_processes=1'
  assert capsys.readouterr().err.splitlines() == [
    f'waiting for other processes: {hint}',
    f'error: other processes did not join within 0.01 seconds: {hint}',
  ]


def in_a_process(*arguments):
  command = [sys.executable, '-m', 'imta_jax.main', *arguments]
  return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_program_ends_with_one_line_and_a_status(tmp_path):
  result = in_a_process(MNIST, '--config.batch_sise=3', f'--workdir={tmp_path}/run')
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and 'config.batch_sise' in line
  assert not (tmp_path / 'run').exists()


def test_help_is_no_failure():
  result = in_a_process('--help')
  assert result.returncode == 0 and '--workdir' in result.stdout
