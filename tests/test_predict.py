"""The command line that classifies image files: answers, order, corrupt files, exit status."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imta_jax import command_line, models, predict
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.data.image_files import CROPS, read_image
from imta_jax.errors import UsageError

NAMES = ('ant', 'bee', 'cat', 'dog', 'elephant')
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 1), np.uint8)


@pytest.fixture(scope='module')
def classifier(random_variables):
  model = models.create('resnet', depth=8, exits_after=(1,), num_classes=len(NAMES))
  classifier = AdaptiveClassifier.from_model(
    model,
    random_variables(model, (8, 8, 1)),
    (np.inf, -np.inf),
    (8, 8, 1),
    mean=(0.5,),
    std=(0.25,),
    class_names=NAMES,
    preprocessing={'crop': 'none'},
    batch_sizes=(1, 4),
  )
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


@pytest.mark.parametrize('batch_size', [1, 3, 256])
def test_answers_are_the_networks_in_the_files_order(batch_size, run, folder, classifier):
  status, output, _ = run(folder, '--format=jsonl', f'--batch_size={batch_size}', '--top=5')
  rows, answers = parse(output), classifier.predict(IMAGES)
  assert status == 0
  assert [row['file'] for row in rows] == [str(folder / f'{i:02}.png') for i in range(11)]
  assert [row['label'] for row in rows] == answers.labels.tolist()
  assert [row['exit'] for row in rows] == (answers.exits + 1).tolist()
  for row, probabilities in zip(rows, answers.probabilities, strict=True):
    assert row['class'] == NAMES[row['label']]
    assert row['confidence'] == row['top'][0]['probability']
    assert {c['class']: c['probability'] for c in row['top']} == pytest.approx(
      dict(zip(NAMES, probabilities.tolist(), strict=True)), abs=1e-5
    )
    assert sorted((c['probability'] for c in row['top']), reverse=True) == [
      c['probability'] for c in row['top']
    ]


@pytest.mark.parametrize('crop', CROPS)
def test_files_are_cropped_as_the_network_says(crop, run, folder, classifier, monkeypatch):
  monkeypatch.setitem(classifier.preprocessing, 'crop', crop)
  _, output, _ = run(folder / '00.png', '--format=jsonl')
  expected = {
    c: classifier.predict(read_image(str(folder / '00.png'), (8, 8, 1), c)[None]) for c in CROPS
  }
  (row,) = parse(output)
  assert row['confidence'] == pytest.approx(float(expected[crop].confidences[0]), abs=1e-5)
  first, other = (answers.confidences[0] for answers in expected.values())
  assert abs(first - other) > 1e-3


def test_top_is_at_most_all_classes(run, folder):
  for top, expected in ((1, 1), (3, 3), (9, 5)):
    (row,) = parse(run(folder / '00.png', '--format=jsonl', f'--top={top}')[1])
    assert len(row['top']) == expected


def test_a_table_has_a_line_an_image(run, folder, classifier):
  status, output, errors = run(folder, '--top=2')
  header, *lines = output.splitlines()
  assert status == 0
  assert header.split() == ['exit', 'class', 'next', 'file']
  for number, (line, exit) in enumerate(zip(lines, classifier.predict(IMAGES).exits, strict=True)):
    words = line.split()
    assert words[0] == str(exit + 1)
    assert words[1] in NAMES
    assert words[-1] == str(folder / f'{number:02}.png')
    assert line.index(words[-1]) == header.index('file')
  assert '11 images in ' in errors
  assert 'images/s' in errors
  assert '1: ' in errors
  assert '2: ' in errors


def test_a_line_break_in_a_name_breaks_no_line(run, folder, classifier, monkeypatch):
  (folder / '00.png').rename(folder / 'a\n\x1b[2Jb.png')
  (folder / 'c\n.png').touch()
  monkeypatch.setattr(classifier, 'class_names', [f'{name}\n' for name in NAMES])
  _, output, errors = run(folder)
  assert len(output.splitlines()) == 1 + len(IMAGES)
  assert '/a\\n\\x1b[2Jb.png\n' in output and 'ant\\n ' in output
  assert f'error: {folder}/c\\n.png: ' in errors and '\x1b' not in output + errors


@pytest.mark.parametrize('batch_size', [2, 256])
def test_unreadable_files_are_named_and_the_others_answered(batch_size, run, folder):
  (folder / '03.png').write_bytes(b'no image')
  (folder / '04.png').write_bytes((folder / '05.png').read_bytes()[:70])
  status, output, errors = run(
    folder, folder / 'missing.png', '--format=jsonl', f'--batch_size={batch_size}'
  )
  assert status == 1
  assert [row['file'][-6:-4] for row in parse(output)] == [
    f'{i:02}' for i in range(11) if i not in (3, 4)
  ]
  reports = [line for line in errors.splitlines() if line.startswith('error: ')]
  for name, report in zip(('03.png', '04.png', 'missing.png'), reports, strict=True):
    assert f'{folder / name}: ' in report
  assert '9 images' in errors
  assert '3 could not be read' in errors


def test_nothing_but_corrupt_files(run, tmp_path):
  (tmp_path / 'a.png').touch()
  status, output, errors = run(tmp_path, '--format=jsonl')
  assert (status, output) == (1, '')
  assert 'a.png' in errors


def test_folders_without_images_are_a_usage_error(run, tmp_path):
  (tmp_path / 'notes.txt').touch()
  with pytest.raises(UsageError, match=r'no image in .*\.png'):
    run(tmp_path)


def test_probabilities_that_are_no_numbers_are_null():
  answer = command_line.describe(np.full(5, np.nan, np.float32), 1, NAMES, 2)
  assert answer['confidence'] is None
  assert answer['exit'] == 2
  json.dumps(answer, allow_nan=False)


def test_reading_keeps_a_bounded_distance(classifier, monkeypatch):
  started = []

  def read(path, **options):
    del options
    started.append(path)
    return IMAGES[path % 11]

  monkeypatch.setattr(predict, 'read_image', read)
  answered = 0
  for path, _ in predict.classify_files(classifier, range(60), batch_size=4):
    assert path == answered
    answered += 1
    assert len(started) <= answered + 3 * 4 + 1
  assert answered == 60


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ([], 'network, images'),
    (['network'], 'images'),
    (['network', 'x', '--budget=-3'], '--budget'),
    (['network', 'x', '--budget=1', '--latency=1'], 'not allowed with'),
    (['network', 'x', '--top=0'], 'positive int'),
    (['network', 'x', '--budget=inf'], 'positive float'),
    (['network', 'x', '--rule=hope'], 'invalid choice'),
    (['network', 'x', '--phase=0'], 'positive int'),
    (['network', 'x', '--format=xml'], "'xml'"),
    (['network', 'x', '--max_loss=1'], "invalid fraction value: '1'"),
    (['network', 'x', '--confidence=95'], "invalid fraction value: '95'"),
  ],
)
def test_wrong_arguments_have_status_2(arguments, expected, capsys):
  with pytest.raises(SystemExit) as caught:
    predict.main(arguments)
  assert caught.value.code == 2
  assert expected in capsys.readouterr().err


def test_what_is_no_network_is_refused_in_a_line(tmp_path):
  with pytest.raises(UsageError, match=f'{tmp_path} is not a workdir'):
    command_line.open_classifier(str(tmp_path))
  (tmp_path / 'manifest.json').write_text('{}')
  with pytest.raises(UsageError, match='manifest.json is corrupt'):
    command_line.open_classifier(str(tmp_path))
  with pytest.raises(UsageError, match='leave out --phase'):
    command_line.open_classifier(str(tmp_path), phase=1)
  with pytest.raises(UsageError, match='has one phase, rule and sweep: leave out --rule, --sweep'):
    command_line.open_classifier(str(tmp_path), rule='margin', sweep='optimal')


def test_the_program_is_light_and_tells_by_its_status(tmp_path):
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


def test_a_broken_pipe_inside_a_library_does_not_end_the_program():
  """Event loops wake up through a socket, whose other end may be gone after an error."""
  program = """
import runpy, socket
from imta_jax import command_line, errors
def open_classifier(*arguments, **choices):
  end, other_end = socket.socketpair()
  other_end.close()
  try:
    end.send(b'x')
  except OSError:
    raise errors.UsageError('refused') from None
command_line.open_classifier = open_classifier
runpy.run_module('imta_jax.predict', run_name='__main__')
"""
  command = [sys.executable, '-c', program, 'network', 'x.png']
  result = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert (result.returncode, result.stderr) == (2, 'error: refused\n')
