"""How files depend on each other."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Users call these, and an export does without them.
EXCEPTIONS = {
  'imta_jax.adaptive.engine.classifier': {'from_workdir', 'from_model', 'onnx_models', 'save'}
}


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(path): path for path in (ROOT / 'imta_jax').rglob('*.py')}


def imported_modules(module):
  """Modules of the package that a module imports, wherever in it that stands."""
  tree = ast.parse(MODULES[module].read_text(encoding='utf-8'))
  package = module if MODULES[module].name == '__init__.py' else module.rpartition('.')[0]
  excepted = EXCEPTIONS.get(module, ())
  stack, imported = [tree], set()
  while stack:
    node = stack.pop()
    if isinstance(node, ast.FunctionDef) and node.name in excepted:
      continue
    if isinstance(node, ast.Import):
      imported |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      above = package.rsplit('.', node.level - 1)[0] if node.level else ''
      base = '.'.join(filter(None, (above, node.module)))
      for alias in node.names:
        inner = f'{base}.{alias.name}'
        imported.add(inner if inner in MODULES else base)
    stack.extend(ast.iter_child_nodes(node))
  return imported & MODULES.keys()


def test_imports_are_found():
  assert imported_modules('imta_jax.main') >= {'imta_jax.training.loop', 'imta_jax.config'}
  assert 'imta_jax.data.in_memory' in imported_modules('imta_jax.data.pipeline')  # In a function.
  assert 'imta_jax.adaptive.engine.plan' in imported_modules('imta_jax.adaptive.engine.runner')
  assert 'imta_jax.training.restore' not in imported_modules('imta_jax.adaptive.engine.classifier')


def test_no_import_circle():
  graph = {module: imported_modules(module) for module in MODULES}
  order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle.
  programs = ('main', 'serve', 'predict', 'prepare', 'export', 'sweep')
  assert order[-1] in ('imta_jax', *(f'imta_jax.{name}' for name in programs))


def test_techniques_import_nothing_else_of_the_package():
  for module in MODULES:
    if module.startswith('imta_jax.techniques.'):
      assert not imported_modules(module)


def test_modules_are_imported_without_the_packages_of_training_and_on_windows():
  # Need the extras `serve` and `cpu`; the builder of a TFDS data set.
  left_out = {'imta_jax.serve', 'imta_jax.interop.onnx_graph', 'imta_jax.data.mnist5k'}
  missing = ('tensorflow', 'tensorflow_datasets', 'clu', 'tensorboard', 'matplotlib', 'mlxtend')
  program = (
    f'import importlib, sys; sys.modules |= dict.fromkeys({(*missing, "fcntl", "resource")})\n'
    f'for module in {sorted(MODULES.keys() - left_out)}: importlib.import_module(module)'
  )
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)
