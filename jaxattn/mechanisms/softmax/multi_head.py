"""Multi-head attention.

Vaswani et al. 2017, "Attention Is All You Need",
https://arxiv.org/abs/1706.03762.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s      per head
    y_t = concat_h(o_t) W_o

Causal by default (s <= t); with `causal=False` every token sees every other;
with a `context` the keys and values are the context's (cross attention).

Cost for one row: time O(t^2 d), state 2 t h d numbers, parameters 4 m h d.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import cached, softmax
from jaxattn.mixer import ContextKV, Mixer
from jaxattn.nn import Linear
from jaxattn.packing import resolve
from jaxattn.parallel import sequence
from jaxattn.registry import position
from jaxattn.spec import Spec
from jaxattn.state import FullKV
from pallas_kernels import masks


def reference(
  params, x, *, causal=True, context=None, add=0, rotate=None, bias=0, **_
):
  """The formula on x 'b t m', all scores at once.

  A position encoding may add to x, rotate q and k, and bias the scores.
  """
  x = x + add
  project = lambda x, name: jnp.einsum(
    'btm,mhd->bthd', x, params[name]['kernel']
  )
  source = x if context is None else context
  q, k, v = (
    project(x, 'query'),
    project(source, 'key'),
    project(source, 'value'),
  )
  if rotate is not None:
    q, k = rotate(q), rotate(k)
  scores = jnp.einsum('bthd,bshd->bhts', q, k) * q.shape[-1] ** -0.5 + bias
  if causal and context is None:
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
  o = jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(scores), v)
  return jnp.einsum('bthe,hem->btm', o, params['out']['kernel'])


def attend(q, k, v, tokens, memory, score, **rule):
  """The same in blocks; keys come from the memory once it holds this chunk."""
  return cached.attend(
    *(q, k, v, tokens, memory, score), engine=sequence.attention, **rule
  )


def attend_context(q, tokens, context, **rule):
  """Cross attention: every context token of the query's own segment."""
  return sequence.attention(
    q,
    context.keys,
    context.values,
    mask=masks.Everything(),
    query_segments=tokens.segments,
    key_segments=context.segments,
    **rule,
  )


class MultiHead(Mixer):
  """Softmax attention with `heads` heads.

  Attributes:
    heads: h; it must divide the width unless `head_dim` is given.
    head_dim: d; None means width / heads.
    causal: False lets every token see every other (encoders).
    position: the position encoding, 'rope' or {'name': 'rope', 'base': 5e5};
      cross attention has none.
  """

  heads: int = 4
  head_dim: int | None = None
  causal: bool = True
  position: str | Mapping[str, Any] = 'rope'

  reads_context = True
  implementations = softmax.IMPLEMENTATIONS
  strategies = sequence.FAR

  def check(self, width):
    if self.head_dim is None and width % self.heads:
      raise ValueError(
        f'multi_head: width={width} does not divide by heads={self.heads}; '
        'choose another number of heads or give head_dim'
      )
    head_dim = self.head_dim or width // self.heads
    position(self.position, parent=None).check(head_dim)

  def memory(self, batch, length, width, dtype):
    d = self.head_dim or width // self.heads
    keeps = position(self.position, parent=None).scores
    return FullKV.empty(batch, length, self.heads, d, d, dtype, keeps)

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    split = (self.heads, self.head_dim or width // self.heads)
    project = lambda name: Linear(split, policy=self.policy, name=name)
    query, key, value = (project(name) for name in ('query', 'key', 'value'))
    out = Linear(width, axes=2, policy=self.policy, name='out')

    if context is None and isinstance(memory, ContextKV):
      context = memory
    if context is not None:
      if not isinstance(context, ContextKV):
        batch, length, _ = context.x.shape
        places = resolve(context.packing, None, batch, length)
        read = jnp.where((places.segments > 0)[..., None], context.x, 0)
        read = read.astype(x.dtype)
        context = ContextKV(key(read), value(read), places.segments)
      o = sequence.run(
        functools.partial(attend_context, **self.policy.attention),
        query(x),
        tokens,
        context,
      )
      return out(o), context

    encoding = position(self.position, policy=self.policy, name='position')
    places = tokens.positions
    x = encoding.add(x, places)
    mask = masks.Causal() if self.causal else masks.Everything()
    o, memory = sequence.stream(
      lambda *arrays: attend(*arrays, mask=mask, **self.policy.attention),
      encoding.rotate(query(x), places),
      encoding.rotate(key(x), places),
      value(x),
      tokens,
      memory,
      weights=(encoding.score(self.heads, self.causal),),
    )
    return out(o), memory


def _flops(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  pairs = length * (length + 1) // 2 if mixer.causal else length**2
  return 2 * length * 4 * width * inner + 2 * pairs * 2 * inner


def _state_bytes(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  number = jnp.dtype(mixer.policy.dtype).itemsize
  # order, segment and perhaps position
  places = 2 + position(mixer.position, parent=None).scores
  return length * (2 * inner * number + 4 * places) + 4  # used


SPEC = Spec(
  paper='Attention Is All You Need',
  authors='Vaswani et al.',
  year=2017,
  link='https://arxiv.org/abs/1706.03762',
  examples=(
    {'heads': 2, 'position': 'none'},
    {'heads': 2, 'head_dim': 6, 'position': 'rope'},
    {'heads': 2, 'position': {'name': 't5', 'buckets': 6, 'furthest': 9}},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
  cross=True,
)
