"""S4D: a diagonal state space per channel.

Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State
Space Models", https://arxiv.org/abs/2206.11893.

    dx/dt = a x + u(t),   z_t = 2 Re sum_n c_n x_n(t) + D u_t    per channel
    a_n = -exp(r_n) + i w_n, from -1/2 + i pi n (S4D-Lin); step exp(log_dt)
    y_t = glu(gelu(z_t) W)

Nothing depends on the token but u itself, so training is one convolution by
FFT; with a state, with pads or with several documents it is a chunked scan.

Cost for one row: time O(t log t m + t m n), state m n complex numbers,
parameters 2 m^2 + 4 m n.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import ssm
from jaxattn.mixer import Mixer
from jaxattn.nn import Linear
from jaxattn.parallel import place, prefix, sequence
from jaxattn.spec import Spec
from jaxattn.state import VectorState


def reference(params, x, **_):
  """The formula on x 'b t m', token by token."""
  a = -jnp.exp(params['log_decay']) + 1j * params['frequency']
  c = params['read'][..., 0] + 1j * params['read'][..., 1]
  dt = jnp.exp(params['log_dt'])[:, None]
  a_bar = jnp.exp(dt * a)
  b_bar = (a_bar - 1) / a

  def step(state, u):
    state = a_bar * state + b_bar * u[..., None]
    return state, 2 * jnp.sum(c * state, axis=-1).real

  start = jnp.zeros((x.shape[0], *a.shape), a.dtype)
  z = jax.lax.scan(step, start, jnp.moveaxis(x, 1, 0))[1]
  z = jax.nn.gelu(jnp.moveaxis(z, 0, 1) + params['skip'] * x)
  left, right = jnp.split(z @ params['out']['kernel'], 2, axis=-1)
  return left * jax.nn.sigmoid(right)


def attend(u, tokens, memory, a, c, log_dt):
  """The same by FFT if nothing but a dense row is asked for, else by scan."""
  log_a, b_bar = ssm.discretise(a, jnp.ones_like(a), log_dt)
  # Where no segment begins, pads can but fill up a dense row at its end.
  if memory is None and tokens.starts is None:
    return prefix.dense(u, log_a, b_bar, c), None
  z, state = prefix.scan(
    u,
    log_a,
    b_bar,
    c,
    state=None if memory is None else memory.vector,
    valid=tokens.valid,
    starts=tokens.starts,
  )
  return z, VectorState(state)


class S4D(Mixer):
  """A bank of n complex modes for every channel.

  Attributes:
    modes: n, conjugate pairs of modes per channel.
    dt_min, dt_max: range of the initial steps, log-uniform over channels: a
      channel remembers about 1 / dt tokens.
  """

  modes: int = 32
  dt_min: float = 1e-3
  dt_max: float = 1e-1

  strategies = ('prefix',)

  def check(self, width):
    if self.modes < 1 or not 0 < self.dt_min <= self.dt_max:
      raise ValueError(
        f's4d: modes={self.modes} must be at least 1, and dt_min='
        f'{self.dt_min} above 0 and at most dt_max={self.dt_max}'
      )

  def memory(self, batch, length, width, dtype):
    return VectorState.empty(batch, width, self.modes, dtype)

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    low, high = math.log(self.dt_min), math.log(self.dt_max)

    def param(name, init, *shape):
      return place.whole(self.param(name, init, shape, self.policy.param_dtype))

    def steps(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, low, high)

    def frequencies(key, shape, dtype):
      return jnp.broadcast_to(
        jnp.pi * jnp.arange(shape[-1], dtype=dtype), shape
      )

    bank = (width, self.modes)
    decay = param('log_decay', nn.initializers.constant(math.log(0.5)), *bank)
    frequency = param('frequency', frequencies, *bank)
    read = param('read', nn.initializers.normal(0.5**0.5), *bank, 2)
    log_dt = param('log_dt', steps, width)
    skip = param('skip', nn.initializers.normal(1.0), width)

    # Wide up to the gate: gradients of dt are sums over time that cancel.
    u = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    z, memory = sequence.stream(
      attend,
      u,
      tokens,
      memory,
      weights=(
        jax.lax.complex(-jnp.exp(decay), frequency),
        jax.lax.complex(read[..., 0], read[..., 1]),
        log_dt,
      ),
    )
    z = jax.nn.gelu(z + skip.astype(u.dtype) * u)
    z = Linear(2 * width, policy=self.policy, name='out')(z)
    left, right = jnp.split(z, 2, axis=-1)
    return left * jax.nn.sigmoid(right), memory


def _flops(mixer, width, length):
  size = max(2 * length, 2)
  transforms = 3 * 2.5 * size * math.log2(size) * width  # real FFT: half of 5 n
  kernel = 8 * length * width * mixer.modes  # complex multiply-add
  return round(transforms + kernel) + 2 * length * 2 * width**2


def _state_bytes(mixer, width, length):
  return 8 * width * mixer.modes


SPEC = Spec(
  paper=(
    'On the Parameterization and Initialization of Diagonal State Space Models'
  ),
  authors='Gu, Gupta, Goel, Re',
  year=2022,
  link='https://arxiv.org/abs/2206.11893',
  examples=({'modes': 4}, {'modes': 1, 'dt_min': 0.1}),
  flops=_flops,
  state_bytes=_state_bytes,
  layout='contiguous',
  fft=True,
)
