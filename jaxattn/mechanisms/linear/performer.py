"""Performer (FAVOR+): softmax attention estimated by random features.

Choromanski et al. 2020, "Rethinking Attention with Performers",
https://arxiv.org/abs/2009.14794.

    phi(x) = exp(W x / d^(1/4) - |x|^2 / (2 sqrt(d))) / sqrt(r)
    W 'r d': Gaussian rows, orthogonal in blocks; E[phi(q) . phi(k)] is then
    exp(q . k / sqrt(d))
    p_ts = phi(q_t) . phi(k_s),  o_t = sum_{s <= t} p_ts v_s / sum_{s <= t} p_ts
    y_t = concat_h(o_t) W_o

W is no parameter. It lies in `stats` beside the key that it was drawn with (as
`seed`) and a count of training calls: call number c draws anew, from the key
and c, where `redraw` divides c > 0. So a run is reproducible and needs no rng;
a state is good for the draw that it was made with.

To stay in range, exponents of a query are taken off their largest, and those of
keys off the largest key exponent so far, by which the sums over the past fade
whenever it grows (`core.features`); both cancel in the ratio. Should a query
have no feature in common with the past to 1e-18, its output tends to 0.

Cost for one row: time O(t r e) per head, state h r (e + 1) + h numbers whatever
t, parameters 4 m^2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import features as maps
from jaxattn.mixer import Mixer
from jaxattn.nn import Linear
from jaxattn.parallel import place, prefix, sequence
from jaxattn.spec import Spec
from jaxattn.state import MatrixState

FLOOR = 1e-18  # of the denominator: its inverse can be squared in float32


def reference(params, x, *, stats, **_):
  """The formula on x 'b t m', all pairs at once."""
  q, k, v = (
    jnp.einsum('btm,mhd->bthd', x, params[name]['kernel'])
    for name in ('query', 'key', 'value')
  )
  w = stats['directions']

  def phi(x):
    x = x * x.shape[-1] ** -0.25
    exponents = jnp.einsum('bthd,rd->bthr', x, w)
    exponents = exponents - jnp.sum(x**2, axis=-1, keepdims=True) / 2
    return jnp.exp(exponents) * w.shape[0] ** -0.5

  weights = jnp.einsum('bthr,bshr->bhts', phi(q), phi(k))
  weights = jnp.where(jnp.tri(x.shape[1], dtype=bool), weights, 0)
  weights = weights / weights.sum(-1, keepdims=True)
  o = jnp.einsum('bhts,bshe->bthe', weights, v)
  return jnp.einsum('bthe,hem->btm', o, params['out']['kernel'])


def attend(q, k, v, tokens, memory, directions):
  """The same in chunks: 'b t h d' projections to 'b t h e', and the memory."""
  places = {'valid': tokens.valid, 'starts': tokens.starts}
  log_q, log_k = (maps.log_softmax(x, directions) for x in (q, k))
  phi_k, log_decay, peak = prefix.keys_in_range(
    log_k, peak=None if memory is None else memory['peak'], **places
  )
  # One more channel, always 1, sums up the denominator.
  values = v.astype(phi_k.dtype)
  values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
  o, state = prefix.gated(
    maps.query_in_range(log_q),
    phi_k,
    values,
    log_decay,
    state=None if memory is None else memory['state'].matrix,
    **places,
  )
  o = o[..., :-1] / jnp.maximum(o[..., -1:], FLOOR)
  return o.astype(v.dtype), {'state': MatrixState(state), 'peak': peak}


class Performer(Mixer):
  """Attention by positive orthogonal random features.

  Attributes:
    heads: h; it must divide the width.
    features: r; the error of the estimate falls as its root.
    redraw: training calls (`deterministic=False`) between two draws of W; 0
      keeps the first.
  """

  heads: int = 4
  features: int = 64
  redraw: int = 1000

  strategies = ('prefix',)

  def check(self, width):
    if width % self.heads:
      raise ValueError(
        f'performer: width={width} does not divide by heads={self.heads}'
      )
    if self.features < 1 or self.redraw < 0:
      raise ValueError(
        f'performer: features={self.features} must be at least 1 and '
        f'redraw={self.redraw} at least 0'
      )

  def memory(self, batch, length, width, dtype):
    h, d = self.heads, width // self.heads
    state = MatrixState.empty(batch, h, self.features, d + 1, dtype)
    peak = jnp.full_like(state.matrix[:, :, 0, 0], maps.LOWEST)
    return {'state': state, 'peak': peak}

  def _directions(self, width, deterministic):
    """W 'r d' of this call; counts the call, and draws anew when it is due."""
    draw = lambda seed, call: maps.orthogonal(
      jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), call),
      self.features,
      width,
    )
    fresh = lambda: jax.random.bits(self.make_rng('params'), dtype=jnp.uint32)
    seed = self.variable('stats', 'seed', fresh)
    calls = self.variable('stats', 'calls', lambda: jnp.zeros((), jnp.int32))
    directions = self.variable(
      'stats', 'directions', lambda: draw(seed.value, calls.value)
    )
    writes = not self.is_initializing() and self.is_mutable_collection('stats')
    if writes and not deterministic:
      if self.redraw:
        call = calls.value
        directions.value = jax.lax.cond(
          (call > 0) & (call % self.redraw == 0),
          lambda: draw(seed.value, call),
          lambda: directions.value,
        )
      calls.value = calls.value + 1
    return place.whole(directions.value)

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    split = (self.heads, width // self.heads)
    project = lambda name: Linear(split, policy=self.policy, name=name)
    o, memory = sequence.stream(
      attend,
      project('query')(x),
      project('key')(x),
      project('value')(x),
      tokens,
      memory,
      weights=(self._directions(width // self.heads, deterministic),),
    )
    return Linear(width, axes=2, policy=self.policy, name='out')(o), memory


def _flops(mixer, width, length):
  d, r = width // mixer.heads, mixer.features
  maps = 2 * width * r
  state = mixer.heads * r * (1 + 2 * (d + 1))  # decay, write, read
  return 2 * length * (4 * width**2 + maps + state)


def _state_bytes(mixer, width, length):
  d, r = width // mixer.heads, mixer.features
  return 4 * mixer.heads * (r * (d + 1) + 1)


SPEC = Spec(
  paper='Rethinking Attention with Performers',
  authors='Choromanski et al.',
  year=2020,
  link='https://arxiv.org/abs/2009.14794',
  examples=(
    {'heads': 2, 'features': 16},
    {'heads': 1, 'features': 7, 'redraw': 0},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
  layout='contiguous',
)
