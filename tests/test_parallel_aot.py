"""Rings of chips that are not there: what they keep, and what they send when.

The compiled program tells both. Rings that are written wrongly are compiled
too, and the same assertions reject them.
"""

import functools
import re
import tracemalloc

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxattn.analysis import traffic
from jaxattn.parallel import ring, sequence
from pallas_kernels import chips, flash
from pallas_kernels.blocks import Blocks
from pallas_kernels.masks import Causal

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures('compiler')]
WHERE = jax.P(None, 'seq')
T, D = 2**14, 128  # tokens of a device: more than fit into its VMEM
FOUR_AND_SIXTEEN = {
  'v4': ('v4:2x2x1', 'v4:2x2x4'),
  'v5e': ('v5e:2x2', 'v5e:4x4'),
  'v5p': ('v5p:2x2x1', 'v5p:2x2x4'),
  'v6e': ('v6e:2x2', 'v6e:4x4'),
}
# What q, k, v, o and their gradients take, on one device, in bytes.
ARRAYS = 8 * T * D * 2


def attend(q, k, v, strategy='ring', **places):
  return sequence.attention(
    *(q, k, v),
    mask=Causal(),
    strategy=strategy,
    implementation='tpu',
    blocks=Blocks(256, 256),  # which are soon compiled
    **places,
  )


def zigzag(q, k, v):
  """Each device has a piece of the first half, and its mirror image."""
  here, n, half = lax.axis_index('seq'), lax.axis_size('seq'), q.shape[1] // 2
  pieces = [i * half + jnp.arange(half) for i in (here, 2 * n - 1 - here)]
  order = jnp.concatenate(pieces)
  return attend(q, k, v, query_order=order, key_order=order)


def lowered(topology, t=T, attend=attend, heads=1):
  """Attention and its gradient, `t` tokens a device."""
  devices = chips.devices(topology)
  mesh = jax.sharding.Mesh(devices, ('seq',))
  sharding = jax.NamedSharding(mesh, WHERE)
  shape = jax.ShapeDtypeStruct(
    (1, len(devices) * t, heads, D), jnp.bfloat16, sharding=sharding
  )

  def loss(*arrays):
    o = jax.shard_map(attend, in_specs=WHERE, out_specs=WHERE)(*arrays)
    return jnp.sum(o.astype(jnp.float32))

  with jax.set_mesh(mesh):
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*[shape] * 3)


@functools.cache
def compiled(topology):
  return lowered(topology).compile()


# Of how many key heads. A hybrid has groups of two devices, however many.
OTHERS = {
  'zigzag': (zigzag, 1),
  'hybrid': (functools.partial(attend, strategy='hybrid'), 2),
}


@functools.cache
def compiled_as(way, topology):
  attend, heads = OTHERS[way]
  return lowered(topology, attend=attend, heads=heads).compile()


# ------------------------------------------------------------------- memory law


def temporaries(program) -> int:
  """Bytes, on each device."""
  return program.memory_analysis().temp_size_in_bytes


def grows(*programs) -> bool:
  """Whether temporaries depend on how many devices there are."""
  sizes = [temporaries(program) for program in programs]
  return max(sizes) > 1.03 * min(sizes)


@pytest.mark.parametrize('chip', FOUR_AND_SIXTEEN)
def test_memory_does_not_grow_with_the_ring(chip):
  """At as many tokens a device; and it is what a few of its arrays take."""
  few, many = map(compiled, FOUR_AND_SIXTEEN[chip])
  assert not grows(few, many)
  assert temporaries(many) < 5 * ARRAYS


@pytest.mark.parametrize(
  ('way', 'topology'), [('zigzag', 'v5e:2x2'), ('hybrid', 'v5e:2x4')]
)
def test_memory_of_other_rings_does_not_grow(way, topology):
  """Of a hybrid: from a ring of four groups on."""
  few, many = (compiled_as(way, x) for x in (topology, 'v5e:4x4'))
  assert not grows(few, many)


def test_a_million_tokens():
  """Nothing has a side of queries and one of keys, nor on the host.

  Of 2**16 queries of a device and all keys it would take 2**36 bytes and more,
  if of bytes.
  """
  tracemalloc.start()
  try:
    program = lowered('v5e:4x4', 2**16)
    text = program.as_text()
    _, most = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert most < 2**26
  assert len(text) < 2**19  # no tables: it would hold them
  assert temporaries(program.compile()) < 5 * ARRAYS * 2**16 // T


# --------------------------------------------------------------------- schedule


def hidden(text: str) -> dict[str, list[bool]]:
  """By kernel: of what its loop sends, whether it is on its way meanwhile.

  Where tokens stand is sent too, in int32, and not counted: it is little.
  """
  found = {}
  for body in text.split('\n\n'):
    if not body.strip().startswith('%'):
      continue  # what is not in a loop
    lines = re.findall(r'^ +(?:ROOT )?%([\w.-]+) = (.*)', body, re.M)
    names = [name for name, _ in lines]
    kernels = [i for i, name in enumerate(names) if name.startswith('flash_')]
    for i in kernels:
      sent = [
        (at, names.index(name.replace('-start', '-done')))
        for at, (name, what) in enumerate(lines)
        if name.startswith('collective-permute-start') and 's32' not in what[:5]
      ]
      if sent:
        kernel = names[i].partition('.')[0]
        found[kernel] = [start < i < done for start, done in sent]
  return found


@pytest.mark.parametrize('chip', [*FOUR_AND_SIXTEEN, 'tpu7x'])
def test_what_is_sent_is_hidden(chip):
  """Keys and values; and gradients of both, backward."""
  *_, topology = FOUR_AND_SIXTEEN.get(chip, ['tpu7x:2x2x1'])
  assert hidden(compiled(topology).as_text()) == {
    'flash_forward': [True] * 2,
    'flash_backward': [True] * 4,
  }


@pytest.mark.parametrize('topology', ['v5e:4x4', 'v6e:4x4'])
@pytest.mark.parametrize('way', OTHERS)
def test_what_other_rings_send_is_hidden(topology, way):
  """Also where data decide how far it goes, and between groups."""
  assert hidden(compiled_as(way, topology).as_text()) == {
    'flash_forward': [True] * 2,
    'flash_backward': [True] * 4,
  }


@pytest.mark.parametrize('chip', FOUR_AND_SIXTEEN)
def test_what_becomes_of_a_reduce_scatter(chip):
  """Twice the bytes, of a program that is nothing else.

  If this fails the compiler has become better: what CONTRIBUTING.md says of
  weights and their gradients is then to be written anew.
  """
  devices = chips.devices(FOUR_AND_SIXTEEN[chip][1])
  mesh = jax.sharding.Mesh(devices, ('seq',))
  where = jax.P('seq')
  shape = jax.ShapeDtypeStruct(
    (len(devices), 4096, 4096),
    jnp.float32,
    sharding=jax.NamedSharding(mesh, where),
  )
  scatter = lambda x: lax.psum_scatter(x[0], 'seq', tiled=True)
  with jax.set_mesh(mesh):
    run = jax.shard_map(scatter, in_specs=where, out_specs=where)
    text = jax.jit(run).lower(shape).compile().as_text()
  assert [x.kind for x in traffic.exchanges(text)] == ['all-reduce']


# ------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize('compiler', ['h200'], indirect=True)
@pytest.mark.parametrize('implementation', ['gpu', 'xla'])
def test_eight_gpus(implementation):
  """Both laws. What is sent at the end, the gradients home, nothing hides."""

  def attend(q, k, v):
    return sequence.attention(
      *(q, k, v),
      mask=Causal(),
      strategy='ring',
      implementation=implementation,
    )

  two, four, eight = (
    lowered(f'h200:{n}', attend=attend).compile() for n in (2, 4, 8)
  )
  assert not grows(four, eight)
  assert temporaries(two) <= temporaries(four)  # no room for a second hop
  assert temporaries(eight) < 5 * ARRAYS
  found = traffic.exchanges(eight.as_text())
  hops = [x for x in found if x.times == 7]
  # Keys and values forward and backward; their gradients, in float32.
  assert traffic.total(hops) >= 7 * T * D * (2 * 2 + 2 * 2 + 2 * 4)
  assert all(x.hidden for x in hops)


@pytest.mark.parametrize('compiler', ['h200'], indirect=True)
def test_what_cannot_be_compiled_for_is_said(monkeypatch):
  for wrong in ('h200:0', 'h200:2x4'):
    with pytest.raises(ValueError, match="so many of one machine, as 'h200:8'"):
      chips.devices(wrong)
  monkeypatch.setattr(chips, '_ptxas', lambda: False)
  with pytest.raises(ModuleNotFoundError, match='there is no ptxas'):
    chips.devices('h200:3')


# ------------------------------------------------------------------ wrong rings


def test_a_ring_that_computes_before_it_sends_is_rejected(monkeypatch):
  def in_turn(ring, visit, merge, opened, carry, block, hops):
    def step(hop, state):
      carry, block = state
      more = visit(hop, block)
      block, more = lax.optimization_barrier((block, more))
      return merge(carry, opened(*more)), ring.shift(block)

    carry, block = lax.fori_loop(0, hops, step, (carry, block))
    return merge(carry, opened(*visit(hops, block)))

  monkeypatch.setattr(ring, '_fold', in_turn)
  program = lowered('v5e:2x2').compile()
  assert hidden(program.as_text())['flash_forward'] == [False] * 2


def test_a_ring_that_jax_differentiates_is_rejected():
  """It keeps the keys and the partial result of every hop for the gradient."""

  def attend(q, k, v):
    way = ring.Ring('seq')
    here, own = way.owner(0) * T, jnp.arange(T)

    def step(state, hop):
      partial, *block = state
      coming = way.shift(block)
      more = flash.attention(
        *(q, *block),
        mask=Causal(),
        query_order=here + own,
        key_order=way.owner(hop) * T + own,
        return_partial=True,
        implementation='plain',
      )
      return (flash.merge(partial, more), *coming), None

    state = flash.partial.nothing(q, v), k, v
    (partial, *_), _ = lax.scan(step, state, jnp.arange(way.size))
    return flash.finish(partial)[0].astype(q.dtype)

  few, many = (
    lowered(topology, attend=attend).compile()
    for topology in FOUR_AND_SIXTEEN['v5e']
  )
  assert grows(few, many)


def test_a_ring_in_a_row_is_rejected(monkeypatch):
  """Hops one after the other, which nothing ties to what is computed.

  The compiler sees that backward the same keys come by as forward, and rather
  than send them twice it keeps all of them.
  """

  def fold(ring, visit, merge, opened, carry, block, hops):
    for hop in range(hops):
      carry = merge(carry, opened(*visit(hop, block)))
      block = ring.shift(block)
    return merge(carry, opened(*visit(hops, block)))

  def fold_back(ring, visit, block, hops):
    stays, goes = visit(0, block)
    for hop in range(1, hops + 1):
      goes, block = ring.shift((goes, block))
      more = visit(hop, block)
      stays, goes = jax.tree.map(jnp.add, (stays, goes), more)
    return stays, ring.shift(goes, -hops)

  monkeypatch.setattr(ring, '_fold', fold)
  monkeypatch.setattr(ring, '_fold_back', fold_back)
  few, many = (
    lowered(topology).compile() for topology in FOUR_AND_SIXTEEN['v5e']
  )
  assert grows(few, many)
