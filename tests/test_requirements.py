"""The versions of packages: the ranges of setup.py, and the two sets with which tests passed."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def requirements():
  """All that setup.py asks for, whatever the extra and the machine."""
  fields = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, 'setup', lambda **keywords: fields.update(keywords))
    runpy.run_path(str(ROOT / 'setup.py'))
  texts = fields['install_requires'] + sum(fields['extras_require'].values(), [])
  return [Requirement(text) for text in texts]


def read_pins(name):
  lines = (ROOT / name).read_text(encoding='utf-8').splitlines()
  pins = [Requirement(line) for line in lines if not line.startswith('#')]
  assert all(re.fullmatch(r'==[\w.]+', str(pin.specifier)) for pin in pins)
  versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
  assert len(versions) == len(pins)
  return versions


def test_the_last_set_lies_within_all_ranges(requirements):
  pins = read_pins('constraints.txt')
  names = {canonicalize_name(requirement.name) for requirement in requirements}
  assert names <= set(pins)
  for requirement in requirements:
    version = pins[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f'{requirement}: {version}'


def test_every_range_begins_with_the_oldest_set(requirements):
  pins = read_pins('constraints-oldest.txt')
  without_bound = set()
  for requirement in requirements:
    lowest = [bound.version for bound in requirement.specifier if bound.operator == '>=']
    if lowest:
      assert [pins[canonicalize_name(requirement.name)]] == lowest, str(requirement)
    else:
      without_bound.add(str(requirement))
  # The extras for accelerators follow jax.
  assert without_bound == {'jax[cuda13]', 'jax[tpu]'}


@pytest.mark.parametrize('path', ['README.md', 'docs/tpu-pods.md', 'docs/gpu-clusters.md'])
def test_every_command_installs_the_last_set(path):
  text = (ROOT / path).read_text(encoding='utf-8')
  commands = re.findall(r'pip install [^`\n]*-e [^`\n]*', text)
  assert commands
  for command in commands:
    assert '-c constraints.txt' in command, command
    (extras,) = re.findall(r'\.\[([\w,]+)\]', command)
    assert {'train', 'test'} & set(extras.split(',')), command  # The next commands train.
  assert not re.search(r"pip install (-q )?['\"]?\.", text)  # Of this folder, without -e.
