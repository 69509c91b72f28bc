"""Sigmoid attention: no key competes with another.

Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid
Self-Attention", https://arxiv.org/abs/2409.04431.

    o_t = sum_s sigmoid(q_t . k_s / sqrt(d) + b) v_s      per head
    y_t = concat_h(o_t) W_o

The offset b = -log(n) makes the weights add up to about one at the start. n is
the number of keys: here those that the token may see, t + 1, so that a stream
may be cut anywhere; a number fixes b.

Cost for one row: time O(t^2 d), state 2 t h d numbers, parameters 4 m h d.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import cached, sigmoid
from jaxattn.mixer import Mixer
from jaxattn.nn import Linear
from jaxattn.parallel import sequence
from jaxattn.registry import position
from jaxattn.spec import Spec
from jaxattn.state import FullKV
from pallas_kernels import masks


def reference(
  params, x, *, causal=True, offset=None, add=0, rotate=None, bias=0, **_
):
  """The formula on x 'b t m', all scores at once.

  A position encoding may add to x, rotate q and k, and bias the scores.
  """
  x = x + add
  q, k, v = (
    jnp.einsum('btm,mhd->bthd', x, params[name]['kernel'])
    for name in ('query', 'key', 'value')
  )
  if rotate is not None:
    q, k = rotate(q), rotate(k)
  t = jnp.arange(x.shape[1])
  b = -jnp.log(t[:, None] + 1.0) if offset is None else offset
  scores = jnp.einsum('bthd,bshd->bhts', q, k) * q.shape[-1] ** -0.5 + bias + b
  p = jax.nn.sigmoid(scores)
  if causal:
    p = p * (t[:, None] >= t)
  o = jnp.einsum('bhts,bshe->bthe', p, v)
  return jnp.einsum('bthe,hem->btm', o, params['out']['kernel'])


def attend(q, k, v, tokens, memory, score, *, offset, **rule):
  """The same in blocks, partial results added up."""
  if offset is None:
    offset = -jnp.log(tokens.order[..., None] + 1.0)
  return cached.attend(
    *(q, k, v, tokens, memory, score),
    engine=functools.partial(sequence.attention, engine=sigmoid.attention),
    offset=offset,
    **rule,
  )


class Sigmoid(Mixer):
  """Attention with a sigmoid in place of the softmax.

  Attributes:
    heads: h; it must divide the width unless `head_dim` is given.
    head_dim: d; None means width / heads.
    causal: False lets every token see every other; it wants an `offset`.
    offset: b, added to every score; None means -log of the keys in sight.
    position: the position encoding, 'rope' or {'name': 'rope', 'base': 5e5}.
  """

  heads: int = 4
  head_dim: int | None = None
  causal: bool = True
  offset: float | None = None
  position: str | Mapping[str, Any] = 'rope'

  strategies = sequence.FAR

  def check(self, width):
    if self.head_dim is None and width % self.heads:
      raise ValueError(
        f'sigmoid: width={width} does not divide by heads={self.heads}; '
        'choose another number of heads or give head_dim'
      )
    if not self.causal and self.offset is None:
      raise ValueError(
        'sigmoid: causal=False wants an offset, such as -log of the length: '
        'how many keys a token will see is not known'
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
    encoding = position(self.position, policy=self.policy, name='position')
    places = tokens.positions
    x = encoding.add(x, places)
    mask = masks.Causal() if self.causal else masks.Everything()
    o, memory = sequence.stream(
      lambda *arrays: attend(
        *arrays, mask=mask, offset=self.offset, strategy=self.policy.strategy
      ),
      encoding.rotate(project('query')(x), places),
      encoding.rotate(project('key')(x), places),
      project('value')(x),
      tokens,
      memory,
      weights=(encoding.score(self.heads, self.causal),),
    )
    return Linear(width, axes=2, policy=self.policy, name='out')(o), memory


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
  paper='Theory, Analysis, and Best Practices for Sigmoid Self-Attention',
  authors='Ramapuram et al.',
  year=2024,
  link='https://arxiv.org/abs/2409.04431',
  examples=(
    {'heads': 2},
    {'heads': 2, 'offset': -2.0, 'position': 'alibi'},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
)
