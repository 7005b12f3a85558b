"""Installs imta_jax."""

from pathlib import Path

from setuptools import find_packages, setup

SERVE = ['prometheus-client', 'python-multipart', 'starlette', 'uvicorn']

setup(
  name='imta_jax',
  version='0.1.0',
  description='Train, evaluate and run early-exit networks in JAX and Flax',
  long_description=(Path(__file__).parent / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=find_packages(include=['imta_jax', 'imta_jax.*']),
  python_requires='>=3.11',
  # Four ranges end where tests have passed: Python 3.11 with jax 0.10.2, 3.13 with jax 0.12.0.1.
  install_requires=[
    'absl-py',
    'clu',
    'etils[epath]',
    'flax>=0.12.8,<0.13',
    'importlib_resources',  # Needed by tensorflow-datasets, which does not declare it.
    'jax>=0.10.2,<0.13',
    'matplotlib',
    'ml-collections',
    'mlxtend',
    'numpy',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12.8,<0.13',
    'pillow',
    'rich',
    'scipy',
    'tensorboard',  # Needed by clu, which does not declare it.
    'tensorflow-cpu; platform_machine == "x86_64" and sys_platform != "darwin"',
    'tensorflow; platform_machine != "x86_64" or sys_platform == "darwin"',
    'tensorflow-datasets',
  ],
  extras_require={
    'serve': SERVE,
    'test': ['httpx', 'hypothesis', 'pytest', 'pytest-xdist', 'ruff', *SERVE],
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'onnx': ['jax2onnx', 'onnxruntime'],
    'torch': ['torch'],
  },
)
