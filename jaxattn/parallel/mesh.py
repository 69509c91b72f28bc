"""The device mesh, and the only place that spells its axes.

`data` splits the batch (and, with FSDP, the weights), `seq` splits time,
`model` splits heads and hidden units.
"""

import math
from collections.abc import Sequence

import jax

DATA = 'data'
SEQ = 'seq'
MODEL = 'model'
AXES = (DATA, SEQ, MODEL)

TYPES = {
  'explicit': jax.sharding.AxisType.Explicit,
  'auto': jax.sharding.AxisType.Auto,
}


def make(
  data: int = -1,
  seq: int = 1,
  model: int = 1,
  axis_types: str = 'explicit',
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """A mesh over all devices, neighbours along an axis near each other.

  Args:
    data, seq, model: the size of each axis; one of them may be -1, which takes
      what the others leave.
    axis_types: 'explicit' (shardings stand in the types, and an accidental
      gather is an error) or 'auto' (the compiler decides).
    devices: what it is made of; by default all that this program has.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  sizes = {DATA: data, SEQ: seq, MODEL: model}
  count = len(jax.devices() if devices is None else devices)
  asked = ', '.join(f'{axis}={size}' for axis, size in sizes.items())
  if axis_types not in TYPES:
    raise ValueError(f"axis_types={axis_types!r} must be 'explicit' or 'auto'")
  if any(size == 0 or size < -1 for size in sizes.values()):
    raise ValueError(f'mesh {asked}: sizes are positive, or -1 for the rest')
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1:
    raise ValueError(f'mesh {asked}: only one axis may be -1')
  if free and count % fixed == 0:
    sizes[free[0]] = count // fixed
  if math.prod(sizes.values()) != count or min(sizes.values()) < 1:
    raise ValueError(f'mesh {asked} does not fit {count} devices')
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(TYPES[axis_types],) * len(AXES),
    devices=devices,
  )


def current():
  """The mesh that `jax.set_mesh` has set; None where there is nothing to do.

  None stands for no mesh, and for the inside of a `shard_map`, where arrays are
  local already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.manual_axes else mesh
