"""Builds the API reference from docstrings, with pdoc.

    python docs/reference/build.py site    # Then open site/index.html.

Shows the public API first, then the modules below that programs import.
"""

import argparse
import importlib
import inspect
from pathlib import Path

import flax.linen as nn
import jax
import pdoc

from imta_jax.techniques import gradient_equilibrium

# In reading order. A package that is not named here is shown with all its modules; commands and the
# training loop's modules are left out.
SHOWN = {
  'imta_jax': 'config models techniques adaptive data evaluate interop errors',
  'imta_jax.adaptive': 'engine policy rules guarantee search cost',
  'imta_jax.data': 'dataset pipeline image_folder image_files preprocess prepare',
  'imta_jax.models': 'create defaults multi_exit initial_values msdnet resnet densenet googlenet '
  'hydranet efficientnet_lite vit layers',
}
FIELDS_OF_FLAX = {'name', 'parent'}


def build(folder: Path) -> None:
  """Writes the pages of the reference to a folder."""
  # pdoc takes a function with its own gradient for a variable.
  gradient_equilibrium.scale_gradient = gradient_equilibrium.scale_gradient.__wrapped__
  jax.Array.__qualname__ = 'Array'  # It is 'jaxlib._jax.Array'.
  for name, names in SHOWN.items():
    package = importlib.import_module(name)
    public = getattr(package, '__all__', [])
    # pdoc does not see names that a package imports only when they are used.
    vars(package).update({each: getattr(package, each) for each in public})
    package.__all__ = [*public, *names.split()]
  pdoc.render.configure(
    docformat='google',
    include_undocumented=False,
    template_directory=Path(__file__).parent,
  )
  modules = pdoc.extract.walk_specs(['imta_jax'])
  for module in map(importlib.import_module, modules):
    for layer in vars(module).values():
      if inspect.isclass(layer) and issubclass(layer, nn.Module):
        _undo_flax(layer)
  pdoc.pdoc('imta_jax', output_directory=folder)


def _undo_flax(layer: type[nn.Module]) -> None:
  """Hides the fields that Flax adds to a module, and unwraps its properties."""
  constructor = inspect.unwrap(layer.__init__)
  signature = inspect.signature(constructor)
  own = [field for name, field in signature.parameters.items() if name not in FIELDS_OF_FLAX]
  constructor.__signature__ = signature.replace(parameters=own)
  for name, value in list(vars(layer).items()):
    if name not in FIELDS_OF_FLAX and hasattr(value, 'wrapped'):
      setattr(layer, name, value.wrapped)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('folder', type=Path, help='where to write the pages')
  build(parser.parse_args().folder)
