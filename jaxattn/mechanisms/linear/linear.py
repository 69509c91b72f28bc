"""Linear attention: softmax's exponential replaced by a product of features.

Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive
Transformers with Linear Attention", https://arxiv.org/abs/2006.16236.

    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)
    o_t = S_t^T phi(q_t) / (phi(q_t) . z_t)        phi(x) = elu(x) + 1
    y_t = concat_h(o_t) W_o

z is S for a value that is always 1, so one recurrence serves both: values get
one more channel, and the last channel of what is read is the denominator.

Cost for one row: time O(t d e) per head, state h d (e + 1) numbers whatever t,
parameters 4 m^2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn import nn as layers
from jaxattn.core import features
from jaxattn.mixer import Mixer
from jaxattn.parallel import prefix, sequence
from jaxattn.registry import did_you_mean
from jaxattn.spec import Spec
from jaxattn.state import MatrixState

EPSILON = 1e-6  # beside the denominator, which is a sum of positive numbers


def reference(params, x, *, feature='elu', normalise=True, **_):
  """The formula on x 'b t m', all pairs at once."""
  q, k, v = (
    jnp.einsum('btm,mhd->bthd', x, params[name]['kernel'])
    for name in ('query', 'key', 'value')
  )
  if feature == 'elu':
    q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
  scores = jnp.einsum('bthd,bshd->bhts', q, k)
  scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, 0)
  if normalise:
    scores = scores / (scores.sum(-1, keepdims=True) + 1e-6)
  o = jnp.einsum('bhts,bshe->bthe', scores, v)
  return jnp.einsum('bthe,hem->btm', o, params['out']['kernel'])


def attend(q, k, v, tokens, memory, *, feature, normalise):
  """The same in chunks: 'b t h d' projections to 'b t h e', and the memory."""
  phi, _ = features.FIXED[feature]
  values = v.astype(jnp.promote_types(v.dtype, jnp.float32))
  if normalise:
    values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
  o, state = prefix.gated(
    phi(q),
    phi(k),
    values,
    state=None if memory is None else memory.matrix,
    valid=tokens.valid,
    starts=tokens.starts,
  )
  if normalise:
    o = o[..., :-1] / (o[..., -1:] + EPSILON)
  return o.astype(v.dtype), MatrixState(state)


class Linear(Mixer):
  """Linear attention; without `normalise` the plain sum over the past.

  Attributes:
    heads: h; it must divide the width.
    feature: phi, 'elu' (elu + 1) or 'identity'.
    normalise: divide by the sum of weights, which phi must then keep positive.
  """

  heads: int = 4
  feature: str = 'elu'
  normalise: bool = True

  strategies = ('prefix',)

  def check(self, width):
    if width % self.heads:
      raise ValueError(
        f'linear: width={width} does not divide by heads={self.heads}'
      )
    if self.feature not in features.FIXED:
      raise ValueError(
        f'linear: no feature map {self.feature!r}.'
        f'{did_you_mean(self.feature, features.FIXED)}'
      )
    _, positive = features.FIXED[self.feature]
    if self.normalise and not positive:
      raise ValueError(
        f'linear: feature={self.feature!r} can be negative, so weights may sum '
        "to 0: give normalise=False, or feature='elu'"
      )

  def memory(self, batch, length, width, dtype):
    d = width // self.heads
    return MatrixState.empty(batch, self.heads, d, d + self.normalise, dtype)

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    split = (self.heads, width // self.heads)
    project = lambda name: layers.Linear(split, policy=self.policy, name=name)
    o, memory = sequence.stream(
      lambda *arrays: attend(
        *arrays, feature=self.feature, normalise=self.normalise
      ),
      project('query')(x),
      project('key')(x),
      project('value')(x),
      tokens,
      memory,
    )
    out = layers.Linear(width, axes=2, policy=self.policy, name='out')
    return out(o), memory


def _flops(mixer, width, length):
  d = width // mixer.heads
  state = 2 * width * (d + mixer.normalise)  # write, read
  return 2 * length * (4 * width**2 + state)


def _state_bytes(mixer, width, length):
  return 4 * width * (width // mixer.heads + mixer.normalise)


SPEC = Spec(
  paper=(
    'Transformers are RNNs: Fast Autoregressive Transformers with Linear '
    'Attention'
  ),
  authors='Katharopoulos, Vyas, Pappas, Fleuret',
  year=2020,
  link='https://arxiv.org/abs/2006.16236',
  examples=(
    {'heads': 2},
    {'heads': 2, 'feature': 'identity', 'normalise': False},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
  layout='contiguous',
)
