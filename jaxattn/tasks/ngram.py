"""What a byte model is measured against, on the bytes that it is measured on.

- uniform: 8 bits.
- unigram, 5-gram: counts of the training text, backed off by interpolation
  (Witten and Bell, 1991, https://doi.org/10.1109/18.87000, method C):

      p(c | h) = (n(hc) + d(h) p(c | h')) / (n(h) + d(h))

  n counts occurrences, d(h) the different bytes seen behind the context h, and
  h' is h without its oldest byte. d(h) is the weight of "something new came"
  (once for each of the different bytes it has been true); the empty context
  backs off to 1/256. Where h was never seen p(c | h) = p(c | h').
- xz -9: the held-out bytes alone, compressed without the training text.

An n-gram sees what the model sees: the first byte of a row is predicted from
one byte of context, never from what lies before the crop.

Counting needs no table. All training 5-grams, packed most significant byte
first, are sorted once; whatever begins with the same bytes is then an interval,
so two binary searches count a string of any length up to 5.
"""

import lzma

import numpy as np

from jaxattn.tasks.bytes import Bytes

# Sorting takes 16 bytes of memory a training byte.
MOST = 1 << 27


def references(task: Bytes, order: int = 5) -> dict[str, float]:
  """Bits per byte of the reference models on the whole test set of a task.

  Counts are taken over the whole training text, or over its first 128 MiB.
  """
  rows = task.batch('test', 0, range(task.test_rows))
  train = np.asarray(task.corpus.train[:MOST])
  bits = surprisal(train, rows.inputs, rows.targets, order).mean(axis=(1, 2))
  targets = rows.targets.astype(np.uint8).tobytes()
  return {
    'uniform': 8.0,
    'unigram': float(bits[0]),
    f'{order}-gram': float(bits[-1]),
    'xz -9': 8 * len(lzma.compress(targets, preset=9)) / len(targets),
  }


def surprisal(
  train: np.ndarray, inputs: np.ndarray, targets: np.ndarray, order: int = 5
) -> np.ndarray:
  """-log2 p(target) under the interpolated n-grams of 1 up to `order` bytes.

  Args:
    train: uint8, the text to count in; it is closed by order - 1 NULs.
    inputs: 'b t', the contexts: target i follows input i.
    targets: 'b t'.
    order: the longest string counted, 1 to 7 bytes.

  Returns:
    'order b t' float64, bits; row n - 1 is the n-gram model.
  """
  if not 1 <= order <= 7:  # one byte of a uint64 stays free for "the next"
    raise ValueError(f'order={order} must be between 1 and 7')
  inputs, targets = inputs.astype(np.uint64), targets.astype(np.uint64)
  grams = np.zeros(len(train), np.uint64)
  padded = np.concatenate([train, np.zeros(order - 1, np.uint8)])
  for i in range(order):
    grams = (grams << 8) | padded[i : i + len(train)]
  grams.sort()

  length = targets.shape[1]
  bits = np.empty((order, *targets.shape))
  p = np.full(targets.shape, 1 / 256)
  for n in range(1, order + 1):
    # Only positions from `first` on have the n - 1 bytes of context.
    first = max(n - 2, 0)
    width = max(length - first, 0)
    context = np.zeros((len(targets), width), np.uint64)
    for back in range(n - 1):
      context |= inputs[:, first - back :][:, :width] << (8 * back)
    strings = (context << 8) | targets[:, first:]
    seen = _between(grams, context, 8 * (order - n + 1))
    hits = _between(grams, strings, 8 * (order - n))
    kinds = _between(_different(grams >> (8 * (order - n))), context, 8)
    mixed = (hits + kinds * p[:, first:]) / np.maximum(seen + kinds, 1)
    p[:, first:] = np.where(seen > 0, mixed, p[:, first:])
    bits[n - 1] = -np.log2(p)
  return bits


def _between(ordered: np.ndarray, prefix: np.ndarray, shift: int) -> np.ndarray:
  """How many begin with each prefix; `shift` is the width of what follows."""
  prefixes, where = np.unique(prefix, return_inverse=True)
  low = np.searchsorted(ordered, prefixes << shift)
  high = np.searchsorted(ordered, (prefixes + 1) << shift)
  return (high - low)[where].reshape(prefix.shape)


def _different(ordered: np.ndarray) -> np.ndarray:
  """The different values of a sorted array."""
  new = np.ones(len(ordered), bool)
  np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
  return ordered[new]
