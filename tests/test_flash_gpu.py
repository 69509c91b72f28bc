"""The GPU kernels of attention: interpreted, and compiled for a described H200.

The oracle is that of `test_flash_tpu`, in float64; a kernel may err twice as
much as the formula does in float16, the type of its inputs. As a program this
file is the process that the interpreter needs.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips
from pallas_kernels.dropout import Dropout
from pallas_kernels.flash import gpu
from pallas_kernels.masks import BlockCausal, Causal, Everything, Sinks, Window
from pallas_kernels.problem import problem
from pallas_kernels.scores import Buckets, Score, Slopes
from tests import devices, gpu_interpreter
from tests.gpu_interpreter import interpreted
from tests.test_flash_tpu import (
  COUNTED,
  PADDED,
  ask,
  broken,
  draw,
  formula,
  twice,
)

SEGMENTS = {'query_segments': PADDED, 'key_segments': PADDED}
ORDERS = {'query_order': COUNTED, 'key_order': COUNTED}
LATER = {'query_order': np.arange(70) * 4, 'key_order': np.arange(200) * 2}
CASES = {
  'causal': (draw(2, 150, 150, 2, 1, 64, 64), {'mask': Causal()}),
  'packed': (
    draw(1, 300, 300, 2, 2, 64, 64),
    {'mask': Causal() & (Window(40) | Sinks(4)), **SEGMENTS, **ORDERS},
  ),
  'later': (draw(1, 70, 200, 2, 1, 64, 128), {'mask': Causal(), **LATER}),
  'wide': (draw(1, 64, 100, 1, 1, 256, 256), {}),
}


def test_what_the_interpreter_lacks():
  """All that is replaced is missing, and nothing else is."""
  assert gpu_interpreter.absent() == set(gpu_interpreter.missing())


def unmasked(plan, visit, clear, total, carry):
  """A mutant: no tile is masked."""
  del plan, clear
  return jax.lax.fori_loop(
    0, total, lambda n, carry: visit(n, carry, masked=False), carry
  )


def both(rule, q, k, v, extras, query, key, w, u):
  """o, lse and gradients, of a sum with weights w of o and u of lse."""
  inputs = rule, q, k, v, extras, query, key
  o, m, total = gpu.forward(*inputs)
  seen = total > 0
  lse = jnp.where(seen, m + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
  dl = jnp.where(seen, u / jnp.where(seen, total, 1), 0)
  dq, dk, dv, _ = gpu.backward(*inputs, o, m, total, w, jnp.zeros_like(m), dl)
  return {'o': o, 'lse': lse, 'dq': dq, 'dk': dk, 'dv': dv}


def exactly(arrays, given, dtype):
  """The same by the formula."""
  q, k, v, w, u = (jnp.asarray(x, dtype) for x in arrays)

  def loss(q, k, v):
    o, lse = formula(q, k, v, {}, **given)
    seen = lse > -jnp.inf
    return jnp.sum(o * w) + jnp.sum(jnp.where(seen, lse * u, 0)), (o, lse)

  (dq, dk, dv), (o, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
  return {'o': o, 'lse': lse, 'dq': dq, 'dk': dk, 'dv': dv}


def compare(name, **mutant):
  """Where the error rule is broken."""
  arrays, given = CASES[name]
  half = [np.float16(x) for x in arrays]
  q, k, v, w, u = (jnp.asarray(x) for x in half)
  attend = lambda *inputs: both(*inputs, w, u.astype(jnp.float32))
  with interpreted(**mutant):
    fast = ask(attend, q, k, v, {}, **given)
  wide = lambda found: jax.tree.map(lambda x: np.asarray(x, np.float64), found)
  naive = wide(exactly(half, given, jnp.float16))
  with jax.enable_x64(True):
    exact = wide(exactly(half, given, jnp.float64))
  return broken(wide(fast), [naive], exact)


def main():
  found = {name: compare(name) for name in CASES}
  found['unmasked'] = compare('causal', visit_all=unmasked)
  print(json.dumps(found))


@pytest.fixture(scope='module')
def found():
  return json.loads(devices.run('-m', 'tests.test_flash_gpu'))


@pytest.mark.parametrize('name', CASES)
def test_exact(name, found):
  assert found[name] == []


def test_a_tile_without_its_mask_is_noticed(found):
  assert found['unmasked']


def test_not_differentiated_twice():
  twice('gpu', jnp.float16)


# name: sizes, and what `problem` takes; t = 1000 needs padding.
COMPILED = {
  'full': ({}, {'mask': Everything()}),
  'causal': ({}, {'mask': Causal()}),
  'ragged': ({'t': 1000}, {'mask': Causal()}),
  'packed': (
    {'dtype': jnp.float16, 'segments': True},
    {'mask': Causal() & (Window(300) | Sinks(4))},
  ),
  'narrow': ({'d': 64}, {'mask': BlockCausal(100), 'wide': True}),
  'wide': ({'d': 256}, {'mask': Causal()}),
  'capped': ({}, {'mask': Causal(), 'softcap': 30.0}),
  'slopes': ({}, {'mask': Causal(), 'score': (Slopes(), (4,))}),
  'buckets': ({}, {'score': (Buckets(64, causal=False), (4, 32))}),
  'dropout': ({'t': 1000}, {'mask': Causal(), 'dropout': Dropout(0.1, 7)}),
  'bias': ({'d': 64, 't': 1000}, {'bias': (1, 4, 1000, 1000)}),
}
MODIFIED = 'capped', 'slopes', 'buckets', 'dropout', 'bias'
# Bytes that a thread stores away, of the kernels that do: fewer is better.
SPILLS = {
  'flash_backward_dk_dv': 200,
  'flash_backward_dk': 1100,
  'flash_backward_dv': 100,
  'flash_backward_dq wide': 1000,
  'flash_forward wide': 8,  # jax 0.12
  'flash_backward_dk_dv modified': 600,
  'flash_backward_dq modified': 24,
}


@pytest.mark.aot
@pytest.mark.parametrize('compiler', ['h200'], indirect=True)
@pytest.mark.parametrize('name', COMPILED)
def test_compiled(compiler, name, capfd, monkeypatch):
  """Forward and backward fit; what spills is known."""
  monkeypatch.setenv('MOSAIC_GPU_DUMP_PTXAS', '1')
  sizes, given = COMPILED[name]
  given = dict(given)
  t, d = sizes.get('t', 1024), sizes.get('d', 128)
  shape = lambda h: jax.ShapeDtypeStruct(
    (2, t, h, d), sizes.get('dtype', jnp.bfloat16)
  )
  segments = jax.ShapeDtypeStruct((2, t), jnp.int32)
  fn, size = given.pop('score', (None, ()))
  number = jax.ShapeDtypeStruct(given.get('bias', size), jnp.float32)

  def run(q, k, v, w, u, segments, number):
    one = segments if sizes.get('segments') else None
    asked = {'mask': Everything(), **given}
    asked |= {side: (None, one, None) for side in ('query', 'key')}
    if fn is not None:
      asked['score'] = Score(fn, (number,))
    if 'bias' in given:
      asked['bias'] = number
    rule, *rest = problem(q, k, v, **asked)
    assert gpu.refuses(rule, q, k, v, *rest) is None
    return both(rule, q, k, v, *rest, w, u)

  weights = jax.ShapeDtypeStruct((2, t, 4), jnp.float32)
  arrays = shape(4), shape(2), shape(2), shape(4), weights, segments, number
  with jax.set_mesh(chips.mesh('h200')):
    program = jax.jit(run).lower(*chips.on('h200', arrays)).compile()
  # The gradient of what a score reads is left out where nobody asks for it.
  assert ' while(' not in program.as_text()
  said = capfd.readouterr().out
  found = re.findall(
    r"entry function '(\w+)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores",
    said,
    re.DOTALL,
  )
  found = {kernel: int(spilled) for kernel, spilled in found}
  assert len(found) == (4 if d > 128 else 3), said
  for kernel, spilled in found.items():
    kind = 'wide' if d > 128 else 'modified' if name in MODIFIED else ''
    most = SPILLS.get(f'{kernel} {kind}', SPILLS.get(kernel, 0))
    assert spilled <= most, kernel


if __name__ == '__main__':
  main()
