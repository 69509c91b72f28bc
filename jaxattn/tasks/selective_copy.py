"""Selective copying: remember what matters, pass over what does not.

Gu, Dao, "Mamba: Linear-time sequence modeling with selective state spaces",
2023, https://arxiv.org/abs/2312.00752; at the sizes of Poli et al.,
"Mechanistic design and scaling of hybrid architectures" (MAD), 2024,
https://arxiv.org/abs/2403.17844.

Tokens to copy stand scattered among noise, then come as many markers, and the
i-th marker asks for the i-th token (vocabulary 6, 3 to copy, length 12):

    inputs   0  4  0  0  2  0  0  0  5  1  1  1
    targets  .  .  .  .  .  .  .  .  .  4  2  5

Id 0 is noise, id 1 the marker, and the tokens are drawn from ids 2 .. vocab - 1
with replacement. Every choice of their places is equally likely. Weights are 1
at the markers alone, so the loss covers `tokens` places a row; an answer stands
at the marker that asks for it and is nowhere fed back in.

MAD's own rows have one marker and blanks behind it, and places that are not
quite equally likely; its count of tokens and symbols is the same.
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

NOISE, MARKER, FIRST = 0, 1, 2  # tokens to copy are ids from FIRST on

PRESETS = {
  'quick': {'vocab': 8, 'length': 32, 'tokens': 4, 'test_rows': 512},
  'cpu': {'vocab': 16, 'length': 64, 'tokens': 8, 'test_rows': 1024},
  'paper': {'vocab': 16, 'length': 256, 'tokens': 16, 'test_rows': 1280},
  # The length that Mamba was tried at.
  'paper_4096': {'vocab': 16, 'length': 4096, 'tokens': 16, 'test_rows': 1280},
}


def make(preset: str = 'quick', **fields: Any) -> 'SelectiveCopy':
  """The task of a preset; fields given here replace the preset's."""
  return registry.configure(SelectiveCopy, PRESETS, preset, fields)


@dataclasses.dataclass(frozen=True)
class SelectiveCopy:
  """Copying out of noise; see the top of this file.

  Attributes:
    vocab: number of token ids; all but the noise and the marker are copied.
    length: tokens a row, the markers included.
    tokens: how many are to be copied; at most half of the length.
    test_rows: rows of the test set.
    seed: every other seed is another draw of the same task.
  """

  vocab: int = 16
  length: int = 256
  tokens: int = 16
  test_rows: int = 1280
  seed: int = 0

  headline: ClassVar[str] = 'accuracy'
  better: ClassVar[str] = 'higher'

  def __post_init__(self):
    if self.tokens < 1 or 2 * self.tokens > self.length:
      raise ValueError(
        f'tokens={self.tokens} and length={self.length}: a row has at least '
        'one token to copy, and each takes two places, its own and a marker'
      )
    if self.vocab < FIRST + 2:
      raise ValueError(
        f'vocab={self.vocab} must be at least {FIRST + 2}: noise, the marker, '
        'and two tokens to tell apart'
      )
    if self.test_rows < 1 or self.seed < 0:
      raise ValueError(
        f'test_rows={self.test_rows} must be at least 1, seed={self.seed} '
        'at least 0'
      )

  @property
  def asked(self) -> int:
    """Positions a row at which weights are 1."""
    return self.tokens

  @property
  def chance(self) -> dict[str, float]:
    """Scores of guessing among all tokens, without a look at the row."""
    values = self.vocab - FIRST
    return {'accuracy': 1 / values, 'loss': math.log(values)}

  def batch(self, split: str, step: int, rows: np.ndarray | range) -> Batch:
    """Rows of a step as numpy arrays; see `jaxattn.tasks.batch`.

    Raises:
      ValueError: an unknown split; a row that the split does not have.
    """
    rows = checked_rows(self, split, step, rows)
    key = draw.keys(self.seed, SPLITS.index(split), step, rows=rows)
    each = np.arange(len(key))[:, None]
    field = self.length - self.tokens  # where the markers begin
    tokens = FIRST + draw.below(key, self.tokens, self.vocab - FIRST, stream=0)
    places = np.sort(draw.distinct(key, self.tokens, field, stream=1), axis=1)
    shape = (len(key), self.length)
    inputs = np.full(shape, NOISE, np.int32)
    inputs[each, places] = tokens
    inputs[:, field:] = MARKER
    targets = np.zeros(shape, np.int32)
    targets[:, field:] = tokens
    weights = np.zeros(shape, np.float32)
    weights[:, field:] = 1
    return Batch(inputs, targets, weights)

  def oracle(self, inputs: np.ndarray) -> np.ndarray:
    """The right answer wherever one may be asked, from the inputs alone.

    Args:
      inputs: 'b t' token ids.

    Returns:
      'b t': at the markers the tokens to copy, in order, else 0. Its accuracy
      is 1.
    """
    inputs = np.asarray(inputs)
    answers = np.zeros_like(inputs)
    for row, answer in zip(inputs, answers):
      answer[row == MARKER] = row[row >= FIRST]
    return answers

  def losses(self, logits, batch: Batch):
    """-log p of the right answer in nats, 'b t': what training lowers."""
    return nats(logits, batch.targets)

  def metrics(self, logits, batch: Batch) -> dict[str, tuple]:
    """(sum, count) of accuracy and of loss in nats, over the markers."""
    return {
      'accuracy': weighed(right(logits, batch.targets), batch.weights),
      'loss': weighed(self.losses(logits, batch), batch.weights),
    }

  def fingerprint(self) -> str:
    """16 hex digits that change when the data does."""
    return fingerprint(self, **dataclasses.asdict(self))
