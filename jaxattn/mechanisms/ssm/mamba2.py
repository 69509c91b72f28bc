"""Mamba-2: a selective state space with one decay per head (SSD).

Dao, Gu 2024, "Transformers are SSMs: Generalized Models and Efficient
Algorithms Through Structured State Space Duality",
https://arxiv.org/abs/2405.21060.

    z, (x, B, C), dt = split(u W_in);  x, B, C pass a short convolution and silu
    dt_t = softplus(dt_t + c), a_t = exp(-exp(A) dt_t)             one a head
    S_t = a_t S_{t-1} + dt_t B_t x_t^T        o_t = S_t^T C_t + D x_t
    y_t = norm(o_t * silu(z_t)) W_out

B and C are keys and queries of width n, shared by the heads of a group as in
grouped-query attention. The short convolution has no bias, and the norm takes
all inner channels together, as the authors' code does for one group.

Cost for one row: time O(t n e) per head, state h n e numbers whatever t,
parameters about 3 expand m^2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import gates
from jaxattn.mixer import Mixer
from jaxattn.nn import Linear, Norm, ShortConv
from jaxattn.parallel import place, prefix, sequence
from jaxattn.spec import Spec
from jaxattn.state import ConvTail, MatrixState


def reference(params, x, *, heads, groups=1, conv_taps=4, **_):
  """The formula on x 'b t m', token by token."""
  matrix = lambda name: params[name]['kernel']
  inner, mixed = matrix('out').shape[0], matrix('conv').shape[1]
  z, u, dt = jnp.split(x @ matrix('in'), [inner, inner + mixed], axis=-1)
  padded = jnp.pad(u, ((0, 0), (conv_taps - 1, 0), (0, 0)))
  shifts = [padded[:, i : i + x.shape[1]] for i in range(conv_taps)]
  u = jax.nn.silu(sum(s * c for s, c in zip(shifts, matrix('conv'))))
  size = (mixed - inner) // 2
  v, b, c = jnp.split(u, [inner, inner + size], axis=-1)
  v = v.reshape(*x.shape[:2], heads, -1)
  b, c = (
    jnp.repeat(a.reshape(*x.shape[:2], groups, -1), heads // groups, axis=2)
    for a in (b, c)
  )
  dt = jax.nn.softplus(dt + params['dt_bias'])
  a = jnp.exp(-jnp.exp(params['log_rate']) * dt)

  def step(s, inputs):
    v, b, c, dt, a = inputs
    s = a[..., None, None] * s + jnp.einsum('bh,bhn,bhe->bhne', dt, b, v)
    return s, jnp.einsum('bhne,bhn->bhe', s, c)

  start = jnp.zeros((x.shape[0], heads, b.shape[-1], v.shape[-1]), x.dtype)
  in_time = [jnp.moveaxis(array, 1, 0) for array in (v, b, c, dt, a)]
  o = jnp.moveaxis(jax.lax.scan(step, start, in_time)[1], 0, 1)
  o = o + params['skip'][:, None] * v
  o = o.reshape(z.shape) * jax.nn.silu(z)
  o = o / jnp.sqrt(jnp.mean(o**2, axis=-1, keepdims=True) + 1e-6)
  return o * params['norm']['gain'] @ matrix('out')


def attend(u, dt, log_decay, tokens, memory, kernel, skip, *, groups, size):
  """The same in chunks: 'b t f' projections to 'b t h e', and the memory."""
  places = {'valid': tokens.valid, 'starts': tokens.starts}
  tail = None if memory is None else memory['tail'].tail
  u, tail = prefix.short(u, kernel, tail=tail, **places)
  u = jax.nn.silu(u.astype(dt.dtype))
  heads, inner = dt.shape[2], u.shape[2] - 2 * groups * size
  v, keys, queries = jnp.split(u, [inner, inner + groups * size], axis=-1)
  v = v.reshape(*v.shape[:2], heads, -1)
  keys, queries = (
    jnp.repeat(a.reshape(*a.shape[:2], groups, size), heads // groups, axis=2)
    for a in (keys, queries)
  )
  state = None if memory is None else memory['state'].matrix
  o, state = prefix.gated(
    queries,
    keys,
    dt[..., None] * v,
    log_decay[..., None],
    state=state,
    **places,
  )
  o = o + skip[:, None] * v
  return o, {'state': MatrixState(state), 'tail': ConvTail(tail)}


class Mamba2(Mixer):
  """State space duality: gated linear attention inside a gated block.

  Attributes:
    heads: h; it must divide the inner width, expand * m.
    expand: inner width, as a share of the model width.
    state_size: n, width of B and C.
    groups: how many B and C there are; it must divide the heads.
    conv_taps: w of the short convolution on x, B and C.
    dt_min, dt_max: range of the initial softplus(c), log-uniform over heads;
      exp(A) is between 1 and 16, so a head remembers about 1 / dt tokens or a
      few times less.
  """

  heads: int = 4
  expand: float = 2.0
  state_size: int = 64
  groups: int = 1
  conv_taps: int = 4
  dt_min: float = 1e-3
  dt_max: float = 1e-1

  strategies = ('prefix',)

  def widths(self, width: int) -> tuple[int, int]:
    """The inner width, and the width of what the convolution reads."""
    inner = round(self.expand * width)
    return inner, inner + 2 * self.groups * self.state_size

  def check(self, width):
    inner, _ = self.widths(width)
    if inner % self.heads or not inner:
      raise ValueError(
        f'mamba2: inner width {inner} (expand={self.expand}) does not divide '
        f'by heads={self.heads}'
      )
    if self.groups < 1 or self.heads % self.groups:
      raise ValueError(
        f'mamba2: heads={self.heads} do not divide into groups={self.groups}'
      )
    if self.state_size < 1 or self.conv_taps < 1:
      raise ValueError(
        f'mamba2: state_size={self.state_size} and conv_taps={self.conv_taps} '
        'must be at least 1'
      )
    if not 0 < self.dt_min <= self.dt_max:
      raise ValueError(
        f'mamba2: dt_min={self.dt_min} must be above 0 and at most '
        f'dt_max={self.dt_max}'
      )

  def memory(self, batch, length, width, dtype):
    (inner, mixed), h = self.widths(width), self.heads
    return {
      'state': MatrixState.empty(batch, h, self.state_size, inner // h, dtype),
      'tail': ConvTail.empty(batch, self.conv_taps, mixed, dtype),
    }

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width, h = x.shape[-1], self.heads
    inner, mixed = self.widths(width)
    exact = jnp.promote_types(x.dtype, jnp.float32)

    def per_head(name, init):
      own = self.param(name, init, (h,), self.policy.param_dtype)
      return place.whole(own).astype(exact)

    project = Linear(inner + mixed + h, policy=self.policy, name='in')
    z, u, dt = jnp.split(project(x), [inner, inner + mixed], axis=-1)
    bias = per_head('dt_bias', gates.steps(self.dt_min, self.dt_max))
    log_rate = per_head('log_rate', gates.log_rates(1, 16))
    skip = per_head('skip', nn.initializers.ones)
    dt = jax.nn.softplus(dt.astype(exact) + bias)
    o, memory = sequence.stream(
      lambda *arrays: attend(*arrays, groups=self.groups, size=self.state_size),
      u,
      dt,
      -jnp.exp(log_rate) * dt,
      tokens,
      memory,
      weights=(
        ShortConv(self.conv_taps, self.policy, name='conv')(mixed),
        skip,
      ),
    )
    o = o.reshape(z.shape) * jax.nn.silu(z.astype(exact))
    o = Norm(self.policy, name='norm')(o)
    return Linear(width, policy=self.policy, name='out')(o), memory


def _flops(mixer, width, length):
  inner, mixed = mixer.widths(width)
  projections = width * (2 * inner + mixed + mixer.heads)
  taps = mixer.conv_taps * mixed
  state = 3 * mixer.state_size * inner  # decay, write, read
  return 2 * length * (projections + taps + state + inner)


def _state_bytes(mixer, width, length):
  inner, mixed = mixer.widths(width)
  number = jnp.dtype(mixer.policy.dtype).itemsize
  return 4 * mixer.state_size * inner + (mixer.conv_taps - 1) * mixed * number


SPEC = Spec(
  paper=(
    'Transformers are SSMs: Generalized Models and Efficient Algorithms '
    'Through Structured State Space Duality'
  ),
  authors='Dao, Gu',
  year=2024,
  link='https://arxiv.org/abs/2405.21060',
  examples=(
    {'heads': 2, 'state_size': 4},
    {'heads': 4, 'state_size': 3, 'groups': 2, 'expand': 1.0, 'conv_taps': 2},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
  layout='contiguous',
)
