"""The few layers that every mechanism is made of: thin Linen, sharding-aware.

Stock `nn.Embed` and `nn.Dropout` fail under an Explicit mesh; these do not, and
they share one `Policy`, so that a mechanism need not carry fields for dtypes,
initialisers and dropout.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.packing import Packing
from jaxattn.parallel import place, sequence
from jaxattn.typing import Array, Float, Initializer, Int, PyTree, Stream
from pallas_kernels.dropout import kept

# LeCun's rule: outputs have the variance of the inputs.
lecun = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')


@dataclass(frozen=True)
class Policy:
  """What the layers of a model share.

  Attributes:
    dtype: what is computed in, by name; sums over time are float32 regardless.
    param_dtype: what weights are kept in.
    dropout: share of activations that training drops after each layer.
    kernel_init: initialiser of weight matrices (a jax initialiser).
    implementation: name of the kernel to use; None chooses.
    strategy: how devices work together on attention where time is spread over
      them, one of `parallel.sequence.STRATEGIES`; None chooses.
  """

  dtype: str = 'float32'
  param_dtype: str = 'float32'
  dropout: float = 0.0
  kernel_init: Initializer = lecun
  implementation: str | None = None
  strategy: str | None = None

  def __post_init__(self):
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout} must be in [0, 1)')
    for name in ('dtype', 'param_dtype'):
      if not jnp.issubdtype(jnp.dtype(getattr(self, name)), jnp.floating):
        raise ValueError(f'{name}={getattr(self, name)!r} is not a float type')
    if self.strategy not in (None, *sequence.STRATEGIES):
      raise ValueError(
        f'strategy={self.strategy!r} must be one of'
        f' {", ".join(sequence.STRATEGIES)}, or None to have one chosen'
      )

  @property
  def attention(self) -> dict[str, str | None]:
    """What `parallel.sequence.attention` is told."""
    return {'implementation': self.implementation, 'strategy': self.strategy}


class Linear(nn.Module):
  """y = x W (+ b), over the last `axes` axes of x 'b t ...', to `features`.

  `features` may be several: `Linear((heads, width))` maps 'b t m' to 'b t h d',
  and `Linear(m, axes=2)` maps it back.
  """

  features: int | tuple[int, ...]
  axes: int = 1
  bias: bool = False
  policy: Policy = Policy()
  kernel_init: Initializer | None = None
  bias_init: Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: Array) -> Array:
    features = self.features
    if isinstance(features, int):
      features = (features,)
    inputs = x.shape[x.ndim - self.axes :]
    dtype = self.policy.dtype
    init = self.kernel_init or self.policy.kernel_init

    def matrix(key, shape, param_dtype):  # fans are those of the flat matrix
      flat = (math.prod(inputs), math.prod(features))
      return init(key, flat, param_dtype).reshape(shape)

    kernel = self.param(
      'kernel', matrix, (*inputs, *features), self.policy.param_dtype
    )
    bias = ()
    if self.bias:
      init = self.bias_init
      bias = (self.param('bias', init, features, self.policy.param_dtype),)
    engine = functools.partial(linear, axes=self.axes)
    return sequence.run(engine, x.astype(dtype), weights=(kernel, *bias))


def linear(x, kernel, bias=None, *, axes):
  """x kernel + bias over the last axes of x, in the dtype of x."""
  last = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
  y = jax.lax.dot_general(x, kernel.astype(x.dtype), (last, ((), ())))
  return y if bias is None else y + bias.astype(x.dtype)


class Matrix(nn.Module):
  """The weights of a linear map alone, as they are stored."""

  inputs: int
  outputs: int
  policy: Policy = Policy()

  @nn.compact
  def __call__(self) -> Float[Array, 'm n']:
    shape = (self.inputs, self.outputs)
    init = self.policy.kernel_init
    return self.param('kernel', init, shape, self.policy.param_dtype)


class Embed(nn.Module):
  """A table of `vocab` rows; `attend` reads it backwards, as tied logits."""

  vocab: int
  features: int
  policy: Policy = Policy()

  def setup(self):
    # Rows of norm near 1, so that tied logits start near the uniform guess.
    self.table = self.param(
      'table',
      nn.initializers.normal(self.features**-0.5),
      (self.vocab, self.features),
      self.policy.param_dtype,
    )

  def __call__(self, ids: Int[Array, 'b t']) -> Stream:
    look_up = lambda ids, table: table[ids].astype(self.policy.dtype)
    return sequence.run(look_up, ids, weights=(self.table,))

  def attend(
    self,
    x: Stream,
    read: Callable[..., PyTree] = lambda logits: logits,
    *arrays: PyTree,
    block: int | None = None,
  ) -> PyTree:
    """`read(logits, *arrays)`, of logits 'b t v' in float32 or wider.

    Args:
      x: the stream.
      read: what becomes of each token's logits; by default they are returned.
      *arrays: pytrees of 'b t ...' that `read` takes as well.
      block: tokens at a time, so that no more logits than theirs ever exist.
    """

    def engine(x, *arrays_and_table):
      *arrays, table = arrays_and_table
      logits = jnp.einsum('btm,vm->btv', x, table.astype(x.dtype))
      exact = jnp.promote_types(logits.dtype, jnp.float32)
      return read(logits.astype(exact), *arrays)

    weights = (self.table,)
    return sequence.run(engine, x, *arrays, weights=weights, block=block)


class Norm(nn.Module):
  """Root-mean-square norm with a gain (Zhang, Sennrich 2019, 1910.07467)."""

  policy: Policy = Policy()
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    gain = self.param(
      'gain', nn.initializers.ones, x.shape[-1:], self.policy.param_dtype
    )
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
    y = exact * jax.lax.rsqrt(square + self.epsilon)
    return (y * place.whole(gain)).astype(self.policy.dtype)


class Dropout(nn.Module):
  """Drops activations at the policy's rate, and scales up what stays.

  Which ones is a function of row, document, order and channel: it is the same
  wherever tokens lie, in a row and over devices.
  """

  policy: Policy = Policy()

  @nn.compact
  def __call__(
    self, x: Stream, packing: Packing | None, deterministic: bool
  ) -> Stream:
    rate = self.policy.dropout
    if deterministic or rate == 0:
      return x

    def engine(x, numbers, seed):
      numbers = (n[..., None] for n in numbers)
      keep = kept(rate, seed, *numbers, jnp.arange(x.shape[-1]))
      return jnp.where(keep, x / (1 - rate), 0)

    rows, length, _ = x.shape
    packing = packing or Packing.dense(rows, length)
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, length))
    numbers = row, packing.segments, packing.order
    seed = jax.random.bits(self.make_rng('dropout'))
    return sequence.run(engine, x, numbers, weights=(seed,))


class ShortConv(nn.Module):
  """The weights of a depthwise causal convolution over the last `taps` tokens.

  It starts as the identity plus noise, so that a layer begins near to one
  without convolution. `core.conv.short` applies the kernel.
  """

  taps: int
  policy: Policy = Policy()

  @nn.compact
  def __call__(self, width: int) -> Float[Array, 'w m']:
    def init(key, shape, dtype):
      noise = jax.random.uniform(
        key, shape, dtype, -(self.taps**-0.5), self.taps**-0.5
      )
      return noise.at[-1].add(1.0)

    kernel = self.param(
      'kernel', init, (self.taps, width), self.policy.param_dtype
    )
    return place.whole(kernel)
