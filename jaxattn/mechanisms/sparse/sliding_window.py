"""Sliding-window attention, with attention sinks.

Beltagy et al. 2020, "Longformer", https://arxiv.org/abs/2004.05150; sinks: Xiao
et al. 2023, "Efficient Streaming Language Models with Attention Sinks",
https://arxiv.org/abs/2309.17453.

    o_t = sum_{s in N(t)} softmax_s(q_t . k_s / sqrt(d)) v_s
    N(t) = {s : t - w < s <= t} and the first `sinks` tokens of the segment

Places are the tokens' own (not, as in StreamingLLM, places in the cache), so
that decoding equals the full pass.

Cost for one row: time O(t (w + sinks) d), state 2 (w + sinks) h d numbers,
parameters 4 m h d.
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
from jaxattn.state import RollingKV
from pallas_kernels import masks


def reference(params, x, *, window, sinks=0, add=0, rotate=None, bias=0, **_):
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
  t, s = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[1])[None, :]
  near = (s <= t) & ((t - s < window) | (s < sinks))
  scores = jnp.einsum('bthd,bshd->bhts', q, k) * q.shape[-1] ** -0.5 + bias
  scores = jnp.where(near, scores, -jnp.inf)
  o = jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(scores), v)
  return jnp.einsum('bthe,hem->btm', o, params['out']['kernel'])


def attend(q, k, v, tokens, memory, score, **rule):
  """The same in blocks: tiles outside the window are never touched."""
  return cached.attend(
    *(q, k, v, tokens, memory, score), engine=sequence.attention, **rule
  )


class SlidingWindow(Mixer):
  """Causal softmax attention to the last `window` tokens.

  Attributes:
    window: w, how many tokens a query sees, itself included.
    sinks: how many first tokens of its segment it sees besides.
    heads: h; it must divide the width unless `head_dim` is given.
    head_dim: d; None means width / heads.
    position: the position encoding, 'rope' or {'name': 'rope', 'base': 5e5}.
  """

  window: int = 128
  sinks: int = 0
  heads: int = 4
  head_dim: int | None = None
  position: str | Mapping[str, Any] = 'rope'

  implementations = softmax.IMPLEMENTATIONS
  strategies = tuple(sequence.STRATEGIES)

  def check(self, width):
    if self.head_dim is None and width % self.heads:
      raise ValueError(
        f'sliding_window: width={width} does not divide by heads={self.heads}; '
        'choose another number of heads or give head_dim'
      )
    if self.window < 1 or self.sinks < 0:
      raise ValueError(
        f'sliding_window: window={self.window} must be at least 1 and '
        f'sinks={self.sinks} at least 0'
      )
    head_dim = self.head_dim or width // self.heads
    position(self.position, parent=None).check(head_dim)

  def memory(self, batch, length, width, dtype):
    d = self.head_dim or width // self.heads
    keeps = position(self.position, parent=None).scores
    return RollingKV.empty(
      batch, self.window, self.sinks, self.heads, d, d, dtype, keeps
    )

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    split = (self.heads, self.head_dim or width // self.heads)
    project = lambda name: Linear(split, policy=self.policy, name=name)
    encoding = position(self.position, policy=self.policy, name='position')
    places = tokens.positions
    x = encoding.add(x, places)
    mask = masks.Window(self.window)
    if self.sinks:
      mask = mask | masks.Sinks(self.sinks)
    mask = masks.Causal() & mask
    o, memory = sequence.stream(
      lambda *arrays: attend(*arrays, mask=mask, **self.policy.attention),
      encoding.rotate(project('query')(x), places),
      encoding.rotate(project('key')(x), places),
      project('value')(x),
      tokens,
      memory,
      weights=(encoding.score(self.heads, causal=True),),
    )
    return Linear(width, axes=2, policy=self.policy, name='out')(o), memory


def _flops(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  seen = min(mixer.window + mixer.sinks, length)
  pairs = length * seen - seen * (seen - 1) // 2  # the first rows see fewer
  return 2 * length * 4 * width * inner + 2 * pairs * 2 * inner


def _state_bytes(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  number = jnp.dtype(mixer.policy.dtype).itemsize
  slots = mixer.window + mixer.sinks
  # order, segment and perhaps position
  places = 2 + position(mixer.position, parent=None).scores
  return slots * (2 * inner * number + 4 * places) + 4  # used


SPEC = Spec(
  paper='Longformer: The Long-Document Transformer',
  authors='Beltagy, Peters, Cohan',
  year=2020,
  link='https://arxiv.org/abs/2004.05150',
  examples=(
    {'heads': 2, 'window': 3, 'position': 'none'},
    {'heads': 2, 'window': 4, 'sinks': 2, 'position': 'rope'},
    {'heads': 2, 'window': 5, 'sinks': 1, 'position': 'alibi'},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
  near=True,
)
