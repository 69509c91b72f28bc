"""Time over devices, the universal way: gather it, compute, keep one's slice.

Whatever a mechanism does over time is then right on every layout, at the price
of holding the whole length on each device of the `seq` axis.
"""

import jax
from jax.sharding import AxisType

from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import place


def whole(x: jax.Array) -> jax.Array:
  """All of time on every device: 'b t ...' with rows over `data` alone."""
  mesh = _split()
  return x if mesh is None else _lay(x, place.batch(x.shape[0], mesh), mesh)


def local(y: jax.Array) -> jax.Array:
  """Each device its slice of time again, where the length divides."""
  mesh = _split()
  if mesh is None:
    return y
  return _lay(y, place.tokens(*y.shape[:2], mesh), mesh)


def _split():
  """The mesh, if it splits time."""
  mesh = meshes.current()
  return mesh if mesh is not None and mesh.shape[meshes.SEQ] > 1 else None


def _lay(x, spec, mesh):
  if AxisType.Explicit in mesh.axis_types:
    return jax.reshard(x, spec)
  return jax.lax.with_sharding_constraint(x, spec)
