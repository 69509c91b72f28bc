"""TPUs, and a GPU, to compile for that need not be there.

  with jax.set_mesh(chips.mesh('v5e')):
    compiled = jax.jit(f).lower(*chips.on('v5e', shapes)).compile()

runs the compiler of that chip on any x86-64 Linux, where it is installed:
`pip install '.[aot]'`. The verdict on memory, VMEM and HBM, is the chip's.
"""

import functools
import importlib.util
import os
import pathlib
import shutil

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
# GPU -> what its compiler would otherwise ask it: a GpuTargetConfigProto.
GPUS = {
  'h200': """
    platform_name: "CUDA"
    device_description_str: "NVIDIA H200"
    dnn_version_info { major: 9 minor: 12 }
    gpu_device_info {
      cuda_compute_capability { major: 9 minor: 0 }
      core_count: 132
      fpus_per_core: 128
      clock_rate_ghz: 1.98
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      registers_per_block_limit: 65536
      registers_per_core_limit: 65536
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: 232448
      shared_memory_per_core: 233472
      l2_cache_size: 52428800
      memory_bandwidth: 4800000000000
      device_memory_size: 150754820096
    }
  """
}


def missing(chip: str = 'v5e') -> str | None:
  """Why there is no compiler for a chip here, or None."""
  if chip in GPUS:
    if importlib.util.find_spec('jax_cuda13_plugin') is None:
      return "jax-cuda13-plugin is not installed: pip install '.[aot]'"
    if not _ptxas():
      return (
        'there is no ptxas, which compiles for GPUs, neither in the package'
        " nvidia-cuda-nvcc nor on the PATH: pip install '.[aot]'"
      )
  elif importlib.util.find_spec('libtpu') is None:
    return "libtpu is not installed: pip install '.[aot]'"
  return None


def _ptxas() -> bool:
  """Whether it is where JAX, or else XLA, looks for it."""
  nvidia = importlib.util.find_spec('nvidia')
  within = nvidia.submodule_search_locations if nvidia else []
  return shutil.which('ptxas') is not None or any(
    pathlib.Path(folder, 'cu13', 'bin', 'ptxas').exists() for folder in within
  )


@functools.cache
def devices(topology: str) -> tuple[jax.Device, ...]:
  """The devices of a topology, as 'v5e:16x16', or of a chip's smallest one.

  So many GPUs of one machine are 'h200:8'.

  Raises:
    ModuleNotFoundError: their compiler is not installed.
    ValueError: there is no such topology.
  """
  if topology.partition(':')[0] in GPUS:
    return _gpus(topology)
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
      " them with the sides of its torus, as 'v5e:16x16' or 'v4:8x8x8', or GPUs"
      " and their number, as 'h200:8'"
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
    raise ValueError(
      f'there is no topology={topology!r}: the smallest is {known[chip]}, and'
      ' larger ones have powers of two for sides, as far as the chips were'
      f' built; libtpu says: {str(error).splitlines()[0]}'
    ) from error
  return tuple(described.devices)


def _gpus(topology: str) -> tuple[jax.Device, ...]:
  chip, _, count = topology.partition(':')
  if why := missing(chip):
    raise ModuleNotFoundError(why)
  count = count or '1'
  if not count.isdecimal() or int(count) < 1:
    raise ValueError(
      f'topology={topology!r} must be {chip}, or so many of one machine, as'
      f" '{chip}:8'"
    )
  described = topologies.get_topology_desc(
    platform='cuda',
    topology_name=chip,
    topology=f'1x1x{count}',  # slices, hosts of a slice, GPUs of a host
    target_config=GPUS[chip],
  )
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
