"""Softmax attention on a TPU: kernels in which tiles overlap.

The mathematics is that of `xla`. What differs is how a tile is computed, for on
a TPU a tile's chain of products, exponentials and products again leaves the
matrix units idle while it waits for itself. So a step computes different stages
of different tiles, which do not depend on each other:

  forward    scores of tile n       | weights of tile n-1 | o += of tile n-2
  backward   weights of tile n, and their gradient | dq, dk, dv += of tile n-1

What a stage leaves for the next lies in a buffer of the size of a tile, and is
replaced in place, part by part, as the next tile's takes its room. The compiler
sees one straight line of independent work.

Tiles are keys by queries, `s t`: then the maximum and the sum over keys are
taken along sublanes, elementwise, and what a query knows of itself is one row.
Accordingly o is computed as `e t`, dq as `d t`, and v comes as `e s`. The scale
is multiplied into q beforehand; for bfloat16 log2(e) is too, as a TPU computes
powers of 2. Float32 would lose a digit by it.

The backward kernel keeps a block of keys and goes over the queries. dk and dv
stay in VMEM meanwhile; dq is read, added to and written back in float32, by
copies that have a whole step to complete. So nothing is larger than the inputs.

Which tiles are visited stands in a table (`runs`). The grid has the rows of
tiles; over those of a row a kernel loops by itself, see `tpu_feed`.

A modification of scores sees a tile with its last two axes exchanged: it has to
be elementwise in them.
"""

import functools

import jax

from pallas_kernels import elementwise
from pallas_kernels.blocks import chip
from pallas_kernels.flash import apart, tpu_backward, tpu_forward
from pallas_kernels.flash import tpu_layout as layout
from pallas_kernels.flash.partial import MONOID
from pallas_kernels.masks import Tokens
from pallas_kernels.problem import (
  Engine,
  Extras,
  Rule,
  alike,
  floats,
  once,
  reverse,
  unfit,
)

OLD = ('TPU v2', 'TPU v3')  # which cannot compile them
# fmt: off
LACKS = {  # what Mosaic has no rule for, of what is elementwise
  'accuracy', 'acos', 'acosh', 'asin', 'asinh', 'atan', 'atanh', 'cbrt', 'copy',
  'copy_p', 'cosh', 'digamma', 'erfc', 'expm1', 'lgamma',
  'optimization_barrier', 'polynomial', 'sinh',
}
# fmt: on


def refuses(
  rule: Rule, q, k, v, extras: Extras, query: Tokens, key: Tokens
) -> str | None:
  """Why this backend cannot serve a call, or None; arguments as of `attend`."""
  rule = rule.elementwise()
  d, e = q.shape[3], v.shape[3]
  if chip() in OLD:
    return f'it is for TPU v4 and later, not {chip()}'
  if why := unfit(q, k, v, ('bfloat16', 'float32')):
    return why
  if max(d, e) > 256:
    return f'heads are at most 256 wide, not {max(d, e)}'
  numbers = len(layout.kinds(floats(extras))['queries'])
  if numbers > layout.MORE:
    return f'queries have at most {layout.MORE} numbers, not {numbers}'
  for fn, own in zip(
    (*rule.scores, *rule.weights), (*extras.scores, *extras.weights)
  ):
    if why := elementwise.refuses(fn, own, query, key, LACKS):
      return why
  return elementwise.holds(rule.mask, query.side, key.side, LACKS)


def attend(rule, q, k, v, extras, query, key):
  """Finished o, m and l; arguments as in `problem`.

  Differentiate it in reverse mode.
  """
  inputs = alike((q, k, v, extras), (query, key))
  return _attend(rule.elementwise(), *inputs, query, key)


def _one_by_one(fn, rule, inputs):
  """fn(rule, *inputs); under vmap one after the other.

  For JAX cannot map over arrays that a kernel takes as a whole, such as those
  whose parts it copies itself.
  """
  run = jax.custom_batching.sequential_vmap(functools.partial(fn, rule))
  return run(*inputs)


@once('tpu', 'tpu')
def forward(rule, *inputs):
  """The finished o, m and l, of q, k, v, extras, query and key."""
  return _one_by_one(tpu_forward.forward, rule, inputs)


@once('tpu', 'tpu')
def backward(rule, *inputs):
  """Gradients of q, k, v and extras, see `tpu_backward`."""

  def run(rule, *inputs):
    return apart.gradients(
      functools.partial(tpu_backward.backward, rule), *inputs
    )

  return _one_by_one(run, rule, inputs)


# Looked up when called, as everything in a module is.
_attend = reverse(lambda *x: forward(*x), lambda *x: backward(*x))
ENGINE = Engine(attend, forward, backward, MONOID)
