"""Induction: what stood behind this token when it was last seen?

Olsson, Elhage, Nanda et al., "In-context learning and induction heads", 2022,
https://arxiv.org/abs/2209.11895, found heads that do this in language models.
The task made of it, vocabulary 20 and length 30, is that of Fu, Dao, Saab,
Thomas, Rudra, Ré, "Hungry Hungry Hippos", 2022,
https://arxiv.org/abs/2212.14052.

The special token, id 0, stands somewhere in the row and once more at its end,
where the model must answer what followed the first one (vocabulary 6, length
10):

    inputs   3  5  0  2  4  1  5  3  2  0
    targets  .  .  .  .  .  .  .  .  .  2

Everything else is drawn from ids 1 .. vocab - 1, each as often, so the answer
may stand elsewhere in the row as well. The first special token is at place
0 .. length - 4, each as often: at least one token lies between the one to
remember and the question. Only the last place is asked: nothing else in the
row can be foretold.

Rows never come again; those of the paper were a finite set.
"""

import dataclasses
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

SPECIAL = 0

PRESETS = {
  'quick': {'vocab': 8, 'length': 16, 'test_rows': 512},
  'cpu': {'vocab': 20, 'length': 30, 'test_rows': 1024},
  'paper': {'vocab': 20, 'length': 30, 'test_rows': 5000},
}


def make(preset: str = 'quick', **fields: Any) -> 'Induction':
  """The task of a preset; fields given here replace the preset's."""
  return registry.configure(Induction, PRESETS, preset, fields)


@dataclasses.dataclass(frozen=True)
class Induction:
  """What followed the special token; see the top of this file.

  Attributes:
    vocab: number of token ids; id 0 is the special one.
    length: tokens a row, the question included.
    test_rows: rows of the test set.
    seed: every other seed is another draw of the same task.
  """

  vocab: int = 20
  length: int = 30
  test_rows: int = 5000
  seed: int = 0

  headline: ClassVar[str] = 'accuracy'
  better: ClassVar[str] = 'higher'
  asked: ClassVar[int] = 1  # positions a row at which weights are 1

  def __post_init__(self):
    if self.length < 4 or self.vocab < 3:
      raise ValueError(
        f'length={self.length} must be at least 4 (the special token, what '
        'follows it, something between, the question), '
        f'vocab={self.vocab} at least 3 (the special token and two others)'
      )
    if self.test_rows < 1 or self.seed < 0:
      raise ValueError(
        f'test_rows={self.test_rows} must be at least 1, seed={self.seed} '
        'at least 0'
      )

  @property
  def chance(self) -> dict[str, float]:
    """Scores of guessing among all values, without a look at the row."""
    values = self.vocab - 1
    return {'accuracy': 1 / values, 'loss': math.log(values)}

  def batch(self, split: str, step: int, rows: np.ndarray | range) -> Batch:
    """Rows of a step as numpy arrays; see `jaxattn.tasks.batch`.

    Raises:
      ValueError: an unknown split; a row that the split does not have.
    """
    rows = checked_rows(self, split, step, rows)
    key = draw.keys(self.seed, SPLITS.index(split), step, rows=rows)
    each = np.arange(len(key))
    inputs = 1 + draw.below(key, self.length, self.vocab - 1, stream=0)
    place = draw.below(key, 1, self.length - 3, stream=1)[:, 0]
    inputs[each, place] = SPECIAL
    inputs[:, -1] = SPECIAL
    targets = np.zeros(inputs.shape, np.int32)
    targets[:, -1] = inputs[each, place + 1]
    weights = np.zeros(inputs.shape, np.float32)
    weights[:, -1] = 1
    return Batch(inputs.astype(np.int32), targets, weights)

  def oracle(self, inputs: np.ndarray) -> np.ndarray:
    """The right answer wherever one may be asked, from the inputs alone.

    Args:
      inputs: 'b t' token ids.

    Returns:
      'b t': at the last place what followed the first special token, else 0.
      Its accuracy is 1.
    """
    inputs = np.asarray(inputs)
    answers = np.zeros_like(inputs)
    for row, answer in zip(inputs, answers):
      answer[-1] = row[row.tolist().index(SPECIAL) + 1]
    return answers

  def losses(self, logits, batch: Batch):
    """-log p of the right answer in nats, 'b t': what training lowers."""
    return nats(logits, batch.targets)

  def metrics(self, logits, batch: Batch) -> dict[str, tuple]:
    """(sum, count) of accuracy and of loss in nats, over the questions."""
    return {
      'accuracy': weighed(right(logits, batch.targets), batch.weights),
      'loss': weighed(self.losses(logits, batch), batch.weights),
    }

  def fingerprint(self) -> str:
    """16 hex digits that change when the data does."""
    return fingerprint(self, **dataclasses.asdict(self))
