"""Softmax attention, the engine: `pallas_kernels.flash` under its name here.

A partial result is (m, l, o); `merge` folds two over disjoint keys into one, so
blocks, devices and caches may be read in any order.
"""

from pallas_kernels.flash import (
  BACKENDS,
  Dropout,
  Partial,
  attention,
  finish,
  merge,
)

IMPLEMENTATIONS = tuple(BACKENDS)

__all__ = [
  'IMPLEMENTATIONS',
  'Dropout',
  'Partial',
  'attention',
  'finish',
  'merge',
]
