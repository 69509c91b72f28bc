"""Gated DeltaNet: the delta rule on a memory that fades.

Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with
Delta Rule", https://arxiv.org/abs/2412.06464.

    S_t = a_t (S_{t-1} - b_t k_t (k_t^T S_{t-1})) + b_t k_t v_t^T
    o_t = S_t^T q_t / sqrt(d)
    a_t = exp(-exp(A) softplus(x_t W_a + c)), b_t = sigmoid(x_t W_b), one a head
    q, k, v pass a short convolution and silu, and q and k are then of norm 1
    y_t = (norm(o_t) * silu(x_t W_g)) W_o

Cost for one row: time O(t d e) per head, state h d e numbers whatever t,
parameters about 4 m^2 with keys of half the width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import delta, gates
from jaxattn.mixer import Mixer
from jaxattn.nn import Linear, Norm, ShortConv
from jaxattn.parallel import place, prefix, sequence
from jaxattn.spec import Spec
from jaxattn.state import ConvTail, MatrixState


def reference(params, x, *, heads, conv_taps=4, **_):
  """The formula on x 'b t m', token by token."""
  matrix = lambda name: params[name]['kernel']
  split = lambda a: a.reshape(*a.shape[:2], heads, -1)
  padded = jnp.pad(x @ matrix('qkv'), ((0, 0), (conv_taps - 1, 0), (0, 0)))
  shifts = [padded[:, i : i + x.shape[1]] for i in range(conv_taps)]
  qkv = jax.nn.silu(sum(s * c for s, c in zip(shifts, matrix('conv'))))
  value_width = matrix('out').shape[0] * matrix('out').shape[1]
  keys = (qkv.shape[-1] - value_width) // 2
  q, k, v = map(split, jnp.split(qkv, [keys, 2 * keys], axis=-1))
  q, k = (
    a / jnp.sqrt(jnp.sum(a**2, axis=-1, keepdims=True) + 1e-6) for a in (q, k)
  )
  step_size = jax.nn.softplus(x @ matrix('decay') + params['decay']['bias'])
  a = jnp.exp(-jnp.exp(params['log_rate']) * step_size)
  beta = jax.nn.sigmoid(x @ matrix('beta'))

  def step(s, inputs):
    q, k, v, a, beta = inputs
    known = jnp.einsum('bhde,bhd->bhe', s, k)
    erased = s - jnp.einsum('bh,bhd,bhe->bhde', beta, k, known)
    written = jnp.einsum('bh,bhd,bhe->bhde', beta, k, v)
    s = a[..., None, None] * erased + written
    return s, jnp.einsum('bhde,bhd->bhe', s, q) * q.shape[-1] ** -0.5

  start = jnp.zeros((x.shape[0], heads, k.shape[-1], v.shape[-1]), x.dtype)
  in_time = [jnp.moveaxis(array, 1, 0) for array in (q, k, v, a, beta)]
  o = jnp.moveaxis(jax.lax.scan(step, start, in_time)[1], 0, 1)
  o = o / jnp.sqrt(jnp.mean(o**2, axis=-1, keepdims=True) + 1e-6)
  o = o * params['norm']['gain'] * split(jax.nn.silu(x @ matrix('gate')))
  return jnp.einsum('bthe,hem->btm', o, matrix('out'))


def attend(qkv, beta, log_decay, tokens, memory, kernel, *, keys):
  """The same in chunks: 'b t f' projections to 'b t h e', and the memory."""
  places = {'valid': tokens.valid, 'starts': tokens.starts}
  tail = None if memory is None else memory['tail'].tail
  # Wide from here on: made a unit, a short key magnifies its rounding errors.
  wide, tail = prefix.short(qkv.astype(beta.dtype), kernel, tail=tail, **places)
  tail = tail.astype(qkv.dtype)
  q, k, v = (
    part.reshape(*part.shape[:2], beta.shape[2], -1)
    for part in jnp.split(jax.nn.silu(wide), [keys, 2 * keys], axis=-1)
  )
  q = delta.unit(q) * q.shape[-1] ** -0.5
  state = None if memory is None else memory['state'].matrix
  o, state = prefix.delta(
    q, delta.unit(k), v, beta, log_decay, state=state, **places
  )
  return o, {'state': MatrixState(state), 'tail': ConvTail(tail)}


class GatedDeltaNet(Mixer):
  """Linear attention with the delta rule and a decay per head.

  Attributes:
    heads: h; it must divide the widths of keys and values.
    key_share: width of all keys, as a share of the model width.
    value_share: the same for values.
    conv_taps: w of the short convolution on queries, keys and values.
    dt_min, dt_max: range of the initial softplus(c), log-uniform over heads;
      exp(A) is between 1 and 16, so a head remembers about 1 / dt tokens or a
      few times less.
  """

  heads: int = 4
  key_share: float = 0.5
  value_share: float = 1.0
  conv_taps: int = 4
  dt_min: float = 1e-3
  dt_max: float = 1e-1

  strategies = ('prefix',)

  def widths(self, width: int) -> tuple[int, int]:
    """Widths of all keys and of all values."""
    return round(width * self.key_share), round(width * self.value_share)

  def check(self, width):
    keys, values = self.widths(width)
    if keys % self.heads or values % self.heads or not keys or not values:
      raise ValueError(
        f'gated_delta_net: keys of width {keys} (key_share={self.key_share}) '
        f'and values of width {values} must divide by heads={self.heads}'
      )
    if self.conv_taps < 1 or not 0 < self.dt_min <= self.dt_max:
      raise ValueError(
        f'gated_delta_net: conv_taps={self.conv_taps} must be at least 1, and '
        f'dt_min={self.dt_min} above 0 and at most dt_max={self.dt_max}'
      )

  def memory(self, batch, length, width, dtype):
    (keys, values), h = self.widths(width), self.heads
    return {
      'state': MatrixState.empty(batch, h, keys // h, values // h, dtype),
      'tail': ConvTail.empty(batch, self.conv_taps, 2 * keys + values, dtype),
    }

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    keys, values = self.widths(width)
    linear = lambda to, name, **kw: Linear(
      to, policy=self.policy, name=name, **kw
    )

    beta = linear(self.heads, 'beta')(x)
    dt = linear(
      self.heads,
      'decay',
      bias=True,
      bias_init=gates.steps(self.dt_min, self.dt_max),
    )(x)
    exact = jnp.promote_types(dt.dtype, jnp.float32)
    log_rate = place.whole(
      self.param(
        'log_rate',
        gates.log_rates(1, 16),
        (self.heads,),
        self.policy.param_dtype,
      )
    )
    taps = ShortConv(self.conv_taps, self.policy, name='conv')
    kernel = taps(2 * keys + values)
    o, memory = sequence.stream(
      lambda *arrays: attend(*arrays, keys=keys),
      linear(2 * keys + values, 'qkv')(x),
      jax.nn.sigmoid(beta.astype(exact)),
      -jnp.exp(log_rate.astype(exact)) * jax.nn.softplus(dt.astype(exact)),
      tokens,
      memory,
      weights=(kernel,),
    )
    gate = jax.nn.silu(linear(values, 'gate')(x)).reshape(o.shape)
    o = Norm(self.policy, name='norm')(o) * gate
    return linear(width, 'out', axes=2)(o), memory


def _flops(mixer, width, length):
  keys, values = mixer.widths(width)
  projections = width * (2 * keys + 3 * values + 2 * mixer.heads)
  taps = mixer.conv_taps * (2 * keys + values)
  state = 4 * keys * values // mixer.heads  # decay, look up, write, read
  return 2 * length * (projections + taps + state)


def _state_bytes(mixer, width, length):
  keys, values = mixer.widths(width)
  number = jnp.dtype(mixer.policy.dtype).itemsize
  tail = (mixer.conv_taps - 1) * (2 * keys + values) * number
  return 4 * keys * values // mixer.heads + tail


SPEC = Spec(
  paper='Gated Delta Networks: Improving Mamba2 with Delta Rule',
  authors='Yang, Kautz, Hatamizadeh',
  year=2024,
  link='https://arxiv.org/abs/2412.06464',
  examples=(
    {'heads': 2},
    {'heads': 3, 'key_share': 1.0, 'value_share': 1.5, 'conv_taps': 1},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
  layout='contiguous',
)
