"""Runs the README's commands word for word, as a newcomer would, and says how long each takes.

    git clone . /tmp/fresh && cd /tmp/fresh && python3 experiments/check_readme.py

Takes about ten minutes in a fresh clone. Needs nothing but Python: the README's first command makes
the environment. The sections that need other data or machines are left out.
"""

import pathlib
import re
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
SECTIONS = ('Try it', 'Two commands', 'Your own images', 'Run it for real')
# Left out: the tests, which take long, and packages and weeks that a newcomer does not have.
LEFT_OUT = ('pytest', 'export_onnx', 'latency.py', 'load_test.py')
SECONDS_TO_SERVE = 300


def main() -> int:
  """Runs the commands; returns 1 if one fails."""
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  failed = 0
  for command in commands(text):
    start = time.monotonic()
    print(f'$ {command}', flush=True)
    succeeded = serve(command) if 'imta_jax.serve' in command else run(command)
    print(
      f'  {"done" if succeeded else "FAILED"} after {time.monotonic() - start:.0f} s', flush=True
    )
    failed += not succeeded
  return int(failed > 0)


def commands(text: str) -> list[str]:
  """Returns the commands of a README's SECTIONS that are to be run, without comments."""
  found = []
  for section in re.split(r'^## ', text, flags=re.MULTILINE):
    if section.partition('\n')[0] in SECTIONS:
      lines = (line[4:] for line in section.splitlines() if line.startswith('    '))
      found += [line.partition('  #')[0].strip() for line in lines]
  return [line for line in found if not any(word in line for word in LEFT_OUT)]


def in_shell(command: str) -> list[str]:
  """Returns a call of the shell, in the README's environment once it exists."""
  activate = '. .venv/bin/activate; ' if (ROOT / '.venv/bin/activate').exists() else ''
  return ['bash', '-c', activate + command]


def run(command: str) -> bool:
  """Runs a command, and shows its last lines."""
  result = subprocess.run(
    in_shell(command), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  print('\n'.join(f'  {line}' for line in result.stdout.splitlines()[-3:]))
  return result.returncode == 0


def serve(command: str) -> bool:
  """Installs what the comment beside the command says, starts a server, and sends it an image."""
  if not run("pip install -q -c constraints.txt -e '.[serve]'"):
    return False
  port = re.search(r'--port=(\d+)', command)[1]
  image = next((ROOT / 'digits/7').glob('*.png')).read_bytes()
  process = subprocess.Popen(in_shell('exec ' + command), cwd=ROOT)
  try:
    deadline = time.monotonic() + SECONDS_TO_SERVE
    while process.poll() is None and time.monotonic() < deadline:
      try:
        request = urllib.request.Request(
          f'http://localhost:{port}/predict', image, {'Content-Type': 'image/png'}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
          print(f'  {answer.read().decode()[:120]}')
          return True
      except OSError:
        time.sleep(1)
    return False
  finally:
    process.terminate()
    process.wait()


if __name__ == '__main__':
  sys.exit(main())
