"""DeltaNet: linear attention that corrects what it has stored.

Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length", https://arxiv.org/abs/2406.06484; the rule itself is that of
Schlag et al. 2021, https://arxiv.org/abs/2102.11174.

    S_t = S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T    o_t = S_t^T q_t / sqrt(d)
    b_t = sigmoid(x_t W_b), one a head; q, k, v pass a short convolution and
    silu, and q and k are then of norm 1
    y_t = norm(o_t) W_o

Cost for one row: time O(t d e) per head, state h d e numbers whatever t,
parameters about 4 m^2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import delta
from jaxattn.mixer import Mixer
from jaxattn.nn import Linear, Norm, ShortConv
from jaxattn.parallel import prefix, sequence
from jaxattn.spec import Spec
from jaxattn.state import ConvTail, MatrixState


def reference(params, x, *, heads, conv_taps=4, **_):
  """The formula on x 'b t m', token by token."""
  matrix = lambda name: params[name]['kernel']
  padded = jnp.pad(x @ matrix('qkv'), ((0, 0), (conv_taps - 1, 0), (0, 0)))
  shifts = [padded[:, i : i + x.shape[1]] for i in range(conv_taps)]
  qkv = jax.nn.silu(sum(s * c for s, c in zip(shifts, matrix('conv'))))
  q, k, v = (
    part.reshape(*part.shape[:2], heads, -1)
    for part in jnp.split(qkv, 3, axis=-1)
  )
  q, k = (
    a / jnp.sqrt(jnp.sum(a**2, axis=-1, keepdims=True) + 1e-6) for a in (q, k)
  )
  beta = jax.nn.sigmoid(x @ matrix('beta'))

  def step(s, inputs):
    q, k, v, beta = inputs
    error = v - jnp.einsum('bhde,bhd->bhe', s, k)
    s = s + jnp.einsum('bh,bhd,bhe->bhde', beta, k, error)
    return s, jnp.einsum('bhde,bhd->bhe', s, q) * q.shape[-1] ** -0.5

  start = jnp.zeros((x.shape[0], heads, k.shape[-1], v.shape[-1]), x.dtype)
  in_time = [jnp.moveaxis(array, 1, 0) for array in (q, k, v, beta)]
  o = jnp.moveaxis(jax.lax.scan(step, start, in_time)[1], 0, 1)
  o = o / jnp.sqrt(jnp.mean(o**2, axis=-1, keepdims=True) + 1e-6)
  o = o * params['norm']['gain']
  return jnp.einsum('bthe,hem->btm', o, matrix('out'))


def attend(qkv, beta, tokens, memory, kernel):
  """The same in chunks: 'b t f' projections to 'b t h e', and the memory."""
  places = {'valid': tokens.valid, 'starts': tokens.starts}
  tail = None if memory is None else memory['tail'].tail
  # Wide from here on: made a unit, a short key magnifies its rounding errors.
  wide, tail = prefix.short(_exact(qkv), kernel, tail=tail, **places)
  tail = tail.astype(qkv.dtype)
  q, k, v = (
    part.reshape(*part.shape[:2], beta.shape[2], -1)
    for part in jnp.split(jax.nn.silu(wide), 3, axis=-1)
  )
  state = None if memory is None else memory['state'].matrix
  o, state = prefix.delta(
    delta.unit(q) * q.shape[-1] ** -0.5,
    delta.unit(k),
    v,
    beta,
    state=state,
    **places,
  )
  return o, {'state': MatrixState(state), 'tail': ConvTail(tail)}


def _exact(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class DeltaNet(Mixer):
  """Linear attention with the delta rule.

  Attributes:
    heads: h; it must divide the width.
    conv_taps: w of the short convolution on queries, keys and values.
  """

  heads: int = 4
  conv_taps: int = 4

  strategies = ('prefix',)

  def check(self, width):
    if width % self.heads:
      raise ValueError(
        f'delta_net: width={width} does not divide by heads={self.heads}'
      )
    if self.conv_taps < 1:
      raise ValueError(
        f'delta_net: conv_taps={self.conv_taps} must be at least 1 '
        '(1 looks at the token alone)'
      )

  def memory(self, batch, length, width, dtype):
    d = width // self.heads
    return {
      'state': MatrixState.empty(batch, self.heads, d, d, dtype),
      'tail': ConvTail.empty(batch, self.conv_taps, 3 * width, dtype),
    }

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    linear = lambda to, name, **kw: Linear(
      to, policy=self.policy, name=name, **kw
    )
    kernel = ShortConv(self.conv_taps, self.policy, name='conv')(3 * width)
    o, memory = sequence.stream(
      attend,
      linear(3 * width, 'qkv')(x),
      jax.nn.sigmoid(_exact(linear(self.heads, 'beta')(x))),
      tokens,
      memory,
      weights=(kernel,),
    )
    o = Norm(self.policy, name='norm')(o)
    return linear(width, 'out', axes=2)(o), memory


def _flops(mixer, width, length):
  projections = width * (4 * width + mixer.heads)
  taps = mixer.conv_taps * 3 * width
  state = 3 * width * width // mixer.heads  # look up, write, read
  return 2 * length * (projections + taps + state)


def _state_bytes(mixer, width, length):
  number = jnp.dtype(mixer.policy.dtype).itemsize
  tail = (mixer.conv_taps - 1) * 3 * width * number
  return 4 * width * width // mixer.heads + tail


SPEC = Spec(
  paper=(
    'Parallelizing Linear Transformers with the Delta Rule over Sequence Length'
  ),
  authors='Yang, Wang, Zhang, Shen, Kim',
  year=2024,
  link='https://arxiv.org/abs/2406.06484',
  examples=({'heads': 2}, {'heads': 1, 'conv_taps': 1}),
  flops=_flops,
  state_bytes=_state_bytes,
  layout='contiguous',
)
