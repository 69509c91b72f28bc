"""What is chosen for time over devices, and why: on the host alone."""

import functools
import logging
import math

import jax
import pytest

from jaxattn import registry
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import sequence, strategy
from jaxattn.parallel.strategy import Call, choose
from pallas_kernels.masks import Causal, Sinks, Window

# A model of 32 heads of width 128 in bfloat16, 4,096 tokens a device.
ROW = {'t': 4096, 's': 4096, 'h': 32, 'd': 128, 'e': 128, 'itemsize': 2}
SIZES = {'b': 1, **ROW}
NEAR = {'mask': Causal() & Window(512), 'dense': True}


def window(size):
  return {'mask': Causal() & Window(size), 'dense': True}


@pytest.mark.parametrize(
  ('name', 'given'),
  [
    ('halo', {'devices': 64, 'k': 8, **NEAR}),
    # Packed: the neighbour may hold other tokens than those before.
    ('ulysses', {'devices': 8, 'k': 8, 'mask': NEAR['mask']}),
    # Of 4 query heads to a key head, queries and results are 4 parts.
    ('ring', {'devices': 8, 'k': 8, **window(5000)}),
    ('ring', {'devices': 8, 'k': 8, **window(4 * 4096)}),
    ('ulysses', {'devices': 8, 'k': 8, **window(5 * 4096)}),
    ('ulysses', {'devices': 8, 'k': 32, **window(4098)}),
    ('ring', {'devices': 16, 'k': 1, **window(5000)}),
    ('gather', {'devices': 16, 'k': 1, 'mask': Causal(), 'dense': True}),
    # Another has tags, and so its keys may be seen from anywhere.
    ('gather', {'devices': 16, 'k': 1, **window(5000), 'tagged': True}),
    ('gather', {'devices': 1024, 'k': 1, 'backward': False}),
    ('gather', {'devices': 256, 'k': 8, 'backward': False}),
    ('ulysses', {'devices': 8, 'k': 32}),
    ('gather', {'devices': 16, 'k': 8}),
    ('gather', {'devices': 8, 'k': 1}),
    ('hybrid', {'devices': 256, 'k': 8}),
    ('ring', {'devices': 1024, 'k': 1}),
  ],
)
def test_rules(name, given):
  found = choose(Call(**SIZES, **given))
  assert found.name == name
  assert found.reason in {reason for _, reason, _ in strategy.RULES}


def test_costs():
  """Of 16 devices, 8 key heads: a token's keys and values are 4 KiB."""
  call = Call(devices=16, k=8, **SIZES)
  part = 4096 * 4096
  by = {name: choose(call, name) for name in ('ring', 'gather', 'ulysses')}
  assert (by['ring'].hops, by['ring'].sent) == (15, 15 * part)
  assert by['ring'].held == 2 * part
  assert (by['gather'].hops, by['gather'].held) == (1, 15 * part)
  # q, o, and 16 heads of keys and values, of which 15 / 16 go away.
  assert by['ulysses'].sent == 15 / 16 * (4096 * 2 * 128 * 2) * (32 + 16)
  assert by['ulysses'].held == part  # each key head is there twice
  hybrid = choose(call, 'hybrid')
  assert hybrid.hops == 2 + 1  # groups of 8, and a ring of two groups


def test_a_ring_costs_what_its_mask_lets_it():
  part = 4096 * 4096
  cost = lambda name, **given: choose(
    Call(devices=16, k=8, **SIZES, **given), name
  )
  for size, hops in ((1, 0), (2, 1), (4097, 1), (4098, 2), (10**6, 15)):
    found = cost('ring', **window(size))
    assert (found.hops, found.sent) == (hops, hops * part), size
    assert found.held == min(hops, 2) * part
  # The first keys are seen by all.
  sinks = Causal() & (Window(9) | Sinks(1))
  assert cost('ring', mask=sinks, dense=True).hops == 15
  for more in ({'dense': False}, {'tagged': True}):
    assert cost('ring', **window(2) | more).hops == 15
  # Two groups of 8 devices; none sees what the other holds.
  both, one = (cost('hybrid', **window(size)) for size in (2, 1))
  assert (both.hops, one.hops) == (3, 2)
  assert both.sent - one.sent == both.held - one.held == part


def test_what_cannot_go_round_gathers_a_few_heads():
  call = Call(devices=256, k=8, **SIZES, backward=False)
  found = choose(call)
  assert found.held <= strategy.ROOM
  assert 'some heads at a time' in found.reason
  for name in ('ring', 'hybrid'):
    message = "backward pass of its own, .*='xla'; ulysses, gather can"
    with pytest.raises(NotImplementedError, match=message):
      choose(call, name)


@pytest.mark.parametrize('name', sequence.STRATEGIES)
def test_rows_cost_as_often(name):
  sizes = {'devices': 16, 'k': 8, **ROW, **NEAR}
  one, four = (choose(Call(b=b, **sizes), name) for b in (1, 4))
  assert (four.sent, four.held) == (4 * one.sent, 4 * one.held)


def test_a_gather_that_is_asked_for_takes_some_heads_at_a_time():
  call = Call(devices=256, k=8, **SIZES)
  found = choose(call, 'gather')
  assert found.sent == 255 * 4096 * 4096
  assert found.held <= strategy.ROOM
  assert found.hops == math.ceil(found.sent / strategy.ROOM)


def test_what_is_said(caplog):
  call = Call(devices=64, k=8, **SIZES, **NEAR)
  with caplog.at_level(logging.INFO):
    strategy.say.cache_clear()
    text = str(choose(call))
    choose(call)
  assert text == (
    'halo (no query sees beyond the neighbours): each device sends 2.00 MiB'
    ' forward, hops: 1; it holds 2.00 MiB of others'
  )
  said = [x.message for x in caplog.records]
  assert said == [f'attention over 64 devices runs as {text}']  # once


def test_calls_that_cost_the_same_are_not_the_same(monkeypatch):
  """What is said once is the cost; what is done is each call's own."""
  monkeypatch.setattr(strategy.ring, 'over', lambda *args: args)
  fresh = functools.cache(strategy._chosen.__wrapped__)
  monkeypatch.setattr(strategy, '_chosen', fresh)
  call = Call(devices=8, k=8, **SIZES)
  dense = Call(devices=8, k=8, **SIZES, dense=True)
  assert choose(call, 'ring') == choose(dense, 'ring')
  assert not choose(call, 'ring').over[1]
  assert choose(dense, 'ring').over[1]


def test_what_cannot_be_is_refused_with_what_can():
  call = Call(devices=8, k=8, **SIZES)
  with pytest.raises(NotImplementedError, match=r'any order; ulysses, gather'):
    choose(call, 'halo')
  with pytest.raises(ValueError, match=r"no strategy 'star', only halo"):
    choose(call, 'star')
  alone = Call(devices=7, k=8, **SIZES)
  message = '8 key heads and 7 devices have no common divisor above 1'
  with pytest.raises(NotImplementedError, match=message):
    choose(alone, 'hybrid')
  uneven = Call(devices=8, k=8, **SIZES | {'s': 8192}, **NEAR)
  assert choose(uneven).name != 'halo'
  with pytest.raises(NotImplementedError, match='keys differ in length'):
    choose(uneven, 'halo')


def layout(names, asked=None, seq=4):
  specs = {name: registry.spec(name) for name in names}
  mesh = jax.sharding.AbstractMesh((2, seq, 1), meshes.AXES)
  with jax.sharding.use_abstract_mesh(mesh):
    return sequence.layout(specs, asked)


def test_layouts():
  assert layout(['multi_head', 'moba']) == 'zigzag'
  assert layout(['multi_head', 'gated_linear']) == 'contiguous'
  assert layout(['multi_head', 'sliding_window']) == 'contiguous'
  assert layout(['sliding_window'], asked='zigzag') == 'zigzag'
  assert layout(['multi_head'], asked='striped') == 'striped'
  assert layout(['multi_head'], seq=1) == 'contiguous'
  assert layout(['multi_head'], asked='striped', seq=1) == 'contiguous'
  assert sequence.layout({}) == 'contiguous'  # no mesh


def test_layouts_that_cannot_be():
  with pytest.raises(ValueError, match=r"'striped': .* gated_linear, s4d;"):
    layout(['s4d', 'multi_head', 'gated_linear'], asked='striped')
  with pytest.raises(ValueError, match='one of contiguous, striped, zigzag'):
    layout(['multi_head'], asked='spiral')
