"""Retention (RetNet): linear attention whose heads forget at fixed rates.

Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large
Language Models", https://arxiv.org/abs/2307.08621.

    S_t = g_h S_{t-1} + k_t v_t^T        o_t = S_t^T q_t / sqrt(d)
    q, k rotated by their positions; g_h = 1 - 2^(-5 - h) for heads h = 0, 1, ..
    y_t = (group_norm_h(o_t) * swish(x_t W_g)) W_o

The group norm takes mean and variance of each head and has no gain, as in the
authors' code; W_o has one. Of the paper's score normalisations only sqrt(d) is
kept: division by sqrt(sum_s g^(t - s)) and by max(|sum of scores|, 1) rescale a
head's whole output, which the group norm undoes.

Cost for one row: time O(t d e) per head, state h d e numbers whatever t,
parameters 8 m^2 with values twice as wide as keys.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core import rope
from jaxattn.mixer import Mixer
from jaxattn.nn import Linear
from jaxattn.parallel import prefix, sequence
from jaxattn.spec import Spec
from jaxattn.state import MatrixState

EPSILON = 1e-6


def reference(params, x, *, heads, shortest=32.0, longest=None, **_):
  """The formula on x 'b t m', all pairs at once."""
  q, k, v = (
    jnp.einsum('btm,mhd->bthd', x, params[name]['kernel'])
    for name in ('query', 'key', 'value')
  )
  t, d = x.shape[1], q.shape[-1]
  angles = jnp.arange(t)[:, None] * 10000.0 ** (-jnp.arange(0, d, 2) / d)
  turn = lambda a: (
    jnp.exp(1j * angles)[:, None] * (a[..., : d // 2] + 1j * a[..., d // 2 :])
  )
  scores = jnp.einsum('bthd,bshd->bhts', turn(q), turn(k).conj()).real
  ratio = 2.0 if longest is None else (longest / shortest) ** (1 / (heads - 1))
  decay = 1 - 1 / (shortest * ratio ** jnp.arange(heads))
  lag = jnp.arange(t)[:, None] - jnp.arange(t)
  kept = decay[:, None, None] ** jnp.maximum(lag, 0)
  scores = scores * jnp.where(lag >= 0, kept, 0) * d**-0.5
  o = jnp.einsum('bhts,bshe->bthe', scores, v)
  o = o - jnp.mean(o, axis=-1, keepdims=True)
  o = o / jnp.sqrt(jnp.mean(o**2, axis=-1, keepdims=True) + 1e-6)
  gate = jax.nn.swish(jnp.einsum('btm,mhe->bthe', x, params['gate']['kernel']))
  return jnp.einsum('bthe,hem->btm', gate * o, params['out']['kernel'])


def attend(q, k, v, tokens, memory, *, reach):
  """The same in chunks: 'b t h d' projections to 'b t h e', and the memory."""
  v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
  log_decay = jnp.asarray(np.log1p(-1 / reach), v.dtype)[:, None]
  o, state = prefix.gated(
    rope.rotate(q, tokens.positions) * q.shape[-1] ** -0.5,
    rope.rotate(k, tokens.positions),
    v,
    jnp.zeros_like(v[..., :1]) + log_decay,
    state=None if memory is None else memory.matrix,
    valid=tokens.valid,
    starts=tokens.starts,
  )
  return _group_norm(o), MatrixState(state)


def _group_norm(o):
  """Mean 0 and variance 1 over the width of each head, 'b t h e'."""
  o = o - jnp.mean(o, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(o), axis=-1, keepdims=True)
  return o * jax.lax.rsqrt(variance + EPSILON)


class Retention(Mixer):
  """Multi-scale retention.

  Attributes:
    heads: h; it must divide the width, and leave an even width to each.
    value_share: width of all values, as a share of the model width.
    shortest: 1 / (1 - g), in tokens, of the head that forgets fastest.
    longest: the same for the head that forgets slowest, the others between
      them in equal ratios; None doubles it from head to head, as the paper.
  """

  heads: int = 4
  value_share: float = 2.0
  shortest: float = 32.0
  longest: float | None = None

  strategies = ('prefix',)

  def reach(self) -> np.ndarray:
    """1 / (1 - g) of every head, in tokens."""
    if self.longest is None:
      return self.shortest * 2.0 ** np.arange(self.heads)
    return np.geomspace(self.shortest, self.longest, self.heads)

  def check(self, width):
    values = round(width * self.value_share)
    if width % self.heads or width // self.heads % 2:
      raise ValueError(
        f'retention: width={width} over heads={self.heads} must be whole and '
        'even, for rotations turn pairs of channels'
      )
    if values % self.heads or not values:
      raise ValueError(
        f'retention: values of width {values} (value_share='
        f'{self.value_share}) must divide by heads={self.heads}'
      )
    slowest = self.reach()[-1]
    if not 1 < self.shortest <= slowest or (self.longest and self.heads < 2):
      raise ValueError(
        f'retention: shortest={self.shortest} must be above 1 and at most '
        f'longest={self.longest}, which needs heads={self.heads} of 2 or more'
      )

  def memory(self, batch, length, width, dtype):
    h, values = self.heads, round(width * self.value_share)
    return MatrixState.empty(batch, h, width // h, values // h, dtype)

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width, h = x.shape[-1], self.heads
    values = round(width * self.value_share)
    project = lambda to, name: Linear(
      (h, to // h), policy=self.policy, name=name
    )
    o, memory = sequence.stream(
      lambda *arrays: attend(*arrays, reach=self.reach()),
      project(width, 'query')(x),
      project(width, 'key')(x),
      project(values, 'value')(x),
      tokens,
      memory,
    )
    o = o.astype(x.dtype) * jax.nn.swish(project(values, 'gate')(x))
    out = Linear(width, axes=2, policy=self.policy, name='out')
    return out(o), memory


def _flops(mixer, width, length):
  values = round(width * mixer.value_share)
  state = 3 * width * values // mixer.heads  # decay, write, read
  return 2 * length * (2 * width**2 + 3 * width * values + state)


def _state_bytes(mixer, width, length):
  return 4 * width * round(width * mixer.value_share) // mixer.heads


SPEC = Spec(
  paper=(
    'Retentive Network: A Successor to Transformer for Large Language Models'
  ),
  authors='Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei',
  year=2023,
  link='https://arxiv.org/abs/2307.08621',
  examples=(
    {'heads': 2},
    {'heads': 3, 'value_share': 1.0, 'shortest': 2.0, 'longest': 8.0},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
  layout='contiguous',
)
