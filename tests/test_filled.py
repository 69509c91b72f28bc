"""Rows that devices cannot share evenly are filled up, and nothing changes.

A process chooses once how many devices it simulates: this file, as a program,
prints what it found.
"""

import dataclasses
import json
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn.packing import Clock, Packing, resolve
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import sequence
from jaxattn.positions import learned
from jaxattn.tasks.batch import Batch
from jaxattn.train import build, optimizer, step
from tests import devices

STEPS = 5
LENGTH, NEXT = 122, 128  # the next that eight devices can share
# One has a loss of its own that counts tokens, and is laid in a zigzag; the
# others want neighbours in time to be neighbours.
MIXERS = {
  'softmax': 'mixture_of_heads',
  'recurrent': 'gated_linear',
  'window': 'sliding_window',
}


class Unfilled(step.Feed):
  """As it would be without filling up."""

  length = property(lambda self: self.task.length)


class Counted(step.Feed):
  """A mutant: what fills a row up is asked for."""

  def _filled(self, batch, layout):
    batch = super()._filled(batch, layout)
    weights = np.ones_like(batch.weights)
    return dataclasses.replace(batch, weights=weights)


class Real(step.Feed):
  """A mutant: what fills a row up belongs to the document."""

  def _filled(self, batch, layout):
    batch = super()._filled(batch, layout)
    all_one = np.ones_like(batch.packing.segments)
    packing = dataclasses.replace(batch.packing, segments=all_one)
    return dataclasses.replace(batch, packing=packing)


class Run:
  """A run on a mesh, with its step compiled."""

  def __init__(self, mesh, kind, feed=step.Feed, length=LENGTH):
    # As many positions have a vector as there are tokens.
    fields = {
      'mixture_of_heads': {
        'balance': 1.0,
        'position': {'name': 'learned', 'length': length},
      },
      'sliding_window': {'window': 9},
    }
    config = build.complete(
      {
        'batch': 2,
        'task': {
          'name': 'bytes',
          'preset': 'quick',
          'length': length,
          'test_rows': 3,
        },
        'model': {
          'width': 32,
          'depth': 1,
          'hidden': 64,
          'mixer': MIXERS[kind],
          'mechanisms': {
            name: fields[name] for name in fields if name == MIXERS[kind]
          },
        },
        'policy': {'dropout': 0.1},
        'layout': 'contiguous' if feed is Unfilled else None,
      }
    )
    task, model = build.build(config)
    update, rate = optimizer.make(STEPS, 'adamw', {'peak': 1e-3})
    self.mesh, self.chosen = mesh, set()
    choose = sequence.choose

    def noted(*args):
      strategy = choose(*args)
      self.chosen.add(strategy.name)
      return strategy

    with jax.set_mesh(mesh), mock.patch.object(sequence, 'choose', noted):
      self.feed = feed.of(config, task, model, mesh)
      self.made = step.programs(model, self.feed, update, rate)
      train = self.made.train.lower(self.made.shapes, self.feed.train(0))
      self.train = train.compile()

  def bytes(self):
    return self.train.memory_analysis().temp_size_in_bytes

  def start(self):
    """The first state, on the host."""
    with jax.set_mesh(self.mesh):
      return jax.device_get(self.made.init())

  def losses(self, feed, start):
    """Of the first steps, and what the last left."""
    with jax.set_mesh(self.mesh):
      where = jax.tree.map(lambda leaf: leaf.sharding, self.made.shapes)
      state, losses = jax.device_put(start, where), []
      for i in range(STEPS):
        state, metrics = self.train(state, feed.train(i))
        losses.append(float(metrics['loss'][0] / metrics['loss'][1]))
    return losses, state, metrics

  def found(self, start):
    losses, state, metrics = self.losses(self.feed, start)
    with jax.set_mesh(self.mesh):
      batch = self.feed.test(1)
      scores = self.made.evaluate(state.variables(), batch)
    return {
      'losses': losses,
      'grad_norm': float(metrics['grad_norm']),
      'count': float(metrics['loss'][1]),
      'scores': {k: list(map(float, pair)) for k, pair in scores.items()},
      'tokens': [self.feed.length, batch.inputs.shape[-1]],
      'layout': self.feed.layout,
      'bytes': self.bytes(),
      'chosen': sorted(self.chosen),
    }

  def mutant(self, kind, start):
    return self.losses(kind(**vars(self.feed)), start)[0]


def main():
  one = meshes.make(devices=jax.devices()[:1])
  eight = meshes.make(data=1, seq=8)
  found = {}
  for kind in MIXERS:
    alone, run = Run(one, kind), Run(eight, kind)
    start = alone.start()
    found[kind] = {
      'one': alone.found(start),
      'eight': run.found(start),
      'next': Run(eight, kind, length=NEXT).bytes(),
      'counted': run.mutant(Counted, start),
      'real': run.mutant(Real, start),
    }
  found['softmax']['unfilled'] = Run(eight, 'softmax', Unfilled).bytes()
  print(json.dumps(found))


@pytest.fixture(scope='module')
def found():
  return json.loads(devices.run('-m', 'tests.test_filled'))


@pytest.mark.parametrize('kind', MIXERS)
class TestFilled:
  def test_losses_are_those_of_one_device(self, found, kind):
    one, eight = found[kind]['one'], found[kind]['eight']
    assert len(set(one['losses'])) == STEPS
    np.testing.assert_allclose(eight['losses'], one['losses'], rtol=1e-5)
    assert eight['grad_norm'] == pytest.approx(one['grad_norm'], rel=1e-3)

  def test_only_tokens_are_counted(self, found, kind):
    one, eight = found[kind]['one'], found[kind]['eight']
    assert eight['count'] == one['count'] == 2 * LENGTH
    assert eight['scores'].keys() == one['scores'].keys()
    for name, (total, count) in one['scores'].items():
      assert eight['scores'][name][0] == pytest.approx(total, rel=1e-4)
      assert eight['scores'][name][1] == count
    assert eight['scores']['bits_per_byte@64-122'][1] == LENGTH - 64

  def test_time_is_shared(self, found, kind):
    eight = found[kind]['eight']
    assert eight['tokens'] == [NEXT, NEXT]
    near = kind != 'softmax'
    assert eight['layout'] == ('contiguous' if near else 'zigzag')
    assert eight['bytes'] == pytest.approx(found[kind]['next'], rel=0.05)


def test_a_window_sends_no_more_than_it_sees(found):
  """What fills a row up stands behind it: a token's place is its order."""
  assert found['window']['eight']['chosen'] == ['halo']


def test_what_is_noticed(found):
  """Padding that is asked for, or counts as text; rows that are not filled."""
  for kind, mutant in (
    ('softmax', 'counted'),
    ('recurrent', 'counted'),
    ('window', 'counted'),
    ('softmax', 'real'),  # by its own loss: nothing else looks ahead
  ):
    apart = np.divide(found[kind][mutant], found[kind]['one']['losses']) - 1
    assert np.abs(apart).max() > 1e-4
  assert found['softmax']['unfilled'] > 1.5 * found['softmax']['next']


# ------------------------------------------------------------- piece by piece


def fed(length, layout, packing=None, seq=4):
  """A feed's rows of a training step, and of the test set, as it lays them."""
  mesh = jax.sharding.AbstractMesh((1, seq, 1), meshes.AXES)
  rows = np.arange(2 * length).reshape(2, length) + 1
  batch = Batch(rows, rows, np.ones(rows.shape, np.float32), packing)
  task = types.SimpleNamespace(length=length, batch=lambda *_: batch)
  feed = step.Feed(task, 2, 1, mesh, layout)
  return feed, feed._filled(batch, layout), feed._filled(batch, 'contiguous')


@pytest.mark.parametrize(
  ('layout', 'length'), [('contiguous', 20), ('striped', 20), ('zigzag', 24)]
)
def test_rows_are_filled_up_with_padding(layout, length):
  feed, train, test = fed(18, layout)
  assert feed.length == length
  for batch, near in ((train, layout == 'contiguous'), (test, True)):
    assert {x.shape for x in jax.tree.leaves(batch)} == {(2, length)}
    np.testing.assert_array_equal(batch.weights.sum(1), [18, 18])
    for x in jax.tree.leaves(batch):
      assert not x[:, 18:].any()
    packing = batch.packing
    np.testing.assert_array_equal(packing.segments[:, :18], 1)
    np.testing.assert_array_equal(packing.order[0, :18], np.arange(18))
    assert packing.whole == near
    packing.validate()


def test_rows_that_divide_are_left_alone():
  for layout, length in (('contiguous', 20), ('zigzag', 24)):
    _, train, test = fed(length, layout)
    assert test.packing is None
    assert (train.packing is None) == (layout == 'contiguous')
    assert train.inputs.shape == (2, length)
  feed, train, _ = fed(19, 'zigzag', seq=1)
  assert feed.length == 19
  assert train.inputs.shape == (2, 19)


def test_documents_of_a_task_stay_what_they_are():
  own = Packing.from_segments(np.array([[1] * 5 + [2] * 6 + [0] * 7] * 2))
  own = dataclasses.replace(own, positions=np.ones((2, 18, 3), np.int32))
  _, train, test = fed(18, 'zigzag', own)
  for batch in (train, test):
    assert not batch.packing.whole
    assert batch.packing.positions.shape == (2, 24, 3)
    np.testing.assert_array_equal(batch.packing.segments[:, :18], own.segments)
    np.testing.assert_array_equal(batch.packing.order[:, :18], own.order)
  whole = dataclasses.replace(Packing.dense(2, 18), whole=True)
  _, train, test = fed(18, 'zigzag', whole)
  assert not train.packing.whole  # it is about to be permuted
  assert test.packing.whole


def test_it_is_said_once(caplog, monkeypatch):
  monkeypatch.setattr(jax, 'set_mesh', jax.sharding.use_abstract_mesh)
  mesh = jax.sharding.AbstractMesh((1, 4, 1), meshes.AXES)
  config = {'batch': 1, 'accumulate': 1, 'layout': None}
  model = types.SimpleNamespace(layers=lambda: {'multi_head': 1})
  with caplog.at_level('INFO'):
    for length in (16, 18):
      step.Feed.of(config, types.SimpleNamespace(length=length), model, mesh)
  (record,) = caplog.records
  assert '18 tokens are filled up to 24, for seq=4' in record.message


def test_whole_rows_take_the_short_way():
  """A convolution is one FFT, though padding stands behind the row."""
  x = jax.random.normal(jax.random.key(0), (2, 24, 8))
  mixer = jaxattn.make('base_conv', taps=16)
  packing = Packing.from_lengths([19, 24], 24)
  params = mixer.init(jax.random.key(1), x)
  want = mixer.apply(params, x, packing).y
  whole = dataclasses.replace(packing, whole=True)
  whole.validate()
  call = jax.jit(lambda packing: mixer.apply(params, x, packing).y)
  np.testing.assert_allclose(call(whole), want, atol=1e-5)
  fft = lambda packing: 'fft' in str(jax.make_jaxpr(call)(packing))
  assert fft(whole)
  assert not fft(packing)


def test_a_packing_that_is_not_whole_must_not_say_so():
  for lengths, left in (([5, 3], True), ([5, 3], False)):
    packing = Packing.from_lengths(lengths, 5, left=left)
    packing = dataclasses.replace(packing, whole=True)
    if left:
      with pytest.raises(ValueError, match='row 1 is not one document'):
        packing.validate()
    else:
      packing.validate()
  for segments in ([[1, 1, 2, 2]], [[1, 0, 1, 1]]):
    packing = Packing.from_segments(np.array(segments))
    with pytest.raises(ValueError, match='row 0 is not one document'):
      dataclasses.replace(packing, whole=True).validate()
  back = jax.tree.map(lambda x: x[:, ::-1], Packing.dense(1, 4))
  with pytest.raises(ValueError, match='row 0 is not one document'):
    dataclasses.replace(back, whole=True).validate()


def test_a_state_goes_on_where_it_was():
  """Only rows that begin are begun without looking."""
  packing = dataclasses.replace(Packing.dense(2, 4), whole=True)
  assert resolve(packing, None, 2, 4).starts is None
  starts = resolve(packing, Clock.start(2), 2, 4).starts
  np.testing.assert_array_equal(starts.sum(1), [1, 1])


@pytest.mark.parametrize(
  ('length', 'devices'), [(12, 1), (11, 1), (5, 4), (4, 4)]
)
def test_rows_may_be_longer_than_positions_by_what_fills_them(length, devices):
  position = learned.LearnedPosition(length=length)
  x, at = jnp.zeros((1, 12, 4)), jnp.zeros((1, 12), jnp.int32)
  params = {'params': {'table': jnp.zeros((length, 4))}}
  mesh = jax.sharding.AbstractMesh((1, devices, 1), meshes.AXES)
  add = lambda: position.apply(params, x, at, method='add')
  init = lambda: position.init(jax.random.key(0), x, at, method='add')
  says = pytest.raises(ValueError, match=f'12 tokens, but length={length}')
  with jax.sharding.use_abstract_mesh(mesh):
    if length in (12, 5):
      jax.eval_shape(add)
    else:
      with says:
        jax.eval_shape(add)
    if length != 12:  # a model is built for rows that are not filled up
      with says:
        jax.eval_shape(init)


if __name__ == '__main__':
  main()
