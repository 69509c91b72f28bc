"""MQAR: multi-query associative recall.

Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré, "Zoology: Measuring
and improving recall in efficient language models", 2023,
https://arxiv.org/abs/2312.04927.

A row names `pairs` bindings and then asks for each of them once, at the place
where the key stands again (vocabulary 12, 2 pairs, length 16, filler 'zero'):

    inputs   2  8  4  7  0  0  4  0  0  0  0  0  2  0  0  0
    targets  .  .  .  .  .  .  7  .  .  .  .  .  8  .  .  .

Keys are ids 1 .. vocab/2 - 1 and values vocab/2 .. vocab - 1, each drawn
without replacement. The queries stand at even offsets behind the pairs: the
i-th key takes slot g - 1, at distance 2 (g - 1), where g = 1 .. (length - 2
pairs) / 2 is drawn with p(g) ~ a g^(a - 1) among the slots still free: small
`power` puts the questions close behind the pairs, power 1 anywhere.

As in the published generator `filler` is either 0 everywhere ('zero', what the
paper's figure 2 was trained on) or any id of the vocabulary ('random', the
generator's default). Random filler may repeat a key that is then not asked.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import numpy as np

from jaxattn.tasks import draw, registry
from jaxattn.tasks.batch import (
  SPLITS,
  Batch,
  checked_rows,
  fingerprint,
  nats,
  right,
  weighed,
)

# (length, pairs) of the paper, and the batch its code used for each length.
PUBLISHED = {
  'paper': {'length': 64, 'pairs': 4, 'step_rows': 512},
  'paper_128': {'length': 128, 'pairs': 8, 'step_rows': 512},
  'paper_256': {'length': 256, 'pairs': 16, 'step_rows': 256},
  'paper_512': {'length': 512, 'pairs': 64, 'step_rows': 128},
}
PRESETS = {
  # With few symbols attention finds the rule within a few hundred steps; at a
  # vocabulary of 64 it still guesses among the row's values by then.
  'quick': {'vocab': 32, 'length': 64, 'pairs': 4, 'test_rows': 512},
  'cpu': {'vocab': 8192, 'length': 64, 'pairs': 4, 'test_rows': 1024},
  **{
    name: {**setting, 'vocab': 8192, 'train_size': 100_000, 'test_rows': 3000}
    for name, setting in PUBLISHED.items()
  },
}


def make(preset: str = 'quick', **fields: Any) -> 'MQAR':
  """The task of a preset; fields given here replace the preset's."""
  return registry.configure(MQAR, PRESETS, preset, fields)


@dataclasses.dataclass(frozen=True)
class MQAR:
  """Multi-query associative recall; see the top of this file.

  Attributes:
    vocab: number of token ids; half of them keys (id 0 is none), half values.
    length: tokens a row.
    pairs: key-value pairs a row, each asked once; at most length / 4.
    power: the exponent a of the distances, in (0, 1]; 1 is uniform.
    filler: 'zero' or 'random', what stands where nothing else does.
    train_size: number of different training rows, gone through in a new order
      in every epoch; None for rows that never come again.
    step_rows: rows of a training step. Only a finite set needs to know, to
      tell where an epoch ends; with fewer rows than this in a step an epoch
      leaves out some rows at random.
    test_rows: rows of the test set.
    seed: every other seed is another draw of the same task.

  Training and test rows are independent draws, as in the published code;
  nothing but the number of possible rows keeps them apart.
  """

  vocab: int = 8192
  length: int = 64
  pairs: int = 4
  power: float = 0.01
  filler: str = 'zero'
  train_size: int | None = None
  step_rows: int | None = None
  test_rows: int = 3000
  seed: int = 0

  headline: ClassVar[str] = 'accuracy'
  better: ClassVar[str] = 'higher'

  def __post_init__(self):
    if self.pairs < 1 or 4 * self.pairs > self.length or self.length % 2:
      raise ValueError(
        f'pairs={self.pairs} and length={self.length}: the length must be even '
        'and at least 4 * pairs (a pair and its query take two places each)'
      )
    if self.vocab // 2 - 1 < self.pairs:
      raise ValueError(
        f'vocab={self.vocab} has {self.vocab // 2 - 1} keys, too few for '
        f'pairs={self.pairs} different ones'
      )
    if not 0 < self.power <= 1:
      raise ValueError(f'power={self.power} must be in (0, 1]')
    if self.filler not in ('zero', 'random'):
      raise ValueError(f"filler={self.filler!r} must be 'zero' or 'random'")
    if self.test_rows < 1 or self.seed < 0:
      raise ValueError(
        f'test_rows={self.test_rows} must be at least 1, seed={self.seed} '
        'at least 0'
      )
    if self.train_size is not None and (
      self.train_size < 1 or not self.step_rows or self.step_rows < 1
    ):
      raise ValueError(
        f'train_size={self.train_size} and step_rows={self.step_rows}: a '
        'finite training set has at least one row, and needs to know the rows '
        'of a step, step_rows, to tell where an epoch ends'
      )

  @property
  def asked(self) -> int:
    """Positions a row at which weights are 1."""
    return self.pairs

  @property
  def chance(self) -> dict[str, float]:
    """Scores of guessing among all values, without a look at the row."""
    values = self.vocab - self.vocab // 2
    return {'accuracy': 1 / values, 'loss': math.log(values)}

  @property
  def chance_in_row(self) -> dict[str, float]:
    """Scores of guessing among the row's own values, binding unknown.

    Where the question stands gives a little more away, since the first keys
    take the nearest slots: with 4 pairs, length 64 and power 0.01 the best
    guess from places alone is right in 0.29 of the cases instead of 0.25.
    """
    return {'accuracy': 1 / self.pairs, 'loss': math.log(self.pairs)}

  def batch(self, split: str, step: int, rows: np.ndarray | range) -> Batch:
    """Rows of a step as numpy arrays; see `jaxattn.tasks.batch`.

    Raises:
      ValueError: an unknown split; a row that the split does not have.
    """
    key = self._keys(split, step, checked_rows(self, split, step, rows))
    each = np.arange(len(key))[:, None]
    half = self.vocab // 2
    keys = 1 + draw.distinct(key, self.pairs, half - 1, stream=0)
    values = half + draw.distinct(key, self.pairs, self.vocab - half, stream=1)
    asked = 2 * self.pairs + 2 * self._slots(key)

    shape = (len(key), self.length)
    if self.filler == 'random':
      inputs = draw.below(key, self.length, self.vocab, stream=3)
    else:
      inputs = np.zeros(shape, np.int64)
    inputs[:, 0 : 2 * self.pairs : 2] = keys
    inputs[:, 1 : 2 * self.pairs : 2] = values
    inputs[each, asked] = keys
    targets = np.zeros(shape, np.int32)
    targets[each, asked] = values
    weights = np.zeros(shape, np.float32)
    weights[each, asked] = 1
    return Batch(inputs.astype(np.int32), targets, weights)

  def oracle(self, inputs: np.ndarray) -> np.ndarray:
    """The right answer wherever one may be asked, from the inputs alone.

    Args:
      inputs: 'b t' token ids.

    Returns:
      'b t': the value bound to the token, 0 where the token is no key of its
      row. Its accuracy is 1.
    """
    inputs = np.asarray(inputs)
    keys = inputs[:, 0 : 2 * self.pairs : 2]
    values = inputs[:, 1 : 2 * self.pairs : 2]
    same = inputs[:, :, None] == keys[:, None, :]
    return (same * values[:, None, :]).sum(-1)

  def losses(self, logits, batch: Batch):
    """-log p of the right answer in nats, 'b t': what training lowers."""
    return nats(logits, batch.targets)

  def metrics(self, logits, batch: Batch) -> dict[str, tuple]:
    """(sum, count) of accuracy and of loss in nats, over the queries."""
    return {
      'accuracy': weighed(right(logits, batch.targets), batch.weights),
      'loss': weighed(self.losses(logits, batch), batch.weights),
    }

  def fingerprint(self) -> str:
    """16 hex digits that change when the data does."""
    return fingerprint(self, **dataclasses.asdict(self))

  def _keys(self, split: str, step: int, rows: np.ndarray) -> np.ndarray:
    """The key of each row's random numbers."""
    side = SPLITS.index(split)
    if split == 'test' or not (self.train_size and self.step_rows):
      return draw.keys(self.seed, side, step, rows=rows)
    if (rows >= self.step_rows).any():
      raise ValueError(
        f'row {rows.max()} asked of a training step of '
        f'step_rows={self.step_rows}: rows would come twice in an epoch'
      )
    epoch, place = np.divmod(step * self.step_rows + rows, self.train_size)
    index = np.empty_like(rows)
    for number in np.unique(epoch):
      here = epoch == number
      order = _epoch_order(self.seed, int(number), self.train_size)
      index[here] = order[place[here]]
    return draw.keys(self.seed, side, 0, rows=index)

  def _slots(self, key: np.ndarray) -> np.ndarray:
    """A free slot for each pair, 'b pairs', nearer ones more likely.

    Drawing one after the other without replacement, each time in proportion
    to p, is a race of exponential clocks with rates p: the first clock to ring
    is slot g with probability p(g), and the clocks left forget (Efraimidis and
    Spirakis, 2006, https://doi.org/10.1016/j.ipl.2005.11.003).
    """
    slots = (self.length - 2 * self.pairs) // 2
    rate = np.arange(1, slots + 1) ** (self.power - 1)
    rings = -np.log(draw.uniform(key, slots, stream=2)) / rate
    return np.argsort(rings, axis=1, kind='stable')[:, : self.pairs]


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
  # The third word keeps these keys apart from those of the splits.
  return draw.permutation(seed, len(SPLITS), epoch, size=size)
