"""Training over eight simulated devices equals training on one.

The batch is split over all of them, or over two, and time over four. That each
mechanism by itself is the same over devices is for `test_sharding.py`.

All of it runs in one process of its own, since a process chooses once how many
devices it simulates: this file, run as a program, prints what it found.
"""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest

from jaxattn import registry
from jaxattn.models.lm import LM
from jaxattn.parallel import mesh as meshes
from jaxattn.tasks.mqar import MQAR
from jaxattn.train import build, checkpoint, optimizer, step
from tests import devices

# One whose rows are laid in a zigzag, and two whose rows are not, in one model.
MIXERS = ('multi_head', 'gated_linear mixture_of_heads')
MODES = {  # what `meshes.make` takes
  'explicit': {},
  'auto': {'axis_types': 'auto'},
  'time': {'seq': 4},
  'time, auto': {'seq': 4, 'axis_types': 'auto'},
}
EVERY = ' '.join(registry.names())  # a layer of each
STEPS = 5
CONFIG = {
  'steps': STEPS,
  'batch': 16,
  'accumulate': 2,
  'task': {
    'name': 'mqar',
    'vocab': 64,
    'length': 16,
    'pairs': 2,
    'test_rows': 24,
  },
  # Wide enough for weights to be split: small ones stay whole.
  'model': {'width': 64, 'depth': 2, 'mixer': 'multi_head', 'hidden': 64},
  'optimizer': {'schedule': {'name': 'constant', 'peak': 1e-3}},
}


class Uneven(MQAR):
  """Rows of different weight: means over shards are not the mean over all."""

  def batch(self, split, step, rows):
    batch = super().batch(split, step, rows)
    scale = (1.0 + np.asarray(rows)[:, None]).astype(np.float32)
    return dataclasses.replace(batch, weights=batch.weights * scale)


def made(mixer, dropout=0.0):
  """Configuration, task, model, optimiser and its rate."""
  config = build.complete(CONFIG)
  config['policy'] |= {'dropout': dropout}
  # Layers come twice, but for those of every mechanism.
  depth = len(mixer.split()) * (1 if mixer == EVERY else 2)
  config['model'] |= {'mixer': mixer, 'depth': depth}
  task, model = build.build(config)
  task = Uneven(**dataclasses.asdict(task))
  return config, task, model, *optimizer.make(STEPS, **config['optimizer'])


def programs(mesh, mixer, dropout=0.0):
  """Configuration, task, batches and programs of a model on a mesh."""
  config, task, model, *how = made(mixer, dropout)
  with jax.set_mesh(mesh):
    feed = step.Feed.of(config, task, model, mesh)
    return config, task, feed, step.programs(model, feed, *how, seed=1)


def initial(mesh, mixer):
  """The state that a mesh begins with, on the host."""
  with jax.set_mesh(mesh):
    return jax.device_get(programs(mesh, mixer)[-1].init())


def drawn(mixer):
  """A first state whose matrices numpy draws: this compiles much sooner.

  It learns less smoothly than a model's own: rounding shows in fewer steps.
  """
  _, task, model, update, _ = made(mixer)
  zeros = jax.nn.initializers.zeros
  model = model.clone(
    policy=dataclasses.replace(model.policy, kernel_init=zeros)
  )
  ids = build.blank(build.facts(task), 1)
  variables = jax.jit(model.init)(jax.random.key(1, impl='rbg'), ids)
  draws = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: np.float32(leaf + draws.normal(0, 0.1, leaf.shape)),
    variables['params'],
  )
  return jax.device_get(
    step.TrainState(
      step=np.int32(0),
      params=params,
      stats=variables.get('stats', {}),
      opt_state=jax.jit(update.init)(params),
      stopped_at=np.int32(-1),
    )
  )


def over(mesh, mixer, workdir=None, dropout=0.0, start=None, scored=False):
  """Five steps on a mesh: losses, scores if wanted, and where weights lie.

  With a workdir the state goes to disk and back before the last step. With a
  state to start from, none is initialised: that of many layers takes as long
  to compile as the step does.
  """
  config, task, feed, made = programs(mesh, mixer, dropout)
  losses = []
  with jax.set_mesh(mesh):
    if start is None:
      state = made.init()
    else:
      where = jax.tree.map(lambda leaf: leaf.sharding, made.shapes)
      state = jax.device_put(start, where)
    for i in range(STEPS):
      if workdir and i == STEPS - 1:
        checkpoint.claim(workdir, config, task)
        store = checkpoint.Store(workdir, better=task.better)
        store.save(i, state, 0.5)
        state = store.newest(made.shapes)
        store.close()
      state, metrics = made.train(state, feed.train(i))
      losses.append(float(metrics['loss'][0] / metrics['loss'][1]))
    pairs = made.evaluate(state.variables(), feed.test(1)) if scored else {}
    moments = state.opt_state[1][0].mu
    share = lambda w: w.addressable_shards[0].data.size / w.size
    return {
      'losses': losses,
      'layout': feed.layout,
      'grad_norm': float(metrics['grad_norm']),
      'scores': {k: [float(x) for x in pair] for k, pair in pairs.items()},
      'compiled': made.train._cache_size(),
      'split': {
        name: [share(w), share(m)]
        for (name, w), m in zip(
          checkpoint._flat(state.params).items(), jax.tree.leaves(moments)
        )
      },
    }


def main(workdir):
  one = jax.make_mesh(
    (1, 1, 1),
    meshes.AXES,
    axis_types=(meshes.TYPES['explicit'],) * 3,
    devices=jax.devices()[:1],
  )
  found, starts = {}, {}
  for mixer in MIXERS:
    # One model makes its first state on every mesh, which takes as long to
    # compile as the step does; the other is given that of one device.
    own, starts[mixer] = mixer == MIXERS[0], initial(one, mixer)
    found[mixer] = {'one': over(one, mixer, start=starts[mixer], scored=True)}
    for mode, axes in MODES.items():
      found[mixer][mode] = over(
        meshes.make(**axes),
        mixer,
        workdir=f'{workdir}/{mixer}' if mode == 'explicit' else None,
        start=None if own else starts[mixer],
        scored=True,
      )
  start = drawn(EVERY)
  found['every'] = {
    'one': over(one, EVERY, start=start),
    'time': over(meshes.make(seq=4), EVERY, start=start),
    'model': over(meshes.make(seq=2, model=2), EVERY, start=start),
  }
  run = functools.partial(over, mixer='multi_head', start=starts['multi_head'])
  found['dropout'] = {
    'one': run(one, dropout=0.3),
    'time': run(meshes.make(seq=4), dropout=0.3),
  }
  for mode in ('explicit', 'auto'):
    mesh = meshes.make(seq=2, model=2, axis_types=mode)
    found['multi_head'][f'model, {mode}'] = run(mesh)
  try:
    step.Feed(MQAR(), 12, 1, meshes.make())
  except ValueError as error:
    found['uneven'] = str(error)
  print(json.dumps(found))


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('mesh')
  ran = devices.run('-m', 'tests.test_train_mesh', str(workdir))
  return json.loads(ran) | {'workdir': workdir}


@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('mode', MODES)
class TestMesh:
  def test_losses_are_those_of_one_device(self, found, mixer, mode):
    one, eight = found[mixer]['one'], found[mixer][mode]
    assert len(set(one['losses'])) == STEPS
    np.testing.assert_allclose(eight['losses'], one['losses'], rtol=1e-5)
    assert eight['grad_norm'] == pytest.approx(one['grad_norm'], rel=1e-3)

  def test_scores_are_those_of_one_device(self, found, mixer, mode):
    one, eight = (found[mixer][x]['scores'] for x in ('one', mode))
    assert eight.keys() == one.keys() != set()
    for name, pair in one.items():
      np.testing.assert_allclose(eight[name], pair, rtol=1e-4)

  def test_weights_and_moments_are_split(self, found, mixer, mode):
    split = found[mixer][mode]['split']
    kernels = {name for name in split if name.endswith(('kernel', 'table'))}
    parts = {name for name, share in split.items() if share == [1 / 8] * 2}
    whole = {name for name, share in split.items() if share == [1, 1]}
    assert parts | whole == set(split)
    assert parts <= kernels
    assert len(parts) >= 6
    assert set(found[mixer]['one']['split']) == set(split)

  def test_the_step_is_compiled_once(self, found, mixer, mode):
    assert found[mixer][mode]['compiled'] == 1


@pytest.mark.parametrize('mode', ['explicit', 'auto'])
def test_heads_and_hidden_units_over_devices(found, mode):
  one, eight = (found['multi_head'][x] for x in ('one', f'model, {mode}'))
  np.testing.assert_allclose(eight['losses'], one['losses'], rtol=1e-5)
  assert eight['grad_norm'] == pytest.approx(one['grad_norm'], rel=1e-3)
  assert sum(share == [1 / 8] * 2 for share in eight['split'].values()) >= 6
  assert eight['compiled'] == 1


@pytest.mark.parametrize('mesh', ['time', 'model'])
def test_every_mechanism_trains_with_time_over_devices(found, mesh):
  one, many = found['every']['one'], found['every'][mesh]
  # At first Adam takes the signs of gradients, which round either way about 0:
  # the first update can be compared, later ones only look alike.
  np.testing.assert_allclose(many['losses'][:2], one['losses'][:2], rtol=1e-5)
  np.testing.assert_allclose(many['losses'], one['losses'], rtol=1e-2)
  assert many['compiled'] == 1


def test_what_is_dropped_does_not_depend_on_the_layout(found):
  one, time = found['dropout']['one'], found['dropout']['time']
  assert time['layout'] == 'zigzag'
  np.testing.assert_allclose(time['losses'], one['losses'], rtol=1e-5)
  whole = found['multi_head']['one']['losses']
  assert not np.allclose(one['losses'], whole, rtol=1e-3)


def test_work_is_even_where_every_layer_takes_it(found):
  assert found['multi_head']['time']['layout'] == 'zigzag'
  assert found[MIXERS[1]]['time']['layout'] == 'contiguous'
  assert found['multi_head']['one']['layout'] == 'contiguous'


@pytest.mark.parametrize('mixer', MIXERS)
def test_a_model_of_eight_devices_loads_on_one(found, mixer):
  loaded = checkpoint.load(found['workdir'] / mixer)
  assert isinstance(loaded.model, LM)
  for leaf in jax.tree.leaves(loaded.params):
    assert len(leaf.sharding.device_set) == 1


def test_rows_that_do_not_divide_are_refused(found):
  assert 'batch=12' in found['uneven']
  assert 'data=8' in found['uneven']


if __name__ == '__main__':
  main(sys.argv[1])
