"""Attention that reaches no further than a neighbour's tokens: a halo of keys.

Where a query sees at most w - 1 tokens before it (or after), a device needs of
the one before it only the last w - 1 keys, and sends no more than that, however
long the sequence is. Tokens have to stand in their order over the devices.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.parallel import between
from pallas_kernels.masks import Tokens
from pallas_kernels.problem import Engine, Extras, Operands, one_segment


def over(axis: str, before: int, after: int):
  """Spreads an engine over devices along `axis`.

  Args:
    axis: of the mesh.
    before, after: how many keys of either neighbour a query may see; at most
      as many as it has.
  """

  def spread(engine: Engine):
    def bring(q, k, v, extras, query, key):
      wide = lambda x: extend(x, axis, before, after)
      there = wide(jnp.ones_like(k[:, :, :1, 0], bool))

      def number(x):
        # Beyond the ends what occurs here: a score may divide by it.
        return jnp.where(there, wide(x), x[:, :1])

      own = lambda x: Operands(x.heads, x.queries, tuple(map(number, x.keys)))
      extras = Extras(
        tuple(map(own, extras.scores)),
        tuple(map(own, extras.weights)),
        _columns(extras.bias, k.shape[1], axis, before, after),
      )
      # Beyond the ends come zeros, which are padding: segment 0.
      query, key = one_segment(query), one_segment(key)
      key = Tokens(*jax.tree.map(wide, tuple(key)))
      return q, wide(k), wide(v), extras, query, key

    return between.engine(engine, bring)

  return spread


def extend(x, axis: str, before: int, after: int = 0):
  """'b t ...' with the neighbours' last and first tokens; zeros at the ends."""
  n, parts = lax.axis_size(axis), [x]
  if before:
    on = [(i, i + 1) for i in range(n - 1)]
    parts.insert(0, lax.ppermute(x[:, -before:], axis, on))
  if after:
    back = [(i + 1, i) for i in range(n - 1)]
    parts.append(lax.ppermute(x[:, :after], axis, back))
  return jnp.concatenate(parts, axis=1)


def _columns(bias, length, axis, before, after):
  """Of a bias that has a column for every key, those of the keys at hand."""
  if bias is None:
    return None
  bias = jnp.pad(bias, [(0, 0)] * 3 + [(before, after)])
  here = lax.axis_index(axis) * length
  return lax.dynamic_slice_in_dim(bias, here, before + length + after, 3)
