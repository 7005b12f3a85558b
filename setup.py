"""Installs imta_jax."""

from pathlib import Path

from setuptools import find_packages, setup

SERVE = ['prometheus-client', 'python-multipart', 'starlette', 'uvicorn']

setup(
  name='imta_jax',
  version='0.1.0',
  description='Training, evaluating and running adaptive (early-exit) networks in JAX',
  long_description=(Path(__file__).parent / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=find_packages(include=['imta_jax', 'imta_jax.*']),
  python_requires='>=3.11',
  install_requires=[
    'absl-py',
    'clu',
    'etils[epath]',
    'flax',
    'importlib_resources',  # tensorflow-datasets needs it and does not say so.
    'jax',
    'matplotlib',
    'ml-collections',
    'mlxtend',
    'numpy',
    'optax',
    'orbax-checkpoint',
    'pillow',
    'rich',
    'scipy',
    'tensorboard',  # clu needs it and does not say so.
    'tensorflow-cpu; platform_machine == "x86_64" and sys_platform != "darwin"',
    'tensorflow; platform_machine != "x86_64" or sys_platform == "darwin"',
    'tensorflow-datasets',
  ],
  extras_require={
    'serve': SERVE,
    'test': ['httpx', 'pytest', 'pytest-xdist', 'ruff', *SERVE],
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'onnx': ['jax2onnx', 'onnxruntime'],
    'torch': ['torch'],
  },
)
