"""Gated linear attention (GLA).

Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient
Training", https://arxiv.org/abs/2312.06635.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t / sqrt(d)
    a_t = sigmoid(x_t W_1 W_2 + b)^(1 / 16)    one decay per key channel
    y_t = (norm(o_t) * silu(x_t W_g)) W_o

Cost for one row: time O(t d e) per head, state h d e numbers whatever t,
parameters about 4 m^2 with keys of half the width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.mixer import Mixer
from jaxattn.nn import Linear, Norm, ShortConv
from jaxattn.parallel import prefix, sequence
from jaxattn.spec import Spec
from jaxattn.state import ConvTail, MatrixState

TEMPERATURE = 16.0  # a gate near 1 at the start: memories of tens of tokens


def reference(params, x, *, heads, conv_taps=0, **_):
  """The formula on x 'b t m', token by token."""
  matrix = lambda name: params[name]['kernel']
  split = lambda a: a.reshape(*a.shape[:2], heads, -1)
  qkv = x @ matrix('qkv')
  if conv_taps:
    padded = jnp.pad(qkv, ((0, 0), (conv_taps - 1, 0), (0, 0)))
    shifts = [padded[:, i : i + x.shape[1]] for i in range(conv_taps)]
    qkv = jax.nn.silu(sum(s * c for s, c in zip(shifts, matrix('conv'))))
  value_width = matrix('out').shape[0] * matrix('out').shape[1]
  key_width = (qkv.shape[-1] - value_width) // 2
  q, k, v = map(split, jnp.split(qkv, [key_width, 2 * key_width], axis=-1))
  logits = jnp.einsum(
    'btr,rhd->bthd', x @ matrix('decay_down'), matrix('decay_up')
  )
  a = jax.nn.sigmoid(logits + params['decay_up']['bias']) ** (1 / 16)

  def step(s, inputs):
    q, k, v, a = inputs
    s = a[..., None] * s + k[..., None] * v[..., None, :]
    return s, jnp.einsum('bhde,bhd->bhe', s, q) * q.shape[-1] ** -0.5

  start = jnp.zeros((x.shape[0], heads, k.shape[-1], v.shape[-1]), x.dtype)
  in_time = [jnp.moveaxis(array, 1, 0) for array in (q, k, v, a)]
  o = jnp.moveaxis(jax.lax.scan(step, start, in_time)[1], 0, 1)
  o = o / jnp.sqrt(jnp.mean(o**2, axis=-1, keepdims=True) + 1e-6)
  o = o * params['norm']['gain'] * split(jax.nn.silu(x @ matrix('gate')))
  return jnp.einsum('bthe,hem->btm', o, matrix('out'))


def attend(qkv, log_decay, tokens, memory, kernel, *, heads):
  """The same in chunks: 'b t f' projections to 'b t h e', and the memory."""
  memory = memory or {}
  places = {'valid': tokens.valid, 'starts': tokens.starts}
  after = {}
  if kernel is not None:
    tail = memory['tail'].tail if memory else None
    qkv, tail = prefix.short(qkv, kernel, tail=tail, **places)
    qkv = jax.nn.silu(qkv)
    after['tail'] = ConvTail(tail)
  keys = log_decay.shape[2] * log_decay.shape[3]
  q, k, v = (
    part.reshape(*part.shape[:2], heads, -1)
    for part in jnp.split(qkv, [keys, 2 * keys], axis=-1)
  )
  state = memory['state'].matrix if memory else None
  o, state = prefix.gated(
    q * q.shape[-1] ** -0.5, k, v, log_decay, state=state, **places
  )
  return o, after | {'state': MatrixState(state)}


class GatedLinear(Mixer):
  """Linear attention with a decay per key channel.

  Attributes:
    heads: h; it must divide the widths of keys and values.
    key_share: width of all keys, as a share of the model width.
    value_share: the same for values.
    rank: r, inner width of the projection that makes the decays.
    conv_taps: w of a short convolution on queries, keys and values; 0 for none.
  """

  heads: int = 4
  key_share: float = 0.5
  value_share: float = 1.0
  rank: int = 16
  conv_taps: int = 0

  strategies = ('prefix',)

  def widths(self, width: int) -> tuple[int, int]:
    """Widths of all keys and of all values."""
    return round(width * self.key_share), round(width * self.value_share)

  def check(self, width):
    keys, values = self.widths(width)
    if keys % self.heads or values % self.heads or not keys:
      raise ValueError(
        f'gated_linear: keys of width {keys} (key_share={self.key_share}) and '
        f'values of width {values} must divide by heads={self.heads}'
      )
    if self.conv_taps < 0 or self.rank < 1:
      raise ValueError(
        f'gated_linear: conv_taps={self.conv_taps} must be at least 0 and '
        f'rank={self.rank} at least 1'
      )

  def memory(self, batch, length, width, dtype):
    keys, values = self.widths(width)
    h = self.heads
    state = MatrixState.empty(batch, h, keys // h, values // h, dtype)
    memory = {'state': state}
    if self.conv_taps:
      inputs = 2 * keys + values
      memory['tail'] = ConvTail.empty(batch, self.conv_taps, inputs, dtype)
    return memory

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    keys, values = self.widths(width)
    linear = lambda to, name, **kw: Linear(
      to, policy=self.policy, name=name, **kw
    )
    decay = linear((self.heads, keys // self.heads), 'decay_up', bias=True)(
      linear(self.rank, 'decay_down')(x)
    )
    exact = jnp.promote_types(decay.dtype, jnp.float32)
    log_decay = jax.nn.log_sigmoid(decay.astype(exact)) / TEMPERATURE
    kernel = None
    if self.conv_taps:
      taps = ShortConv(self.conv_taps, self.policy, name='conv')
      kernel = taps(2 * keys + values)
    o, memory = sequence.stream(
      lambda *arrays: attend(*arrays, heads=self.heads),
      linear(2 * keys + values, 'qkv')(x),
      log_decay,
      tokens,
      memory,
      weights=(kernel,),
    )
    gate = jax.nn.silu(linear(values, 'gate')(x)).reshape(o.shape)
    o = Norm(self.policy, name='norm')(o) * gate
    return linear(width, 'out', axes=2)(o), memory


def _flops(mixer, width, length):
  keys, values = mixer.widths(width)
  projections = width * (2 * keys + 3 * values) + mixer.rank * (width + keys)
  taps = mixer.conv_taps * (2 * keys + values)
  state = 3 * keys * values // mixer.heads  # decay, write, read
  return 2 * length * (projections + taps + state)


def _state_bytes(mixer, width, length):
  keys, values = mixer.widths(width)
  number = jnp.dtype(mixer.policy.dtype).itemsize
  tail = max(mixer.conv_taps - 1, 0) * (2 * keys + values) * number
  return 4 * keys * values // mixer.heads + tail


SPEC = Spec(
  paper='Gated Linear Attention Transformers with Hardware-Efficient Training',
  authors='Yang, Wang, Shen, Panda, Kim',
  year=2023,
  link='https://arxiv.org/abs/2312.06635',
  examples=(
    {'heads': 2, 'rank': 4},
    {'heads': 2, 'rank': 4, 'conv_taps': 3},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
  layout='contiguous',
)
