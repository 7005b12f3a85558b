"""Trains every phase of a config, then evaluates the networks.

    python -m imta_jax.main --config=configs/mnist5k.py
    imta-train --config=cifar100:exits=5 --config.batch_size=128

Run the same command again to resume; a finished run is only re-evaluated.
"""

import collections
import hashlib
import logging as std_logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from imta_jax import command_line
from imta_jax import config as config_lib
from imta_jax.errors import UsageError
from imta_jax.runtime import set_up_compilation_cache
from imta_jax.training import loop


class _ConfigParser(flags.ArgumentParser):
  """Parses names of configs that come with imta_jax, and what a parser of files takes."""

  def __init__(self, file_parser: flags.ArgumentParser):
    self._file_parser = file_parser

  def parse(self, argument: str) -> ConfigDict:
    return self._file_parser.parse(config_lib.find(argument))


_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  "Config by name, as 'cifar100', or its file; optionally with arguments after a colon.",
  lock_config=True,
)
flags.FLAGS['config'].parser = _ConfigParser(flags.FLAGS['config'].parser)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, local or gs://. Default: runs/<name of the config>.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address',
  None,
  'host:port of the first host. Only needed if the environment does not announce a cluster.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of hosts; 1 runs alone, whatever the environment announces.'
)
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Index of this host, counted from 0.')

# Seconds after which a process reports that it waits for others, and after which it exits; and for
# which it waits for them after an error.
_QUIET_SECONDS, _JOIN_SECONDS, _LEAVE_SECONDS = 5, 300, 10
# The exit status after an error that a user can fix.
_USAGE_STATUS = 1


def main(argv: Sequence[str]) -> None:
  """Runs the command line."""
  if len(argv) > 1:
    raise UsageError(f'{argv[1]!r} is not a flag: see --help')
  if _CONFIG.value is None:
    raise UsageError('--config is missing: name a config, as in --config=mnist5k')
  set_up_compilation_cache()
  join_cluster(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  workdir = _WORKDIR.value or default_workdir(sys.argv[1:])
  loop.train_and_evaluate(_CONFIG.value, workdir, handle_signals=True)


def join_cluster(
  coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Connects the hosts of a run, which are given by flags or announced by the environment.

  Cloud TPU, SLURM and Open MPI announce their hosts; elsewhere, several hosts need all three flags.
  `num_processes` 1 runs alone, whatever the environment announces.

  Raises:
    UsageError: If only some of the flags are given.
  """
  if num_processes == 1:
    return
  given = [coordinator_address, num_processes, process_id]
  if any(value is not None for value in given) and None in given:
    raise UsageError(
      'set all three of --coordinator_address, --num_processes and --process_id, or none'
    )
  joined = threading.Event()
  threading.Thread(target=_watch_join, args=(joined,), daemon=True).start()
  try:
    jax.distributed.initialize(
      coordinator_address, num_processes, process_id, initialization_timeout=2 * _JOIN_SECONDS
    )
  except ValueError as error:
    if 'coordinator_address' in str(error):
      return  # No cluster was found: this is the only host.
    raise
  finally:
    joined.set()
  # On CPU devices, several hosts deadlock if many steps are in flight.
  jax.config.update('jax_cpu_enable_async_dispatch', False)


def _watch_join(joined: threading.Event) -> None:
  """Reports that a process waits for others, and ends it with one line where JAX would abort."""
  if joined.wait(_QUIET_SECONDS):
    return
  variables = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'JAX_COORDINATOR_ADDRESS')
  found = [f'{name}={os.environ[name]}' for name in variables if name in os.environ]
  cluster = ', '.join(found) or 'as set by the flags or the cluster'
  hint = f'start all processes of this run ({cluster}), or run alone with --num_processes=1'
  print(f'waiting for other processes: {hint}', file=sys.stderr, flush=True)
  if not joined.wait(_JOIN_SECONDS):
    late = f'error: other processes did not join within {_JOIN_SECONDS} seconds: {hint}'
    print(late, file=sys.stderr, flush=True)
    os._exit(1)


def default_workdir(arguments: Sequence[str]) -> str:
  """Returns a folder in runs/ named after the config file, its argument and its overrides.

  A name that is too long ends in a hash of its whole.

  Args:
    arguments: The command-line arguments.
  """
  parts: list[str] = []
  for name, value in flag_values(arguments):
    if name == 'config':
      path, _, config_argument = value.rstrip('/').partition(':')
      parts.insert(0, epath.Path(path).stem + (f'-{config_argument}' if config_argument else ''))
    elif name.startswith('config.'):
      parts.append(f'{name.removeprefix("config.")}={value}')
  overrides = '-'.join(parts)
  name = re.sub(r'[^\w.,=-]+', '_', overrides)
  if len(os.fsencode(name)) > 200:  # File systems allow 255 bytes, a character takes up to 4.
    name = f'{name[:50]}-{hashlib.sha256(os.fsencode(overrides)).hexdigest()[:12]}'
  return f'runs/{name}'


def flag_values(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Yields (name, value) for each flag, written as --name=value or --name value."""
  tokens = collections.deque(arguments)
  while tokens:
    name, equals, value = tokens.popleft().partition('=')
    if not equals and tokens and not tokens[0].startswith('-'):
      value = tokens.popleft()
    if name.startswith('-'):
      yield name.lstrip('-'), value


def parse_flags(argv: Sequence[str]) -> Sequence[str]:
  """Parses the command line; the error for an unknown config field suggests existing ones.

  Raises:
    UsageError: If the config file cannot be loaded, or a flag, a field or a value is wrong.
  """
  if {'-h', '-help', '--help'} & set(argv[1:]):  # absl would show nothing for imta-train.
    print(__doc__, flags.FLAGS.module_help(flags.FLAGS.find_module_defining_flag('config')))
    raise SystemExit(0)
  try:
    remaining = flags.FLAGS(argv)
    if flags.FLAGS['config'].present and not isinstance(_CONFIG.value, ConfigDict):
      raise ValueError('not a config file: its get_config must return a ConfigDict')
    return remaining
  except SystemExit:  # After --helpfull, for which absl has status 1.
    raise SystemExit(0) from None
  except flags.Error as error:
    # An error in a config file is the last line of a formatted traceback.
    lines = str(error).strip().splitlines()
    reason = lines[-1].removeprefix(f'{UsageError.__module__}.UsageError: ')
    raise UsageError(reason if len(lines) < 3 else f'{lines[0].rstrip(":")}: {reason}') from error
  except Exception as error:
    # ml_collections names the unknown field, but not those that exist.
    values = dict(flag_values(argv[1:]))
    config = _load_config_alone(values.get('config', ''))
    for name in values:
      if name.startswith('config.'):
        config_lib.check_path(config, name.removeprefix('config.'))
    raise UsageError(f'--config={values.get("config")}: {_first_line(error)}') from error


def _load_config_alone(path: str) -> ConfigDict:
  """Loads a config file without the overrides of the command line."""
  arguments, sys.argv = sys.argv, sys.argv[:1]  # ml_collections reads overrides from it.
  try:
    flags.FLAGS([sys.argv[0], f'--config={path}'])
    if isinstance(_CONFIG.value, ConfigDict):
      return _CONFIG.value
  except Exception as error:
    raise UsageError(f'--config={path}: {_first_line(error)}') from error
  finally:
    sys.argv = arguments
  raise UsageError(f'--config={path} {config_lib.expected()}')


def _first_line(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.strip().splitlines()[0]


def run() -> None:
  """Runs the program; invalid input exits with a one-line message and status 1."""
  logging.set_verbosity(logging.WARNING)
  # Logs the outcome of operations that Orbax abandons after an error.
  std_logging.getLogger('asyncio').setLevel(std_logging.CRITICAL)
  try:
    command_line.run(partial(app.run, main, flags_parser=parse_flags), usage_status=_USAGE_STATUS)
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    print(
      f'error: a step failed ({_first_line(error)}), probably because another host has ended: look '
      'at its output, then run the same command on all hosts again',
      file=sys.stderr,
      flush=True,
    )
    os._exit(_USAGE_STATUS)  # An orderly shutdown of the cluster would wait for the other host.
  except SystemExit as end:
    if end.code == _USAGE_STATUS and jax.distributed.is_initialized():
      _leave_cluster()
    raise


def _leave_cluster():
  """Ends this process soon: hosts without the error go on, and a shutdown would wait for them."""
  shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  shutdown.start()
  shutdown.join(_LEAVE_SECONDS)
  sys.stdout.flush()
  os._exit(_USAGE_STATUS)


if __name__ == '__main__':
  run()
