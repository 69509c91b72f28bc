"""Attention to a cache that devices share: queries everywhere, keys in parts.

Shyam et al. 2024, "Tree Attention: Topology-aware Decoding for Long-Context
Attention on GPU clusters", https://arxiv.org/abs/2408.04093.

While a model decodes, its queries are few and its keys are many. So keys stay:
each device attends to those that it holds, by every query, and what it finds is
made one with what the others find, by a sum over all devices that goes by
whatever tree they are connected by. For softmax attention that is the largest
of m, and the sums of l and of o (`flash.partial.total`); another monoid has a
`total` of its own. What is sent does not depend on how many keys there are.

Slots of the cache are dealt to devices in turn, as striping deals tokens
(`stripe`): so all hold the same number of keys at any length, one key more or
less, and a token's key is written by one device. Order, segments and positions
of keys lie beside them, and masks and scores read no more than these.
"""

import dataclasses
from typing import Any

import numpy as np
from jax import lax

from pallas_kernels.problem import Engine, accumulator


@dataclasses.dataclass(frozen=True)
class Part:
  """One device's part of a memory that lies striped along a mesh axis.

  Attributes:
    memory: with the slots of this device alone, such as `state.FullKV`.
    axis: of the mesh.
  """

  memory: Any
  axis: str

  def read(self, keys, values, tokens):
    """What a chunk's queries may see here, and the memory after it.

    Each device is given the whole chunk, and writes what falls to it.
    """
    return self.memory.read(keys, values, tokens, lax.axis_index(self.axis))


def given_part(engine, at: int, axis: str):
  """`engine`, whose argument number `at` is now a device's part of a memory."""

  def run(*inputs):
    return engine(*inputs[:at], Part(inputs[at], axis), *inputs[at + 1 :])

  return run


def sent(devices: int, t: int, h: int, e: int, itemsize: int) -> int:
  """Bytes that each device sends for `t` queries of a row.

  Of m, l and o all but its own part, once for the sums to be made, and once for
  all to have them.
  """
  size = t * h * (2 + e) * max(itemsize, 4)
  return 2 * (devices - 1) * size // devices


def over(axis: str):
  """Spreads an engine over devices along `axis` that hold a part of the keys.

  Queries, and all that belongs to them, are the same on all of them; and so are
  the results. A bias has the columns of all keys.
  """

  def spread(engine: Engine):
    monoid = engine.monoid

    def attend(rule, q, k, v, extras, query, key):
      if extras.bias is not None:
        s = k.shape[1]
        start = lax.axis_index(axis) * s
        columns = lax.dynamic_slice_in_dim(extras.bias, start, s, 3)
        extras = extras._replace(bias=columns)
      wide = dataclasses.replace(rule, dtype=np.dtype(accumulator(q)))
      found = engine.attend(wide, q, k, v, extras, query, key)
      o, *rest = monoid.finish(monoid.total(monoid.open(*found), axis))
      return o.astype(rule.dtype), *rest

    return Engine(attend)

  return spread
