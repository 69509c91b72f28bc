"""What is read from compiled programs is what they were written to do."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxattn.analysis import traffic
from jaxattn.parallel import mesh as meshes
from tests import devices

N = 8


def programs():
  """name -> [kind, bytes, times] of what eight devices exchange."""
  mesh = meshes.make(data=1, seq=N)
  time, whole = jax.P(None, 'seq'), jax.P()
  shift = lambda x: lax.ppermute(x, 'seq', [(i, (i + 1) % N) for i in range(N)])

  def ring(x):  # from 1 on, as a backward pass goes
    return lax.fori_loop(1, N, lambda _, x: jnp.sin(shift(x)), x)

  def nested(x):
    layer = lambda x, _: (ring(x), None)
    return lax.scan(layer, x, None, length=3)[0]

  def until(x):
    hops = lax.pmax(jnp.int32(jnp.abs(x[0, 0])), 'seq')
    return lax.fori_loop(0, hops, lambda _, x: shift(x), x)

  def home(x):  # the shorter way
    hops = lax.pmax(jnp.int32(jnp.abs(x[0, 0])), 'seq')
    on = lambda x: lax.fori_loop(0, N - hops, lambda _, x: shift(x), x)
    back = lambda x: lax.fori_loop(0, hops, lambda _, x: shift(x), x)
    return lax.cond(hops > N // 2, on, back, x)

  cases = {
    'gather': (lambda x: lax.all_gather(x, 'seq', axis=1, tiled=True), 'whole'),
    'sum': (lambda x: lax.psum(x, 'seq'), whole),
    'scatter': (
      lambda x: lax.psum_scatter(x, 'seq', tiled=True),
      time,
    ),
    'exchange': (lambda x: lax.all_to_all(x, 'seq', 1, 0, tiled=True), time),
    'ring': (ring, time),
    'nested': (nested, time),
    'until': (until, time),
    'home': (home, time),
  }
  found = {}
  with jax.set_mesh(mesh):
    x = jax.device_put(jnp.ones((N, N * N), jnp.float32), time)
    for name, (run, out) in cases.items():
      program = jax.jit(
        jax.shard_map(
          run,
          in_specs=time,
          out_specs=time if out == 'whole' else out,
          check_vma=out != 'whole',
        )
      )
      text = program.lower(x).compile().as_text()
      found[name] = [
        [x.kind, x.sent, x.times] for x in traffic.exchanges(text, unknown=5)
      ]
  return found


@pytest.fixture(scope='module')
def found():
  program = 'import json; from tests import test_traffic as own;'
  return json.loads(
    devices.run('-c', f'{program} print(json.dumps(own.programs()))')
  )


PART = N * N * 4  # bytes that a device has
EXPECTED = {
  'gather': ['all-gather', (N - 1) * PART, 1],
  'sum': ['all-reduce', 2 * (N - 1) * PART // N, 1],
  'scatter': ['reduce-scatter', (N - 1) * PART // N, 1],
  'exchange': ['all-to-all', (N - 1) * PART // N, 1],
  'ring': ['collective-permute', PART, N - 1],
  'nested': ['collective-permute', PART, 3 * (N - 1)],
  'until': ['collective-permute', PART, 5],
  'home': ['collective-permute', PART, 1],
}


@pytest.mark.parametrize('name', EXPECTED)
def test_bytes_and_times(found, name):
  assert EXPECTED[name] in found[name]
  others = [x for x in found[name] if x != EXPECTED[name]]
  assert sum(sent * times for _, sent, times in others) <= 64  # a number


TEXT = """HloModule test

%body (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %send = (f32[8]{0:T(8)}, f32[8]{0}) collective-permute-start(%x)
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  %come = f32[8]{0} collective-permute-done(%send)
  %late = (f32[8]{0}, f32[8]{0}) collective-permute-start(%come)
  %there = f32[8]{0} collective-permute-done(%late)
  ROOT %t = (f32[8]{0}, s32[]) tuple(%there, %kernel)
}

%condition (p: (f32[8], s32[])) -> pred[] {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=1
  %end = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = s32[] constant(0)
  %begin = (f32[8]{0}, s32[]) tuple(%start, %x)
  %loop = (f32[8]{0}, s32[]) while(%begin), condition=%condition, body=%body
  ROOT %o = f32[8]{0} get-tuple-element(%loop), index=0
}
"""


# As a compiler for GPUs writes it, and one for TPUs: several arrays at once.
JOINED = """HloModule test

%body (p: (f32[8], s32[4])) -> (f32[8], s32[4]) {
  %p = (f32[8]{0}, s32[4]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %y = s32[4]{0} get-tuple-element(%p), index=1
  %send = ((f32[8]{0}, s32[4]{0}), (f32[8]{0}, s32[4]{0})) collective-permute-start(%x, %y)
  %come = (f32[8]{0}, s32[4]{0}) collective-permute-done(%send)
  %one = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
  %there = f32[8]{0} collective-permute-done(%one)
  ROOT %t = (f32[8]{0}, s32[4]{0}) tuple(%there, %y)
}

%condition (p: (f32[8], s32[4])) -> pred[] {
  %p = (f32[8]{0}, s32[4]{0}) parameter(0)
  ROOT %lt = pred[] fusion(%p), kind=kLoop, calls=%compare
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = (f32[8]{0}, s32[4]{0}) parameter(0)
  %loop = (f32[8]{0}, s32[4]{0}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %o = f32[8]{0} get-tuple-element(%loop), index=0
}
"""  # noqa: E501


# As a compiler for TPUs cuts a gather in pieces, which go out between tiles of
# other work, here in a loop: three rounds of an outer loop, five of an inner.
PIECES = """HloModule test

%first (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %g = bf16[8,8]{1,0} all-gather(%p), channel_id=17, replica_groups={{0,1,2,3}}, dimensions={0}
}

%piece (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  %work = f32[8]{0} convolution(%p, %p)
  ROOT %g = bf16[8,8]{1,0} all-gather(%p), channel_id=17, replica_groups={{0,1,2,3}}, dimensions={0}
}

%last (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %g = bf16[8,8]{1,0} all-gather(%p), channel_id=17, replica_groups={{0,1,2,3}}, dimensions={0}
}

%tile (p: (bf16[2,8])) -> (bf16[2,8]) {
  %p = (bf16[2,8]{1,0}) parameter(0)
  %fusion.1 = bf16[8,8]{1,0} fusion(%p), kind=kOutput, calls=%piece
  ROOT %t = (bf16[2,8]{1,0}) tuple(%p)
}

%layer (p: (bf16[2,8])) -> (bf16[2,8]) {
  %p = (bf16[2,8]{1,0}) parameter(0)
  %async-collective-start.3 = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%p), kind=kCustom, calls=%first
  %tiles = (bf16[2,8]{1,0}) while(%p), condition=%c, body=%tile, backend_config={"known_trip_count":{"n":"5"}}
  %async-collective-done.3 = bf16[8,8]{1,0} fusion(%tiles), kind=kCustom, calls=%last
  %async-collective-start.4 = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%p), kind=kCustom, calls=%first
  %async-collective-done.4 = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%last
  ROOT %t = (bf16[2,8]{1,0}) tuple(%p)
}

ENTRY %main (x: bf16[2,8]) -> bf16[2,8] {
  %x = (bf16[2,8]{1,0}) parameter(0)
  %layers = (bf16[2,8]{1,0}) while(%x), condition=%c, body=%layer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %o = bf16[2,8]{1,0} get-tuple-element(%layers), index=0
}
"""  # noqa: E501


def test_an_exchange_in_pieces_is_one():
  """However many pieces, however deep; hidden if there is work meanwhile."""
  found = traffic.exchanges(PIECES)
  assert [(x.kind, x.sent, x.times, x.hidden) for x in found] == [
    ('all-gather', 96, 3, True),
    ('all-gather', 96, 3, False),
  ]


def test_several_arrays_at_once():
  found = traffic.exchanges(JOINED)
  assert [(x.sent, x.times) for x in found] == [(48, 7), (32, 7)]


def test_what_is_hidden():
  found = traffic.exchanges(TEXT)
  assert [(x.sent, x.times, x.hidden) for x in found] == [
    (32, 7, True),
    (32, 7, False),
  ]
  assert traffic.total(found) == 2 * 32 * 7
  assert traffic.total(found, hidden=True) == 32 * 7
