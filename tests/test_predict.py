"""The command line that classifies image files: answers, order, corrupt files, exit status."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imta_jax import command_line, predict
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.data.image_files import CROPS, read_image
from imta_jax.errors import UsageError

NAMES = 'abc'
SHAPE = (2, 2, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (11, *SHAPE), np.uint8)


@pytest.fixture(scope='module')
def classifier(tiny_export):
  classifier = AdaptiveClassifier.load(tiny_export)
  confidence = classifier.predict(IMAGES, (-np.inf, -np.inf)).confidences
  classifier.thresholds = np.array([np.median(confidence), -np.inf], np.float32)
  assert set(classifier.predict(IMAGES).exits) == {0, 1}
  return classifier


@pytest.fixture
def run(classifier, monkeypatch, capsys):
  """A function that runs the command line and gives status, output and error output."""
  monkeypatch.setattr(predict, 'set_up_compilation_cache', lambda: None)
  monkeypatch.setattr(predict, 'open_classifier', lambda *arguments, **choices: classifier)

  def call(*arguments):
    status = predict.main(['network', *map(str, arguments)])
    return status, *capsys.readouterr()

  return call


@pytest.fixture
def folder(tmp_path):
  for number, image in enumerate(IMAGES):
    Image.fromarray(image[..., 0]).save(tmp_path / f'{number:02}.png')
  return tmp_path


def parse(output):
  return [json.loads(line) for line in output.splitlines()]


@pytest.mark.parametrize('batch_size', [3, 256])
def test_answers_are_the_networks_in_the_files_order(batch_size, run, folder, classifier):
  status, output, _ = run(folder, '--format=jsonl', f'--batch_size={batch_size}')
  rows, answers = parse(output), classifier.predict(IMAGES)
  assert status == 0
  assert [row['file'] for row in rows] == [str(folder / f'{i:02}.png') for i in range(11)]
  assert [row['label'] for row in rows] == answers.labels.tolist()
  assert [row['exit'] for row in rows] == (answers.exits + 1).tolist()
  for row, probabilities in zip(rows, answers.probabilities, strict=True):
    assert row['class'] == NAMES[row['label']]
    shown = [candidate['probability'] for candidate in row['top']]
    assert row['confidence'] == shown[0] and shown == sorted(shown, reverse=True)
    assert {c['class']: c['probability'] for c in row['top']} == pytest.approx(
      dict(zip(NAMES, probabilities.tolist(), strict=True)), abs=1e-5
    )


@pytest.mark.parametrize('crop', CROPS)
def test_files_are_cropped_as_the_network_says(crop, run, folder, classifier, monkeypatch):
  monkeypatch.setitem(classifier.preprocessing, 'crop', crop)
  (row,) = parse(run(folder / '00.png', '--format=jsonl')[1])
  first, other = (
    classifier.predict(read_image(str(folder / '00.png'), SHAPE, c)[None]).confidences[0]
    for c in sorted(CROPS, key=lambda c: c != crop)
  )
  assert row['confidence'] == pytest.approx(float(first), abs=1e-5)
  assert abs(first - other) > 1e-3


def test_a_table_has_a_line_per_image(run, folder, classifier):
  status, output, errors = run(folder, '--top=2')
  header, *lines = output.splitlines()
  assert status == 0
  assert header.split() == ['exit', 'class', 'next', 'file']
  for number, (line, exit) in enumerate(zip(lines, classifier.predict(IMAGES).exits, strict=True)):
    words = line.split()
    assert words[0] == str(exit + 1)
    assert words[1] in NAMES and words[2].endswith('%') and words[3] in NAMES
    assert words[-1] == str(folder / f'{number:02}.png')
    assert line.index(words[-1]) == header.index('file')
  for text in ('11 images in ', 'images/s', '1: ', '2: '):
    assert text in errors


def test_line_breaks_in_names_are_escaped(run, folder, classifier, monkeypatch):
  (folder / '00.png').rename(folder / 'a\n\x1b[2Jb.png')
  (folder / 'c\n.png').touch()
  monkeypatch.setattr(classifier, 'class_names', [f'{name}\n' for name in NAMES])
  _, output, errors = run(folder)
  assert len(output.splitlines()) == 1 + len(IMAGES)
  assert '/a\\n\\x1b[2Jb.png\n' in output and 'b\\n ' in output
  assert f'error: {folder}/c\\n.png: ' in errors and '\x1b' not in output + errors


@pytest.mark.parametrize('batch_size', [2, 256])
def test_unreadable_files_are_named_and_the_others_answered(batch_size, run, folder):
  (folder / '03.png').write_bytes(b'no image')
  (folder / '04.png').write_bytes((folder / '05.png').read_bytes()[:45])
  arguments = (folder, folder / 'missing.png', '--format=jsonl', f'--batch_size={batch_size}')
  status, output, errors = run(*arguments)
  assert status == 1
  expected = [f'{i:02}' for i in range(11) if i not in (3, 4)]
  assert [row['file'][-6:-4] for row in parse(output)] == expected
  reports = [line for line in errors.splitlines() if line.startswith('error: ')]
  for name, report in zip(('03.png', '04.png', 'missing.png'), reports, strict=True):
    assert f'{folder / name}: ' in report
  assert '9 images' in errors
  assert '3 could not be read' in errors


def test_corrupt_files_alone_have_status_1_and_no_files_are_a_usage_error(run, tmp_path):
  (tmp_path / 'a.png').touch()
  status, output, errors = run(tmp_path, '--format=jsonl')
  assert (status, output) == (1, '')
  assert 'a.png' in errors
  (tmp_path / 'a.png').rename(tmp_path / 'notes.txt')
  with pytest.raises(UsageError, match=r'no image in .*\.png'):
    run(tmp_path)


def test_files_are_read_a_bounded_distance_ahead(classifier, monkeypatch):
  started = []

  def read(path, **options):
    del options
    started.append(path)
    return IMAGES[path % 11]

  monkeypatch.setattr(predict, 'read_image', read)
  for answered, (path, _) in enumerate(predict.classify_files(classifier, range(60), 4)):
    assert path == answered
    assert len(started) <= answered + 2 * 4
  assert answered == 59


def test_probabilities_that_are_no_numbers_are_null():
  answer = command_line.describe(np.full(5, np.nan, np.float32), 1, 'abcde', 2)
  assert answer['confidence'] is None
  assert answer['exit'] == 2
  json.dumps(answer, allow_nan=False)


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ([], 'network, images'),
    (['network', 'x', '--budget=many'], '--budget: invalid float'),
    (['network', 'x', '--budget=1', '--latency=1'], 'not allowed with'),
    (['network', 'x', '--top=0'], 'positive int'),
    (['network', 'x', '--rule=hope'], 'invalid choice'),
    (['network', 'x', '--phase=0'], 'positive int'),
  ],
)
def test_wrong_arguments_have_status_2(arguments, expected, capsys):
  with pytest.raises(SystemExit) as caught:
    predict.main(arguments)
  assert caught.value.code == 2
  assert expected in capsys.readouterr().err


def test_the_program_is_light_and_refuses_in_one_line(tmp_path):
  program = (
    'import sys; from imta_jax import predict; '
    "heavy = {'tensorflow', 'flax', 'orbax', 'matplotlib', 'optax'} & set(sys.modules); "
    'assert not heavy, heavy; predict.command_line.run(predict.main)'
  )
  command = [sys.executable, '-c', program, str(tmp_path), 'x.png']
  process = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert process.returncode == 2, process.stderr
  assert process.stderr.startswith('error: ')
  assert process.stderr.count('\n') == 1
