"""Heads over `model`, alone and beside time over `seq`, change nothing.

A process chooses once how many devices it simulates: this file, as a program,
prints what it found.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models.lm import LM
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import place, sequence, tensor
from pallas_kernels import flash
from pallas_kernels.dropout import Dropout
from pallas_kernels.masks import Causal
from pallas_kernels.scores import Score, Slopes
from tests import devices

T, H, K, D = 16, 8, 4, 6
MESHES = {
  'heads alone': {'data': 2, 'seq': 1, 'model': 4},
  'heads and time': {'data': 1, 'seq': 4, 'model': 2},
  'heads that do not divide': {'data': 1, 'seq': 1, 'model': 8},
}
SLOPES = Score(Slopes(), (jnp.arange(1, H + 1) / H,))
CASES = {
  'slopes, cap and sinks': {
    'score': SLOPES,
    'softcap': 2.0,
    'sinks': jnp.linspace(-1, 1, H),
  },
  'dropout': {'dropout': Dropout(0.3, seed=5)},
}


def draw():
  keys = jax.random.split(jax.random.key(1), 3)
  shapes = (2, T, H, D), (2, T, K, D), (2, T, K, D)
  return [jax.random.normal(k, s) for k, s in zip(keys, shapes)]


def both(run, arrays):
  """Values, and gradients by all arrays."""

  @jax.jit
  def run_both(*arrays):
    o, back = jax.vjp(run, *arrays)
    return o, *back(jnp.cos(o))

  return run_both(*arrays)


def compared(sizes, given):
  """The largest differences from one device, over the RMS."""
  mesh = meshes.make(**sizes)
  arrays = draw()
  attend = lambda *x: sequence.attention(*x, mask=Causal(), **given)
  one = both(lambda *x: flash.attention(*x, mask=Causal(), **given), arrays)
  with jax.set_mesh(mesh):
    spec = place.tokens(2, T, mesh)
    over = lambda *x: jax.shard_map(attend, in_specs=spec, out_specs=spec)(*x)
    eight = both(over, [jax.device_put(x, spec) for x in arrays])
  scale = lambda x: float(np.sqrt(np.mean(np.square(x))))
  return [
    float(np.max(np.abs(np.asarray(a) - b))) / scale(b)
    for a, b in zip(eight, one)
  ]


def operations(sizes):
  """FLOPs of a device in a model's forward pass."""
  ids = jnp.zeros((2, T), jnp.int32)
  model = LM(
    64, width=64, depth=1, hidden=512, mechanisms={'multi_head': {'heads': 8}}
  )
  with jax.set_mesh(meshes.make(**sizes)):
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    compiled = jax.jit(model.apply).lower(variables, ids).compile()
    return compiled.cost_analysis()['flops']


def main():
  found = {
    f'{mesh}, {case}': compared(sizes, given)
    for mesh, sizes in MESHES.items()
    for case, given in CASES.items()
  }
  two = {'data': 2, 'devices': jax.devices()[:2]}
  found['flops'] = [operations(MESHES['heads alone']), operations(two)]
  # A device that takes the heads of the next.
  own, index = tensor.heads, lambda i, n: (i + 1) % n
  tensor.heads = lambda i, n, *x: own(index(i, n), n, *x)
  found['mutant'] = compared(
    MESHES['heads alone'], CASES['slopes, cap and sinks']
  )
  print(json.dumps(found))


@pytest.fixture(scope='module')
def found():
  return json.loads(devices.run('-m', 'tests.test_tensor'))


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients_are_those_of_one_device(found, mesh, case):
  assert max(found[f'{mesh}, {case}']) < 1e-5


def test_devices_divide_the_work(found):
  """Of a feed-forward and attention; projections to heads are not divided."""
  shared, alone = found['flops']
  assert shared < 0.45 * alone


def test_heads_of_another_device_are_rejected(found):
  assert max(found['mutant']) > 0.1


if __name__ == '__main__':
  main()
