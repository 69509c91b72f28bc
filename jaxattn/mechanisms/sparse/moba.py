"""MoBA: mixture of block attention.

Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs",
https://arxiv.org/abs/2502.13189.

    fit_tj = q_t . mean_{s in block j} k_s               per head
    C(t) = the top_k blocks of largest fit among those before t's own
    o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s
          over s <= t in t's own block, and all s in C(t)

The gate has no parameters and no gradient: keys learn through the attention
that follows. (The paper counts the query's own block as one of its top k; here
it comes besides.) With top_k >= all blocks it is plain causal attention.

Cost for one row: time O(t top_k block d + t^2 d / block), state 2 t h d
numbers, parameters 4 m h d.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import select, softmax
from jaxattn.mixer import Mixer
from jaxattn.nn import Linear
from jaxattn.parallel import sequence
from jaxattn.registry import position
from jaxattn.spec import Spec
from jaxattn.state import FullKV
from pallas_kernels import masks


def _visible(q, k, block, top_k):
  """Who sees whom, 'b h t s', and how clear each choice is, 'b t'."""
  length = q.shape[1]
  t, s = jnp.arange(length)[:, None], jnp.arange(length)
  own = t // block == s // block
  count = length // block
  visible = jnp.broadcast_to(own, (q.shape[0], q.shape[2], length, length))
  margin = jnp.full(q.shape[:2], jnp.inf)
  if count:
    mean = k[:, : count * block].reshape(k.shape[0], count, block, *k.shape[2:])
    fit = jnp.einsum('bthd,bjhd->bhtj', q, mean.mean(axis=2))
    fit = jnp.where(jnp.arange(count) < t // block, fit, -jnp.inf)
    ranked = jnp.sort(fit, axis=-1)[..., ::-1]
    last = ranked[..., min(top_k, count) - 1 : min(top_k, count)]
    chosen = (fit >= last) & (fit > -jnp.inf)
    visible = visible | (
      jnp.repeat(chosen, block, -1)[..., s] & (s < count * block)
    )
    if top_k < count:
      after = ranked[..., top_k : top_k + 1]
      clear = jnp.where(after > -jnp.inf, last - after, jnp.inf)
      margin = jnp.min(clear[..., 0], axis=1)
  return visible & (s <= t), margin


def _heads(params, x, rotate, add):
  q, k, v = (
    jnp.einsum('btm,mhd->bthd', x + add, params[name]['kernel'])
    for name in ('query', 'key', 'value')
  )
  return (q, k, v) if rotate is None else (rotate(q), rotate(k), v)


def reference(params, x, *, block, top_k, add=0, rotate=None, bias=0, **_):
  """The formula on x 'b t m' with a dense mask.

  A position encoding may add to x, rotate q and k, and bias the scores.
  """
  q, k, v = _heads(params, x, rotate, add)
  visible, _ = _visible(q, k, block, top_k)
  scores = jnp.einsum('bthd,bshd->bhts', q, k) * q.shape[-1] ** -0.5 + bias
  scores = jnp.where(visible, scores, -jnp.inf)
  o = jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(scores), v)
  return jnp.einsum('bthe,hem->btm', o, params['out']['kernel'])


def margin(params, x, *, block, top_k, add=0, rotate=None, **_):
  """How clear each token's closest choice is, 'b t': the fit of the last block
  taken over that of the first one left out."""
  q, k, _ = _heads(params, x, rotate, add)
  return _visible(q, k, block, top_k)[1]


def attend(q, k, v, tokens, memory, *, block, top_k, implementation):
  """The same without the mask: a query's own block, then those it chooses."""
  keys, values, order, segments = sequence.everywhere(
    (k, v, tokens.order, tokens.segments)
  )
  if memory is not None:
    (keys, values, order, segments, _), memory = memory.read(k, v, tokens)
  own = softmax.attention(
    q,
    keys,
    values,
    mask=masks.Causal() & select.SameBlock(block),
    implementation=implementation,
    query_order=tokens.order,
    key_order=order,
    query_segments=tokens.segments,
    key_segments=segments,
    return_partial=True,
  )
  blocks = select.complete_blocks(keys, values, order, segments, block)
  chosen = select.attend_chosen(
    q, blocks, tokens.order, tokens.segments, size=block, chosen=top_k
  )
  o, _ = softmax.finish(softmax.merge(own, chosen))
  return o.astype(q.dtype), memory


class Moba(Mixer):
  """Causal softmax attention to the own block and the best of those before.

  Attributes:
    block: tokens a block.
    top_k: how many earlier blocks a query reads.
    heads: h; it must divide the width unless `head_dim` is given.
    head_dim: d; None means width / heads.
    position: an encoding that adds or rotates, 'rope' or {'name': 'rope', ...}.
  """

  block: int = 64
  top_k: int = 2
  heads: int = 4
  head_dim: int | None = None
  position: str | Mapping[str, Any] = 'rope'

  implementations = softmax.IMPLEMENTATIONS

  def check(self, width):
    if self.head_dim is None and width % self.heads:
      raise ValueError(
        f'moba: width={width} does not divide by heads={self.heads}; '
        'choose another number of heads or give head_dim'
      )
    if self.block < 1 or self.top_k < 0:
      raise ValueError(
        f'moba: block={self.block} must be at least 1 and top_k={self.top_k} '
        'at least 0'
      )
    encoding = position(self.position, parent=None)
    encoding.check(self.head_dim or width // self.heads)
    if encoding.scores:
      raise ValueError(
        f'moba: position={self.position!r} biases scores, but blocks are '
        "chosen by keys alone; take one that rotates or adds, such as 'rope'"
      )

  def memory(self, batch, length, width, dtype):
    d = self.head_dim or width // self.heads
    return FullKV.empty(batch, length, self.heads, d, d, dtype)

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    split = (self.heads, self.head_dim or width // self.heads)
    project = lambda name: Linear(split, policy=self.policy, name=name)
    encoding = position(self.position, policy=self.policy, name='position')
    places = tokens.positions
    x = encoding.add(x, places)
    o, memory = sequence.stream(
      lambda *arrays: attend(
        *arrays,
        block=self.block,
        top_k=self.top_k,
        implementation=self.policy.implementation,
      ),
      encoding.rotate(project('query')(x), places),
      encoding.rotate(project('key')(x), places),
      project('value')(x),
      tokens,
      memory,
    )
    return Linear(width, axes=2, policy=self.policy, name='out')(o), memory


def _flops(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  full, rest = divmod(length, mixer.block)
  triangle = lambda n: n * (n + 1) // 2
  pairs = full * triangle(mixer.block) + triangle(rest)  # own block
  taken = sum(
    min(i, mixer.top_k) * (mixer.block if i < full else rest)
    for i in range(full + 1)
  )
  pairs += taken * mixer.block
  fits = length * full * inner
  return 2 * length * 4 * width * inner + 2 * pairs * 2 * inner + 2 * fits


def _state_bytes(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  number = jnp.dtype(mixer.policy.dtype).itemsize
  return length * (2 * inner * number + 2 * 4) + 4  # order, segment; used


SPEC = Spec(
  paper='MoBA: Mixture of Block Attention for Long-Context LLMs',
  authors='Lu et al.',
  year=2025,
  link='https://arxiv.org/abs/2502.13189',
  examples=(
    {'heads': 2, 'block': 3, 'top_k': 1, 'position': 'none'},
    {'heads': 2, 'block': 2, 'top_k': 2, 'position': 'rope'},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
)
