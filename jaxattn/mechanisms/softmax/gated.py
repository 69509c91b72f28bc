"""Gated attention: a sigmoid gate that reads the query's own token.

Qiu et al. 2025, "Gated Attention for Large Language Models: Non-linearity,
Sparsity, and Attention-Sink-Free", https://arxiv.org/abs/2505.06708.

    g_t = sigmoid(x_t W_g)
    o_t = g_t * sum_s softmax_s(q_t . k_s / sqrt(d)) v_s      gate='output'

The paper compares five places for the gate: after attention (its G1, the best),
on values, keys or queries (G2 to G4), and after the output projection (G5).

Cost for one row: time O(t^2 d), state 2 t h d numbers, parameters 4 m h d and
those of the gate: m h d, one number for each channel, or m h, one for a head.
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
from jaxattn.registry import did_you_mean, position
from jaxattn.spec import Spec
from jaxattn.state import FullKV
from pallas_kernels import masks

GATES = ('output', 'value', 'key', 'query', 'dense')


def reference(
  params, x, *, gate='output', causal=True, add=0, rotate=None, bias=0, **_
):
  """The formula on x 'b t m', all scores at once.

  A position encoding may add to x, rotate q and k, and bias the scores.
  """
  x = x + add
  q, k, v = (
    jnp.einsum('btm,mhd->bthd', x, params[name]['kernel'])
    for name in ('query', 'key', 'value')
  )
  g = jnp.tensordot(x, params['gate']['kernel'], 1)  # 'b t h d', or 'b t m'
  g = 1 / (1 + jnp.exp(-g))
  q = q * g if gate == 'query' else q
  k = k * g if gate == 'key' else k
  v = v * g if gate == 'value' else v
  if rotate is not None:
    q, k = rotate(q), rotate(k)
  scores = jnp.einsum('bthd,bshd->bhts', q, k) * q.shape[-1] ** -0.5 + bias
  if causal:
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
  o = jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(scores), v)
  o = o * g if gate == 'output' else o
  y = jnp.einsum('bthe,hem->btm', o, params['out']['kernel'])
  return y * g if gate == 'dense' else y


def attend(q, k, v, tokens, memory, score, **rule):
  """The same in blocks. Gates are of a token, and stay outside."""
  return cached.attend(
    *(q, k, v, tokens, memory, score), engine=sequence.attention, **rule
  )


class Gated(Mixer):
  """Softmax attention with a sigmoid gate.

  Attributes:
    heads: h; it must divide the width unless `head_dim` is given.
    head_dim: d; None means width / heads.
    gate: what is gated: 'output' of attention, 'value', 'key', 'query', or
      'dense', the output of the last projection.
    elementwise: a gate for each channel; False has one for a whole head.
    shared: all heads have the same gate.
    causal: False lets every token see every other (encoders).
    position: the position encoding, 'rope' or {'name': 'rope', 'base': 5e5}.
  """

  heads: int = 4
  head_dim: int | None = None
  gate: str = 'output'
  elementwise: bool = True
  shared: bool = False
  causal: bool = True
  position: str | Mapping[str, Any] = 'rope'

  implementations = softmax.IMPLEMENTATIONS
  strategies = sequence.FAR

  def check(self, width):
    if self.head_dim is None and width % self.heads:
      raise ValueError(
        f'gated: width={width} does not divide by heads={self.heads}; '
        'choose another number of heads or give head_dim'
      )
    if self.gate not in GATES:
      raise ValueError(
        f'gated: no gate {self.gate!r}.{did_you_mean(self.gate, GATES)}'
      )
    if self.gate == 'dense' and self.shared:
      raise ValueError("gated: gate='dense' has no heads to be shared over")
    head_dim = self.head_dim or width // self.heads
    position(self.position, parent=None).check(head_dim)

  def memory(self, batch, length, width, dtype):
    d = self.head_dim or width // self.heads
    keeps = position(self.position, parent=None).scores
    return FullKV.empty(batch, length, self.heads, d, d, dtype, keeps)

  def gate_shape(self, width: int) -> tuple[int, ...]:
    """Gates of a token: they broadcast to what they gate."""
    if self.gate == 'dense':
      return (width if self.elementwise else 1,)
    d = self.head_dim or width // self.heads
    return (1 if self.shared else self.heads, d if self.elementwise else 1)

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    split = (self.heads, self.head_dim or width // self.heads)
    linear = lambda to, name, **kw: Linear(
      to, policy=self.policy, name=name, **kw
    )
    encoding = position(self.position, policy=self.policy, name='position')
    places = tokens.positions
    x = encoding.add(x, places)
    gate = jax.nn.sigmoid(linear(self.gate_shape(width), 'gate')(x))
    gated = lambda a, name: a * gate if self.gate == name else a
    q, k, v = (
      gated(linear(split, name)(x), name) for name in ('query', 'key', 'value')
    )
    mask = masks.Causal() if self.causal else masks.Everything()
    o, memory = sequence.stream(
      lambda *arrays: attend(*arrays, mask=mask, **self.policy.attention),
      encoding.rotate(q, places),
      encoding.rotate(k, places),
      v,
      tokens,
      memory,
      weights=(encoding.score(self.heads, self.causal),),
    )
    y = linear(width, 'out', axes=2)(gated(o, 'output'))
    return gated(y, 'dense'), memory


def _flops(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  gates = 1
  for size in mixer.gate_shape(width):
    gates *= size
  pairs = length * (length + 1) // 2 if mixer.causal else length**2
  projections = width * (4 * inner + gates)
  return 2 * length * projections + 2 * pairs * 2 * inner


def _state_bytes(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  number = jnp.dtype(mixer.policy.dtype).itemsize
  # order, segment and perhaps position
  places = 2 + position(mixer.position, parent=None).scores
  return length * (2 * inner * number + 4 * places) + 4  # used


SPEC = Spec(
  paper=(
    'Gated Attention for Large Language Models: Non-linearity, Sparsity, and '
    'Attention-Sink-Free'
  ),
  authors='Qiu et al.',
  year=2025,
  link='https://arxiv.org/abs/2505.06708',
  examples=(
    {'heads': 2},
    {'heads': 2, 'gate': 'value', 'elementwise': False},
    {'heads': 2, 'gate': 'key', 'shared': True, 'position': 'none'},
    {'heads': 2, 'gate': 'dense', 'position': 'none'},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
)
