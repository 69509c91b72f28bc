"""Multi-head attention.

Vaswani et al. 2017, "Attention Is All You Need",
https://arxiv.org/abs/1706.03762.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s      per head
    y_t = concat_h(o_t) W_o

Causal by default (s <= t); with `causal=False` every token sees every other;
with a `context` the keys and values are the context's (cross attention).

Cost for one row: time O(t^2 d), state 2 t h d numbers, parameters 4 m h d.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import masks, softmax
from jaxattn.mixer import ContextKV, Mixer
from jaxattn.nn import Linear
from jaxattn.packing import resolve
from jaxattn.parallel import sequence
from jaxattn.registry import position
from jaxattn.spec import Spec
from jaxattn.state import FullKV


def reference(params, x, *, causal=True, context=None, rotate=None, **_):
  """The formula on x 'b t m', all scores at once; `rotate` turns q and k."""
  project = lambda x, name: jnp.einsum(
    'btm,mhd->bthd', x, params[name]['kernel']
  )
  source = x if context is None else context
  q, k, v = (
    project(x, 'query'),
    project(source, 'key'),
    project(source, 'value'),
  )
  if rotate is not None and context is None:
    q, k = rotate(q), rotate(k)
  scores = jnp.einsum('bthd,bshd->bhts', q, k) * q.shape[-1] ** -0.5
  if causal and context is None:
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
  o = jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(scores), v)
  return jnp.einsum('bthe,hem->btm', o, params['out']['kernel'])


def attend(q, k, v, tokens, memory, *, mask):
  """The same in blocks; keys come from the memory once it holds this chunk."""
  if memory is None:
    segments = None if tokens.valid is None else tokens.segments
    o = softmax.attention(
      q,
      k,
      v,
      mask=mask,
      query_order=tokens.order,
      key_order=tokens.order,
      query_segments=segments,
      key_segments=segments,
    )
    return o, None
  memory = memory.extend(k, v, tokens)
  o = softmax.attention(
    q,
    memory.keys,
    memory.values,
    mask=mask,
    query_order=tokens.order,
    key_order=memory.order,
    query_segments=tokens.segments,
    key_segments=memory.segments,
  )
  return o, memory


def attend_context(q, tokens, context):
  """Cross attention: every context token of the query's own segment."""
  return softmax.attention(
    q,
    context.keys,
    context.values,
    query_segments=tokens.segments,
    key_segments=context.segments,
  )


class MultiHead(Mixer):
  """Softmax attention with `heads` heads.

  Attributes:
    heads: h; it must divide the width unless `head_dim` is given.
    head_dim: d; None means width / heads.
    causal: False lets every token see every other (encoders).
    position: name of the position encoding, such as 'rope' or 'none'; cross
      attention has none.
  """

  heads: int = 4
  head_dim: int | None = None
  causal: bool = True
  position: str = 'rope'

  reads_context = True

  def check(self, width):
    if self.head_dim is None and width % self.heads:
      raise ValueError(
        f'multi_head: width={width} does not divide by heads={self.heads}; '
        'choose another number of heads or give head_dim'
      )
    position(self.position)

  def memory(self, batch, length, width, dtype):
    d = self.head_dim or width // self.heads
    return FullKV.empty(batch, length, self.heads, d, d, dtype)

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    split = (self.heads, self.head_dim or width // self.heads)
    project = lambda name: Linear(split, policy=self.policy, name=name)
    q, key, value = project('query')(x), project('key'), project('value')
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
      return out(sequence.run(attend_context, q, tokens, context)), context

    rotate = position(self.position).rotate
    mask = masks.Causal() if self.causal else masks.Everything()
    o, memory = sequence.run(
      lambda *arrays: attend(*arrays, mask=mask),
      rotate(q, tokens.positions),
      rotate(key(x), tokens.positions),
      value(x),
      tokens,
      memory,
    )
    return out(o), memory


def _flops(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  pairs = length * (length + 1) // 2 if mixer.causal else length**2
  return 2 * length * 4 * width * inner + 2 * pairs * 2 * inner


def _state_bytes(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  number = jnp.dtype(mixer.policy.dtype).itemsize
  return length * (2 * inner * number + 2 * 4) + 4  # order, segment; used


SPEC = Spec(
  paper='Attention Is All You Need',
  authors='Vaswani et al.',
  year=2017,
  link='https://arxiv.org/abs/1706.03762',
  examples=(
    {'heads': 2, 'position': 'none'},
    {'heads': 2, 'head_dim': 6, 'position': 'rope'},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
  cross=True,
)
