"""Dropout of attention weights that is the same for every layout and mesh.

Whether a weight is dropped is a function of (seed, batch, head, segment, order
of the query, order of the key): of data that travels with the tokens, never of
where they lie in an array, so blocks, packing, striping and caching leave it
alone. What a query contributes is hashed before, what a key contributes too,
and a tile only mixes the two.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks import Tokens
from pallas_kernels.scores import Score


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
  """Drops weights after the softmax; the others grow by 1 / (1 - rate).

  Attributes:
    rate: the share that is dropped, in [0, 1): a Python number.
    seed: an integer, or an array of one; of a key `jax.random.bits(key)`.
    batch: integers 'b' that number the rows, 0, 1, ... by default: to be given
      where a call holds some rows of a larger batch only.
    heads: likewise integers 'h' of the heads.
  """

  rate: float = dataclasses.field(metadata={'static': True})
  seed: jax.Array | int
  batch: jax.Array | None = None
  heads: jax.Array | None = None

  def score(self, rows: int, heads: int, query: Tokens, key: Tokens) -> Score:
    """It as a modification of the weights.

    Raises:
      ValueError: the rate is not in [0, 1), or numbers are missing.
    """
    if not 0 <= self.rate < 1:
      raise ValueError(f'dropout: rate={self.rate} must be in [0, 1)')
    row = _numbers('batch', self.batch, rows)[:, None, None]
    head = _numbers('heads', self.heads, heads)
    order = query.side.order[..., None]
    segment = 1 if query.segments is None else query.segments[..., None]
    seed = _seed(self.seed).reshape(1, 1, 1)
    of_query = functools.reduce(_then, (row, head, segment, order), _mix(seed))
    of_key = _mix(key.side.order[..., None].astype(jnp.uint32) + _GOLDEN)
    return Score(Keep(self.rate), queries=(of_query,), keys=(of_key,))


@dataclasses.dataclass(frozen=True)
class Keep:
  """p / (1 - rate) where the hash of query and key says keep, else 0."""

  rate: float

  def __call__(self, p, query, key, of_query, of_key):
    bits = _mix(of_query ^ of_key) >> 8  # 24 bits: comparable as signed, too
    kept = bits.astype(jnp.int32) >= round(self.rate * 2**24)
    return jnp.where(kept, p / (1 - self.rate), 0)


def kept(rate: float, seed: jax.Array | int, *numbers: jax.Array) -> jax.Array:
  """Whether something stays, by numbers that tell it from all others.

  Args:
    rate: the share that is dropped, in [0, 1): a Python number.
    seed: as of `Dropout`.
    *numbers: integers of shapes that broadcast.
  """
  hashed = functools.reduce(_then, numbers, _mix(_seed(seed)))
  return (hashed >> 8) >= round(rate * 2**24)


def _seed(seed):
  if isinstance(seed, int):
    return jnp.uint32(seed % 2**32)
  seed = jnp.asarray(seed)
  if not jnp.issubdtype(seed.dtype, jnp.integer) or seed.size != 1:
    raise ValueError(
      f'dropout: the seed is one integer, not {seed.dtype}{list(seed.shape)};'
      ' of a key it is jax.random.bits(key)'
    )
  return seed.astype(jnp.uint32)


_GOLDEN = np.uint32(0x9E3779B9)


def _then(seen, new):
  return _mix(seen ^ _mix(jnp.asarray(new).astype(jnp.uint32) + _GOLDEN))


def _mix(x):
  """A bijection of uint32 in which every bit of x sways every bit.

  Constants of the search by Wellons 2018, https://github.com/skeeto/hash-prospector.
  """
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _numbers(name, given, count):
  numbers = jnp.arange(count) if given is None else jnp.asarray(given)
  if numbers.shape != (count,):
    raise ValueError(
      f'dropout: {name} must have shape {(count,)}, not {numbers.shape}'
    )
  return numbers
