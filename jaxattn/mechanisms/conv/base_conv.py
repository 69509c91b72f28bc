"""BaseConv: a gate times a long convolution.

Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient
Language Models", https://arxiv.org/abs/2312.04927.

    y = (x W + b_1) * (h * x + b_2)
    (h * x)_t = sum_{l < taps} h_l x_{t-l}        one filter a channel

A dense row is one convolution by FFT. Documents and pads go lag by lag, each
token reading the one that stands l before it in its own document: exact, but
t taps m work. Filters are learnt tap by tap, and weights at time t depend on x
at t alone, so it recalls what stands at a known distance, not what resembles
the query: the paper's yardstick for gated convolutions.

There is no state smaller than the past, so decoding computes it again.

Cost for one row: time O(t log t m + t m^2), memory t m, parameters
m^2 + (taps + 2) m.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.mixer import Mixer
from jaxattn.nn import Linear
from jaxattn.parallel import place, prefix, sequence
from jaxattn.spec import Spec


def reference(params, x, **_):
  """The formula on x 'b t m', all pairs at once."""
  t = x.shape[1]
  lag = jnp.arange(t)[:, None] - jnp.arange(t)
  taps = params['kernel'].shape[0]
  h = params['kernel'][jnp.clip(lag, 0, taps - 1)]
  h = jnp.where(((lag >= 0) & (lag < taps))[..., None], h, 0)
  mixed = jnp.einsum('tsm,bsm->btm', h, x) + params['bias']
  return (x @ params['gate']['kernel'] + params['gate']['bias']) * mixed


def attend(x, tokens, memory, kernel):
  """h * x by FFT if a dense row is all there is, else lag by lag."""
  # Where no segment begins, pads can but fill up a dense row at its end.
  if tokens.starts is None:
    return prefix.fft(x, kernel), None
  segments = sequence.everywhere(tokens.segments)
  by_lags = lambda x, h: lag_by_lag(x, segments, h.T)
  return prefix.by_channel(by_lags, x, kernel.T), None


def lag_by_lag(x, segments, kernel):
  """The same for rows with pads, of one document or of several."""
  exact = jnp.result_type(jnp.float32, x, kernel)
  # A stable sort moves pads behind the tokens of their row: inside a document
  # the token l places before in the array is then the one l before in order.
  order = jnp.argsort(segments == 0, axis=1, stable=True)[..., None]
  back = jnp.argsort(order, axis=1)
  segments = jnp.take_along_axis(segments[..., None], order, axis=1)
  squeezed = jnp.take_along_axis(x, order, axis=1).astype(exact)
  at = jnp.arange(x.shape[1])[:, None]

  @jax.checkpoint
  def past(lag, tap):
    """What the token `lag` places before brings, 'b t m'."""
    same = (jnp.roll(segments, lag, axis=1) == segments) & (at >= lag)
    return jnp.where(same, jnp.roll(squeezed, lag, axis=1), 0) * tap

  def add(y, lag_and_tap):
    return y + past(*lag_and_tap), None

  kernel = kernel[: x.shape[1]].astype(exact)
  lags = jnp.arange(kernel.shape[0])
  y, _ = jax.lax.scan(add, jnp.zeros_like(squeezed), (lags, kernel))
  return jnp.take_along_axis(y, back, axis=1).astype(x.dtype)


class BaseConv(Mixer):
  """A learnt filter per channel, gated by the current token.

  Attributes:
    taps: length of the filters: how far back a token can look.
  """

  taps: int = 1024

  strategies = ('channels',)

  def check(self, width):
    if self.taps < 1:
      raise ValueError(f'base_conv: taps={self.taps} must be at least 1')

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]

    def filters(key, shape, dtype):
      # Tap l has variance 1 / (l + 1) of a whole of 1: every octave of
      # distances weighs the same, and outputs start at the size of inputs.
      scale = 1 / jnp.arange(1, shape[0] + 1, dtype=dtype)
      scale = jnp.sqrt(scale / scale.sum())[:, None]
      return scale * jax.random.normal(key, shape, dtype)

    param = lambda name, init, *shape: place.whole(
      self.param(name, init, shape, self.policy.param_dtype)
    )
    kernel = param('kernel', filters, self.taps, width)
    mixed, memory = sequence.stream(
      attend, x, tokens, memory, weights=(kernel,)
    )
    bias = param('bias', nn.initializers.zeros, width)
    gate = Linear(width, bias=True, policy=self.policy, name='gate')(x)
    return gate * (mixed + bias.astype(mixed.dtype)), memory


def _flops(mixer, width, length):
  taps = min(mixer.taps, length)
  size = 1 << max(length + taps - 2, 1).bit_length()
  # Three real transforms, each half of 5 n log2(n), and their product.
  transforms = 3 * 2.5 * size * (size.bit_length() - 1) + 3 * size
  return round(transforms * width) + 2 * length * width * (width + 1)


def _state_bytes(mixer, width, length):
  number = jnp.dtype(mixer.policy.dtype).itemsize
  return length * (width * number + 3 * 4) + 4  # where tokens stand; used


SPEC = Spec(
  paper=(
    'Zoology: Measuring and Improving Recall in Efficient Language Models'
  ),
  authors='Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Re',
  year=2023,
  link='https://arxiv.org/abs/2312.04927',
  examples=({'taps': 16}, {'taps': 5}),
  flops=_flops,
  state_bytes=_state_bytes,
  layout='contiguous',
  fft=True,
)
