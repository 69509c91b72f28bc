"""Grouped-query attention; with one key head it is multi-query attention.

Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models
from Multi-Head Checkpoints", https://arxiv.org/abs/2305.13245; one key head:
Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need",
https://arxiv.org/abs/1911.02150.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s      per query head,
    k and v being those of the group: query head i reads key head i // g

Cost for one row: time O(t^2 d) per query head, state 2 t k d numbers for k key
heads, parameters 2 m h d + 2 m k d.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import cached, softmax
from jaxattn.mixer import Mixer
from jaxattn.nn import Linear
from jaxattn.parallel import sequence
from jaxattn.registry import position
from jaxattn.spec import Spec
from jaxattn.state import FullKV
from pallas_kernels import masks


def reference(params, x, *, causal=True, add=0, rotate=None, bias=0, **_):
  """The formula on x 'b t m': key heads repeated, all scores at once.

  A position encoding may add to x, rotate q and k, and bias the scores.
  """
  x = x + add
  q, k, v = (
    jnp.einsum('btm,mhd->bthd', x, params[name]['kernel'])
    for name in ('query', 'key', 'value')
  )
  if rotate is not None:
    q, k = rotate(q), rotate(k)
  k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
  scores = jnp.einsum('bthd,bshd->bhts', q, k) * q.shape[-1] ** -0.5 + bias
  if causal:
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
  o = jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(scores), v)
  return jnp.einsum('bthe,hem->btm', o, params['out']['kernel'])


def attend(q, k, v, tokens, memory, score, **rule):
  """The same in blocks, key heads never repeated."""
  return cached.attend(
    *(q, k, v, tokens, memory, score), engine=sequence.attention, **rule
  )


def from_multi_head(params, kv_heads: int):
  """Parameters of `multi_head` as those of `grouped_query` (uptraining).

  The key and value heads of a group become their mean (section 2.1).

  Raises:
    ValueError: the heads do not divide into `kv_heads` groups.
  """
  heads = params['key']['kernel'].shape[1]
  if heads % kv_heads:
    raise ValueError(f'{heads} heads do not divide into kv_heads={kv_heads}')

  def mean(kernel):
    m, h, d = kernel.shape
    return kernel.reshape(m, kv_heads, h // kv_heads, d).mean(axis=2)

  own = {name: {'kernel': mean(params[name]['kernel'])} for name in _SHARED}
  return {**params, **own}


_SHARED = ('key', 'value')


class GroupedQuery(Mixer):
  """Softmax attention whose query heads share fewer key and value heads.

  Attributes:
    heads: h; it must divide the width unless `head_dim` is given.
    kv_heads: k; it must divide `heads`. 1 is multi-query attention.
    head_dim: d; None means width / heads.
    causal: False lets every token see every other (encoders).
    position: the position encoding, 'rope' or {'name': 'rope', 'base': 5e5}.
  """

  heads: int = 4
  kv_heads: int = 2
  head_dim: int | None = None
  causal: bool = True
  position: str | Mapping[str, Any] = 'rope'

  implementations = softmax.IMPLEMENTATIONS
  strategies = sequence.FAR

  def check(self, width):
    if self.head_dim is None and width % self.heads:
      raise ValueError(
        f'grouped_query: width={width} does not divide by heads={self.heads}; '
        'choose another number of heads or give head_dim'
      )
    if self.kv_heads < 1 or self.heads % self.kv_heads:
      raise ValueError(
        f'grouped_query: heads={self.heads} do not divide by '
        f'kv_heads={self.kv_heads}'
      )
    head_dim = self.head_dim or width // self.heads
    position(self.position, parent=None).check(head_dim)

  def memory(self, batch, length, width, dtype):
    d = self.head_dim or width // self.heads
    keeps = position(self.position, parent=None).scores
    return FullKV.empty(batch, length, self.kv_heads, d, d, dtype, keeps)

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    d = self.head_dim or width // self.heads
    project = lambda heads, name: Linear(
      (heads, d), policy=self.policy, name=name
    )
    encoding = position(self.position, policy=self.policy, name='position')
    places = tokens.positions
    x = encoding.add(x, places)
    mask = masks.Causal() if self.causal else masks.Everything()
    o, memory = sequence.stream(
      lambda *arrays: attend(*arrays, mask=mask, **self.policy.attention),
      encoding.rotate(project(self.heads, 'query')(x), places),
      encoding.rotate(project(self.kv_heads, 'key')(x), places),
      project(self.kv_heads, 'value')(x),
      tokens,
      memory,
      weights=(encoding.score(self.heads, self.causal),),
    )
    return Linear(width, axes=2, policy=self.policy, name='out')(o), memory


def _flops(mixer, width, length):
  d = mixer.head_dim or width // mixer.heads
  pairs = length * (length + 1) // 2 if mixer.causal else length**2
  projections = 2 * width * d * (mixer.heads + mixer.kv_heads)
  return 2 * length * projections + 2 * pairs * 2 * mixer.heads * d


def _state_bytes(mixer, width, length):
  d = mixer.head_dim or width // mixer.heads
  number = jnp.dtype(mixer.policy.dtype).itemsize
  # order, segment and perhaps position
  places = 2 + position(mixer.position, parent=None).scores
  return length * (2 * mixer.kv_heads * d * number + 4 * places) + 4  # used


SPEC = Spec(
  paper=(
    'GQA: Training Generalized Multi-Query Transformer Models from Multi-Head '
    'Checkpoints'
  ),
  authors='Ainslie, Lee-Thorp, de Jong, Zemlyanskiy, Lebron, Sanghai',
  year=2023,
  link='https://arxiv.org/abs/2305.13245',
  examples=(
    {
      'heads': 4,
      'kv_heads': 2,
      'position': {'name': 'learned', 'length': 65},
    },
    {'heads': 3, 'kv_heads': 1, 'position': 'sinusoidal'},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
)
