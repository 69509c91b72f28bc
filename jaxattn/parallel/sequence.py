"""The one door between mechanisms and devices.

A mechanism hands its engine and the arrays to `run`, which decides how they
cross devices. Everything that mixes over time runs inside one fully manual
`shard_map`, which behaves the same in Auto and in Explicit mode. At present the
batch is split over `data` and time is whole on every device.
"""

from collections.abc import Callable

import jax

from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import place


def run(engine: Callable, *arrays, weights=()):
  """`engine(*arrays, *weights)`, row by row on the devices that hold the rows.

  Args:
    engine: a pure function whose results all lead with the batch.
    *arrays: pytrees whose leaves all lead with the batch (`None` is allowed).
    weights: pytrees that every device needs whole.
  """
  mesh = meshes.current()
  leaves = jax.tree.leaves(arrays)
  if mesh is None or not leaves:
    return engine(*arrays, *weights)
  rows = place.batch(leaves[0].shape[0], mesh)
  arrays = place.put(arrays, rows)
  return jax.shard_map(
    engine,
    in_specs=(*(rows for _ in arrays), *(jax.P() for _ in weights)),
    out_specs=rows,
  )(*arrays, *weights)
