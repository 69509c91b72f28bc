"""Attention to keys that are gathered: every device holds all of them.

Simple, exact for everything, and for moderate lengths as fast as any. A few
heads at a time, the others need no room; the backward pass gathers again.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.parallel import between, tensor
from pallas_kernels.problem import Engine, Extras, Operands


def all_of_time(tree, axis: str):
  """'b t ...' with the parts of all devices, in their order."""
  return jax.tree.map(
    lambda x: lax.all_gather(x, axis, axis=1, tiled=True), tree
  )


def weight(
  part: jax.Array, stored: jax.P, where: jax.P, keep: str | None = None
) -> jax.Array:
  """A weight of which devices hold parts, as `place.weight` says, whole.

  Backward each device gets the sum of all gradients of its own part.

  Args:
    part: that this device holds.
    stored: where the parts lie.
    where: what is made by the weight will lie. Devices along another axis are
      to make the same, and JAX has to know that the weight is.
    keep: an axis of the mesh along which it stays in parts.
  """
  for axis, names in enumerate(stored):
    names = (names,) if isinstance(names, str) else names or ()
    names = [name for name in names if name != keep]
    at = len(names)
    while at and names[at - 1] in where:
      at -= 1
    # The last name counts fastest, so its parts are neighbours.
    for some, to in ((names[at:], 'varying'), (names[:at], 'invarying')):
      if some:
        part = lax.all_gather(part, tuple(some), axis=axis, tiled=True, to=to)
  return part


def over(axis: str, groups: int = 1):
  """Spreads an engine over devices along `axis`.

  Args:
    axis: of the mesh.
    groups: into which key heads are divided, to be served one after another; it
      has to divide their number.
  """

  def spread(engine: Engine):
    def bring(q, k, v, extras, query, key):
      own = lambda x: Operands(x.heads, x.queries, all_of_time(x.keys, axis))
      extras = Extras(
        tuple(map(own, extras.scores)),
        tuple(map(own, extras.weights)),
        extras.bias,
      )
      return q, *all_of_time((k, v), axis), extras, query, key

    serve = between.engine(engine, bring).attend

    def attend(rule, q, k, v, extras, query, key):
      key = all_of_time(key, axis)
      if groups == 1:
        return serve(rule, q, k, v, extras, query, key)
      inputs = q, k, v, tensor.wide(extras)

      def group(i):
        return serve(rule, *tensor.heads(i, groups, *inputs), query, key)

      results = lax.map(group, jnp.arange(groups))
      join = lambda x: jnp.moveaxis(x, 0, 2).reshape(
        *x.shape[1:3], -1, *x.shape[4:]
      )
      return tuple(map(join, results))

    return Engine(attend)

  return spread
