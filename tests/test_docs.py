"""The docs: links lead somewhere, public names are documented, and examples run."""

import doctest
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import nbclient
import nbformat
import pytest

import imta_jax

ROOT = Path(__file__).parents[1]
TOUR = ROOT / 'docs/tour.ipynb'
PAGES = [
  ROOT / 'README.md',
  ROOT / 'CONTRIBUTING.md',
  ROOT / 'CHANGELOG.md',
  TOUR,
  *sorted((ROOT / 'docs').glob('*.md')),
  *sorted((ROOT / 'experiments').rglob('*.md')),
]


class Page(HTMLParser):
  """The links and anchors of an HTML page."""

  def __init__(self, path):
    super().__init__()
    self.links, self.anchors = [], set()
    self.feed(path.read_text(encoding='utf-8'))

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    if tag == 'a' and 'href' in attributes:
      self.links.append(attributes['href'])
    self.anchors.add(attributes.get('id'))


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """The pages of the API reference, built in a process of its own, whose modules it changes."""
  folder = tmp_path_factory.mktemp('reference')
  errors = ('-W', 'error::UserWarning', '-W', 'error::RuntimeWarning')  # What pdoc warns with.
  subprocess.run([sys.executable, *errors, ROOT / 'docs/reference/build.py', folder], check=True)
  return {path: Page(path) for path in folder.rglob('*.html')}


@pytest.mark.slow
def test_no_link_of_the_reference_leads_nowhere(reference):
  num_local = 0
  for path, page in reference.items():
    for link in page.links:
      url = urlsplit(link)
      if not url.scheme:
        target = (path.parent / url.path).resolve() if url.path else path
        assert target in reference, f'{path}: {link}'
        assert not url.fragment or url.fragment in reference[target].anchors, f'{path}: {link}'
        num_local += 1
  assert num_local > 100


@pytest.mark.slow
def test_the_first_page_of_the_reference_shows_the_public_api(reference):
  (first,) = (page for path, page in reference.items() if path.name == 'imta_jax.html')
  assert set(imta_jax.__all__) <= first.anchors
  methods = {
    'AdaptiveClassifier.predict',
    'MultiExitNetwork.__call__',
    'MultiExitNetwork.num_exits',
  }
  assert methods <= first.anchors
  assert {'imta_jax/config.html', 'imta_jax/techniques.html'} <= set(first.links)
  assert 'MultiExitNetwork.parent' not in first.anchors  # Flax's own.


def anchors_of(markdown):
  """The anchors that GitHub gives to headings."""
  headings = re.findall(r'^#+ (.*)$', markdown, re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_of_a_page_leads_nowhere(path):
  text = path.read_text(encoding='utf-8')
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    url = urlsplit(link)
    if url.scheme:
      continue
    target = path.parent / url.path if url.path else path
    assert target.exists(), link
    assert not url.fragment or url.fragment in anchors_of(target.read_text()), link
  named = re.findall(r'\b(?:tests|experiments|imta_jax|docs)/[\w/]+\.py\b', text)
  for name in named if path.name != 'CHANGELOG.md' else ():  # Which names what has gone.
    assert (ROOT / name).exists() or (path.parent / name).exists(), name


def described(documented, section):
  """The names that a section of a docstring in Google's style describes."""
  text = inspect.getdoc(documented) or ''
  found = re.search(rf'^{section}:\n((?:  .*\n?|\n(?=  ))+)', text, re.MULTILINE)
  return re.findall(r'^  \*{0,2}(\w+): \S', found[1], re.MULTILINE) if found else []


def assert_documents_its_arguments(function):
  assert inspect.getdoc(function), function
  parameters = list(inspect.signature(function).parameters)
  if parameters[:1] in (['self'], ['cls']):
    del parameters[0]
  assert described(function, 'Args') == parameters, function


@pytest.mark.parametrize('name', imta_jax.__all__)
def test_every_public_name_documents_its_methods_and_arguments(name):
  public = inspect.unwrap(getattr(imta_jax, name))
  if not inspect.isclass(public):
    assert_documents_its_arguments(public)
    return
  assert inspect.getdoc(public)
  fields = getattr(public, '__dataclass_fields__', {}).keys() - {'parent', 'name'}  # Flax's own.
  assert fields <= set(described(public, 'Attributes'))
  if not fields:
    assert_documents_its_arguments(public.__init__)
  for method, member in vars(public).items():
    if method != '__call__' and (method.startswith('_') or method == 'setup'):  # Called by Flax.
      continue
    member = getattr(member, 'wrapped', getattr(member, '__func__', inspect.unwrap(member)))
    if inspect.isfunction(member):
      assert_documents_its_arguments(member)
    assert not isinstance(member, property) or member.__doc__, method


@pytest.mark.parametrize('name', imta_jax.__all__)
def test_every_public_name_has_an_example_that_runs(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  text = inspect.getdoc(inspect.unwrap(getattr(imta_jax, name)))
  assert '\nExample:\n' in text
  example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
  assert example.examples
  report = []
  assert not doctest.DocTestRunner().run(example, out=report.append).failed, ''.join(report)


def test_the_tour_is_committed_with_its_outputs():
  assert TOUR.stat().st_size < 400_000
  cells = [c for c in nbformat.read(TOUR, as_version=4).cells if c.cell_type == 'code']
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell.outputs]
  assert not any(output.output_type == 'error' for output in outputs)
  assert sum('image/png' in output.get('data', {}) for output in outputs) >= 2


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')  # Compiling takes longest.
  tour = nbformat.read(TOUR, as_version=4)
  nbclient.NotebookClient(
    tour, timeout=180, kernel_name='python3', resources={'metadata': {'path': tmp_path}}
  ).execute()
