"""A ring of TPUs that are not there: what it sends is hidden behind kernels."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxattn.parallel import ring, sequence
from pallas_kernels import chips
from pallas_kernels.masks import Causal

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures('compiler')]
WHERE = jax.P(None, 'seq')


def compiled(chip, t=8192):
  """The text of a program: attention and its gradient, `t` tokens a chip."""
  mesh = chips.mesh(chip, 4, 'seq')
  sharding = jax.NamedSharding(mesh, WHERE)
  shape = jax.ShapeDtypeStruct(
    (1, 4 * t, 2, 128), jnp.bfloat16, sharding=sharding
  )

  def attend(q, k, v):
    return sequence.attention(
      *(q, k, v), mask=Causal(), strategy='ring', implementation='tpu'
    )

  def loss(*arrays):
    o = jax.shard_map(attend, in_specs=WHERE, out_specs=WHERE)(*arrays)
    return jnp.sum(o.astype(jnp.float32))

  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*[shape] * 3)
  return lowered.compile().as_text()


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


@pytest.mark.parametrize('chip', ['v4', 'v5e', 'tpu7x'])
def test_what_is_sent_is_hidden(chip):
  """Keys and values; and gradients of both, backward.

  On v5p and v6e it is so backward; forward their compiler takes the transposing
  of what a kernel leaves to be enough to hide behind, and sends after it.
  """
  assert hidden(compiled(chip)) == {
    'flash_forward': [True] * 2,
    'flash_backward': [True] * 4,
  }


def test_a_ring_that_computes_before_it_sends_is_rejected(monkeypatch):
  def in_turn(ring, visit, merge, carry, block, hops):
    def step(hop, state):
      carry, block = state
      more = visit(hop, block)
      block, more = jax.lax.optimization_barrier((block, more))
      return merge(carry, more), ring.shift(block)

    carry, block = jax.lax.fori_loop(0, hops, step, (carry, block))
    return merge(carry, visit(hops, block))

  monkeypatch.setattr(ring, '_fold', in_turn)
  assert hidden(compiled('v5e'))['flash_forward'] == [False] * 2
