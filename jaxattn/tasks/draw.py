"""Random numbers as a pure function of what they are for.

A batch must not depend on how it is cut over hosts, on what was drawn before
it, or on the version of a library's generator. So nothing here has a state:
each row of a batch has a 64-bit key, hashed from (seed, split, step, row), and
the i-th number of a row is a hash of its key and i.

The hash is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", 2014, https://doi.org/10.1145/2660193.2660195): output i of
the generator with state `key` is mix(key + i * GOLDEN), so any output can be
had without those before it. Integers modulo 2^64 only: every platform agrees.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, made odd


def keys(*words: int, rows: np.ndarray) -> np.ndarray:
  """One uint64 key a row; other words, or other rows, give unrelated keys."""
  key = np.zeros(1, np.uint64)
  for word in (*words, rows):
    word = np.atleast_1d(np.asarray(word)).astype(np.uint64)
    key = _mix(key ^ _mix(word + GOLDEN))
  return key


def bits(key: np.ndarray, n: int, stream: int) -> np.ndarray:
  """n uniform uint64 a row, 'b n'; streams of the same key do not overlap."""
  count = np.arange(1, n + 1, dtype=np.uint64) + (np.uint64(stream) << 32)
  return _mix(key[:, None] + count * GOLDEN)


def uniform(key: np.ndarray, n: int, stream: int) -> np.ndarray:
  """n float64 a row in the open interval (0, 1), 'b n'."""
  return ((bits(key, n, stream) >> 11) + 0.5) * 2.0**-53


def below(key: np.ndarray, n: int, bound: int, stream: int) -> np.ndarray:
  """n integers a row in [0, bound), 'b n'; the bias is under bound / 2^64."""
  return (bits(key, n, stream) % np.uint64(bound)).astype(np.int64)


def distinct(key: np.ndarray, n: int, bound: int, stream: int) -> np.ndarray:
  """n different integers a row in [0, bound), in random order, 'b n'.

  Floyd's algorithm (Bentley, "A sample of brilliance", 1987): every subset is
  equally likely after n steps, however large `bound` is. Its order is not, so
  it is shuffled.
  """
  draws = bits(key, 2 * n, stream)
  chosen = np.empty((len(key), n), np.int64)
  for i in range(n):
    last = bound - n + i
    pick = (draws[:, i] % np.uint64(last + 1)).astype(np.int64)
    taken = (chosen[:, :i] == pick[:, None]).any(axis=1)
    chosen[:, i] = np.where(taken, last, pick)
  order = np.argsort(draws[:, n:], axis=1, kind='stable')
  return np.take_along_axis(chosen, order, axis=1)


def normal(key: np.ndarray, n: int, stream: int) -> np.ndarray:
  """n float64 a row, standard normal, 'b n'.

  Box and Muller, "A note on the generation of random normal deviates", 1958,
  https://doi.org/10.1214/aoms/1177706645: a point of the plane has a uniform
  angle, and its squared radius is exponential. Here alone platforms may differ
  in the last bit of float64; float32 next to never shows it.
  """
  pairs = -(-n // 2)
  u = uniform(key, 2 * pairs, stream).reshape(len(key), pairs, 2)
  radius = np.sqrt(-2 * np.log(u[:, :, 0]))
  angle = 2 * np.pi * u[:, :, 1]
  points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
  return points.reshape(len(key), 2 * pairs)[:, :n]


def permutation(*words: int, size: int) -> np.ndarray:
  """A random order of range(size)."""
  return np.argsort(keys(*words, rows=np.arange(size)), kind='stable')


def _mix(x: np.ndarray) -> np.ndarray:
  x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> 31)
