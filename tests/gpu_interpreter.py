"""Kernels for GPUs, interpreted.

What the interpreter lacks stands in `missing`: those few operations are
replaced, and all else (tiles that are visited, copies, barriers, masks) is
what runs on a GPU. Its threads wait for each other inside callbacks, so they
need a process with more threads than a machine may have cores, see `devices`.
"""

import contextlib
import functools
import threading
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import params
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash import gpu

OLD = jax.__version_info__ < (0, 11)


def missing():
  """What is there instead of the operations that the interpreter lacks."""

  def product(x, y, shape, meanwhile=lambda: None):
    meanwhile()
    return jnp.dot(*(z[...].astype(jnp.float32) for z in (x, y[...].T)))

  def added(total, x, y, meanwhile=lambda: None):
    meanwhile()
    return total + jnp.dot(*(z[...].astype(jnp.float32) for z in (x, y)))

  found = {'added': added}  # it has no run_state, nor wgmma of registers
  if OLD:  # nor transposed buffers, nor layouts
    found |= {
      'product': product,
      'full': lambda shape, value: jnp.full(shape, value, jnp.float32),
      'iota': lambda *of: jax.lax.broadcasted_iota(jnp.int32, *of),
      'load': lambda ref, axes: ref[...],
    }
  return found


class Programs:
  """What threads run, each compiled once: the interpreter does so each time."""

  def __init__(self):
    self._compiled = {}
    self._lock = threading.Lock()

  def run(self, jaxpr, consts, *args):
    with self._lock:
      if jaxpr not in self._compiled:
        evaluate = functools.partial(jax.core.eval_jaxpr, jaxpr)
        lowered = jax.jit(evaluate).lower(consts, *args)
        self._compiled[jaxpr] = lowered.compile()
    self._compiled[jaxpr](consts, *args)


def absent() -> set[str]:
  """The operations that fail when they are interpreted each for itself."""

  def kernel(do):
    def body(x, o, near):
      near[...] = x[...]
      o[...] = do(x, near).astype(jnp.float32)

    return plgpu.kernel(
      body,
      out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
      scratch_types=[plgpu.SMEM((64, 64), jnp.float16)],
    )

  ones = lambda: jnp.ones((64, 64), jnp.float32)
  operations = {
    'added': lambda x, near: gpu.added(ones(), x[...], near),
    'product': lambda x, near: gpu.product(near, near, (64, 64)),
    'full': lambda x, near: gpu.full((64, 64), 1),
    'iota': lambda x, near: gpu.iota((64, 64), 0),
    'load': lambda x, near: gpu.load(x, (0, 1)),
    'across': lambda x, near: gpu.across(jnp.ones(64), (64, 64)),
  }
  failed = set()
  for name, do in operations.items():
    try:
      with params.force_gpu_interpret_mode(params.InterpretGPUParams()):
        jax.block_until_ready(kernel(do)(jnp.ones((64, 64), jnp.float16)))
    except Exception:  # of many kinds
      failed.add(name)
  return failed


@contextlib.contextmanager
def interpreted(**instead):
  """Kernels are, with other parts of `gpu` in the place of some, by name."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(
      params.force_gpu_interpret_mode(params.InterpretGPUParams())
    )
    stack.enter_context(
      mock.patch.object(thread_map, '_run_jaxpr', Programs().run)
    )
    stack.enter_context(mock.patch.multiple(gpu, **{**missing(), **instead}))
    yield
