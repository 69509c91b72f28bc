"""TPUs to compile for that need not be there.

  with jax.set_mesh(chips.mesh('v5e')):
    compiled = jax.jit(f).lower(*chips.on('v5e', shapes)).compile()

runs the compiler of that chip on any x86-64 Linux, where libtpu is installed:
`pip install '.[aot]'`. The verdict on memory, VMEM and HBM, is the chip's.
"""

import functools
import importlib.util
import os

import jax
from jax.experimental import topologies

# Chip that the kernels are for -> the smallest topology that there is.
TOPOLOGIES = {
  'v4': 'v4:2x2x1',
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
  'tpu7x': 'tpu7x:2x2x1',
}
BEFORE = {'v3': 'v3:4x4'}
# What libtpu would otherwise ask the machine; it is read when libtpu loads.
SETTINGS = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


def missing() -> str | None:
  """Why there is no compiler for TPUs here, or None."""
  if importlib.util.find_spec('libtpu') is None:
    return "libtpu is not installed: pip install '.[aot]'"
  return None


@functools.cache
def devices(topology: str) -> tuple[jax.Device, ...]:
  """The devices of a topology, as 'v5e:16x16', or of a chip's smallest one.

  Raises:
    ModuleNotFoundError: libtpu is not installed.
    ValueError: there is no such topology.
  """
  if why := missing():
    raise ModuleNotFoundError(why)
  for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
  known = BEFORE | TOPOLOGIES
  topology = known.get(topology, topology)
  chip = topology.partition(':')[0]
  if chip not in known or ':' not in topology:
    raise ValueError(
      f'topology={topology!r} must be one of {", ".join(known)}, or one of'
      " them with the sides of its torus, as 'v5e:16x16' or 'v4:8x8x8'"
    )
  two_cores = {
    'chip_config_name': 'megacore',
    'chips_per_host_bounds': (2, 2, 1),
  }
  try:
    described = topologies.get_topology_desc(
      platform='tpu',
      topology_name=topology,
      **(two_cores if chip == 'v4' else {}),
    )
  except Exception as error:  # JaxRuntimeError, of what libtpu says
    raise ValueError(f'topology={topology!r}: {error}') from error
  return tuple(described.devices)


@functools.cache
def mesh(chip: str, count: int = 1, axis: str = 'chip') -> jax.sharding.Mesh:
  """Such chips in a row: under it a program is traced for them."""
  return jax.sharding.Mesh(devices(chip)[:count], (axis,))


def on(chip: str, shapes):
  """A tree of arrays or shapes as shapes that lie on such a chip."""
  sharding = jax.NamedSharding(mesh(chip), jax.P())
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, shapes)
