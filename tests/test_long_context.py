"""`configs/long_context.py` trains over eight devices as it does on one.

A process chooses once how many devices it simulates: this file, as a program,
prints what it found.
"""

import json

import jax
import numpy as np
import pytest

from configs import long_context
from jaxattn.parallel import mesh as meshes
from jaxattn.train import build, optimizer, step
from tests import devices

STEPS = 20
WAYS = ('ring', 'striped', 'ulysses', 'linear')
MODES = ('explicit', 'auto')


def losses(way, mesh, start=None, **options):
  """Of the first steps; what was chosen; and how often the step compiled.

  And the state that they began with, which is made unless it is given.
  """
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
  return {
    'losses': found,
    'layout': feed.layout,
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


def test_what_may_stand_after_the_colon():
  get = long_context.get_config
  assert get('striped').layout == 'striped'
  assert get('hybrid,size=7b').policy.strategy == 'hybrid'
  assert get('linear').model.mixer == '3:1 gated_linear multi_head'
  with pytest.raises(ValueError, match=r"'size=8b'.*size=3b|'size=8b' is not"):
    get('size=8b')


if __name__ == '__main__':
  main()
