"""`configs/long_context.py` trains over eight devices as it does on one.

A process chooses once how many devices it simulates: this file, as a program,
prints what it found.
"""

import json
import logging

import jax
import numpy as np
import pytest

from configs import long_context
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import ring, strategy
from jaxattn.train import build, optimizer, step
from tests import devices

STEPS = 20
STRATEGIES = {  # of attention, and of what is no attention
  'ring': ['ring'],
  'striped': ['ring'],
  'ulysses': ['ulysses'],
  'linear': ['prefix', 'ulysses'],
}
WAYS = tuple(STRATEGIES)
MODES = ('explicit', 'auto')
DENSE = ring.over(ring.Ring(meshes.SEQ), True)  # of tokens in their order


def losses(way, mesh, start=None, **options):
  """Of the first steps; what was chosen; and how often the step compiled.

  And the state that they began with, which is made unless it is given.
  """
  said = []
  handler = logging.Handler()
  handler.emit = lambda record: said.append(record.args[-1])
  strategy.say.cache_clear()
  strategy.log.addHandler(handler)
  strategy.log.setLevel(logging.INFO)
  config = build.complete(long_context.get_config(f'{way},quick').to_dict())
  config['layout'] = options.get('layout', config['layout'])
  parts = config['task']['length'] // mesh.shape[meshes.SEQ]
  assert 2 * config['model']['block'] <= parts  # it runs in blocks
  task, model = build.build(config)
  update, rate = optimizer.make(config['steps'], **config['optimizer'])
  with jax.set_mesh(mesh):
    feed = step.Feed.of(config, task, model, mesh)
    made = step.programs(model, feed, update, rate)
    if start is None:
      start = jax.device_get(made.init())
    where = jax.tree.map(lambda leaf: leaf.sharding, made.shapes)
    state, found = jax.device_put(start, where), []
    for i in range(STEPS):
      state, metrics = made.train(state, feed.train(i))
      found.append(float(metrics['loss'][0] / metrics['loss'][1]))
  strategy.log.removeHandler(handler)
  return {
    'losses': found,
    'layout': feed.layout,
    'strategies': [x.name for x in said],
    'dense ring': [x.over is DENSE for x in said if x.name == 'ring'],
    'compiled': made.train._cache_size(),
  }, start


def main():
  one = meshes.make(devices=jax.devices()[:1])
  found = {}
  for way in WAYS:
    if way in ('ring', 'linear'):  # the others are the same on one device
      found[f'{way} one'], start = losses(way, one, layout=None)
    for mode in MODES:
      mesh = meshes.make(data=1, seq=8, axis_types=mode)
      found[f'{way} {mode}'], _ = losses(way, mesh, start)
  print(json.dumps(found))


@pytest.fixture(scope='module')
def found():
  return json.loads(devices.run('-m', 'tests.test_long_context'))


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('mode', MODES)
def test_losses_are_those_of_one_device(found, way, mode):
  one = found['linear one' if way == 'linear' else 'ring one']['losses']
  eight = found[f'{way} {mode}']
  assert one[-1] < one[0] - 0.1  # it learns
  np.testing.assert_allclose(eight['losses'], one, rtol=1e-5)
  assert eight['compiled'] == 1
  layouts = {'striped': 'striped', 'ulysses': 'zigzag'}
  assert eight['layout'] == layouts.get(way, 'contiguous')
  assert eight['strategies'] == STRATEGIES[way]
  # Where data decide, as they do of stripes, the ring is another.
  dense = {'ring': [True], 'striped': [False]}
  assert eight['dense ring'] == dense.get(way, [])


def test_what_may_stand_after_the_colon():
  get = long_context.get_config
  assert get('striped').layout == 'striped'
  assert get('hybrid,size=7b').policy.strategy == 'hybrid'
  assert get('linear').model.mixer == '3:1 gated_linear multi_head'
  with pytest.raises(ValueError, match=r"'size=8b'.*size=3b|'size=8b' is not"):
    get('size=8b')


if __name__ == '__main__':
  main()
