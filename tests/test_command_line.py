"""What command lines share: how they end when nothing can be written."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from imta_jax import command_line
def main():
  for _ in range(int(sys.argv[1])):
    print('answer')
command_line.run(main)
"""


@pytest.mark.parametrize('num_lines', [1, 10_000], ids=['at the end', 'in between'])
def test_output_to_a_full_disk_ends_with_one_line(num_lines):
  with open('/dev/full', 'w') as full:
    command = [sys.executable, '-c', PROGRAM, str(num_lines)]
    result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
  assert result.returncode == 2
  assert result.stderr == (
    'error: the output cannot be written (No space left on device): make room\n'
  )
