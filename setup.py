"""Packaging of jaxattn; `configs` and `experiments` run from a checkout."""

import pathlib

from setuptools import find_packages, setup

README = pathlib.Path(__file__).with_name('README.md')
REPORT = ['matplotlib>=3.8', 'rich>=13']

setup(
  name='jaxattn',
  version='0.1.0',
  description='The attention family in JAX and Flax, under one contract.',
  long_description=README.read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11,<3.14',
  packages=find_packages(include=['jaxattn*', 'pallas_kernels*']),
  install_requires=[
    'jax>=0.10.2,<0.13',
    'flax>=0.12.8,<0.13',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.20',
    'chex>=0.1.90',
    'ml-collections>=1.0',
    'absl-py>=2.1',
    'jaxtyping>=0.3',
  ],
  extras_require={
    'report': REPORT,
    'test': [
      'pytest>=8',
      'pytest-xdist>=3.6',
      'beartype>=0.20',
      'hypothesis>=6.100',
      'ruff>=0.12',
      *REPORT,
    ],
    # To compile for chips that are not there: libtpu and the plugin for CUDA as
    # each jax asks for them, and ptxas; none of the gigabytes that a GPU wants.
    'aot': [
      'jax[tpu,cuda13-local]>=0.10.2,<0.13',
      'nvidia-cuda-nvcc>=13,<14',
    ],
    'cuda': ['jax[cuda13]>=0.10.2,<0.13'],
    'tpu': ['jax[tpu]>=0.10.2,<0.13'],
  },
)
