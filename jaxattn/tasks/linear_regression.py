"""Linear regression in context: the layer must fit, not remember.

Garg, Tsipras, Liang, Valiant, "What can transformers learn in-context? A case
study of simple function classes", 2022, https://arxiv.org/abs/2208.01066; each
pair is one token, as in von Oswald et al., "Transformers learn in-context by
gradient descent", 2022, https://arxiv.org/abs/2212.07677.

Every row has weights w ~ N(0, I) of its own and shows them through `pairs`
points x_i ~ N(0, I) of dimension d, y_i = w.x_i + noise * N(0, 1). Its last
token asks for another point:

    inputs   [x_1, y_1]  [x_2, y_2]  ..  [x_N, y_N]  [x_q, 0]
    targets      .           .               .        w.x_q

Inputs are 'b t d+1' and targets 'b t', float32. Weights are 1 at the last token
alone. The target itself has no noise, so E target^2 = d, and the score is

    normalised error = E (answer - target)^2 / d        answering 0 scores 1

It can be held against what theory says: see `least_squares` and
`linear_attention`; `oracle` is the best that anyone can answer.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxattn.tasks import draw, registry
from jaxattn.tasks.batch import (
  SPLITS,
  Batch,
  checked_rows,
  fingerprint,
  weighed,
)

PRESETS = {
  'quick': {'dimension': 4, 'pairs': 10, 'test_rows': 2048},
  'cpu': {'dimension': 8, 'pairs': 20, 'test_rows': 4096},
  'paper': {'dimension': 20, 'pairs': 40, 'test_rows': 4096},
}


def make(preset: str = 'quick', **fields: Any) -> 'LinearRegression':
  """The task of a preset; fields given here replace the preset's."""
  return registry.configure(LinearRegression, PRESETS, preset, fields)


@dataclasses.dataclass(frozen=True)
class LinearRegression:
  """Linear regression in context; see the top of this file.

  Attributes:
    dimension: d of the points.
    pairs: N, points shown with their values.
    noise: standard deviation of what is added to the values shown.
    test_rows: rows of the test set.
    seed: every other seed is another draw of the same task.
  """

  dimension: int = 20
  pairs: int = 40
  noise: float = 0.0
  test_rows: int = 4096
  seed: int = 0

  headline: ClassVar[str] = 'normalised_error'
  better: ClassVar[str] = 'lower'
  outputs: ClassVar[int] = 1  # numbers that a model answers a position
  asked: ClassVar[int] = 1  # positions a row at which weights are 1

  def __post_init__(self):
    if self.dimension < 1 or self.pairs < 1:
      raise ValueError(
        f'dimension={self.dimension} and pairs={self.pairs} must be at least 1'
      )
    if not (self.noise >= 0 and math.isfinite(self.noise)):
      raise ValueError(f'noise={self.noise} must be at least 0, and finite')
    if self.test_rows < 1 or self.seed < 0:
      raise ValueError(
        f'test_rows={self.test_rows} must be at least 1, seed={self.seed} '
        'at least 0'
      )

  @property
  def length(self) -> int:
    """Tokens a row: the pairs and the question."""
    return self.pairs + 1

  @property
  def features(self) -> int:
    """Numbers a token: a point and its value."""
    return self.dimension + 1

  @property
  def chance(self) -> dict[str, float]:
    """Scores of answering 0, without a look at the row."""
    return {'normalised_error': 1.0, 'loss': float(self.dimension)}

  def least_squares(self, pairs: int | None = None) -> float:
    """Normalised error of least squares, of least norm where that is open.

    Of w it finds the part in the span of the n points, of which a share n / d
    is to be expected; so 1 - n / d is missed, and nothing from n = d on. Noise
    adds noise^2 / d times the trace of an inverse Wishart matrix, whose mean is
    n / (d - n - 1) for n < d - 1, d / (n - d - 1) for n > d + 1, and infinite
    in between.

    Args:
      pairs: n; None means the task's own.
    """
    d, n = self.dimension, self.pairs if pairs is None else pairs
    missed = max(1 - n / d, 0.0)
    if self.noise == 0 or n == 0:
      return missed
    if abs(n - d) <= 1:
      return math.inf
    return missed + self.noise**2 / d * min(n, d) / (abs(n - d) - 1)

  def linear_attention(self, pairs: int | None = None) -> float:
    """Normalised error of the best single layer of linear attention.

    At its optimum (Zhang, Frei, Bartlett, "Trained transformers learn linear
    models in-context", 2023, https://arxiv.org/abs/2306.09927) the layer makes
    one step of gradient descent from 0, of the best size a:

        answer = a/N sum_i (x_q.x_i) y_i = a x_q.(S w + e)    S = X^T X / N

    E S = I and E S^2 = (1 + (d + 1) / N) I, and e = X^T noise / N has variance
    noise^2 / N in each direction, so the normalised error is

        1 - 2 a + a^2 (N + d + 1 + noise^2) / N

    least at a = N / (N + d + 1 + noise^2), where it is 1 - a: without noise
    (d + 1) / (N + d + 1).

    Args:
      pairs: N; None means the task's own.
    """
    n = self.pairs if pairs is None else pairs
    rest = self.dimension + 1 + self.noise**2
    return rest / (n + rest)

  def batch(self, split: str, step: int, rows: np.ndarray | range) -> Batch:
    """Rows of a step as numpy arrays; see `jaxattn.tasks.batch`.

    Raises:
      ValueError: an unknown split; a row that the split does not have.
    """
    rows = checked_rows(self, split, step, rows)
    key = draw.keys(self.seed, SPLITS.index(split), step, rows=rows)
    d, shape = self.dimension, (len(key), self.length)
    w = draw.normal(key, d, stream=0)
    x = draw.normal(key, self.length * d, stream=1).reshape(*shape, d)
    clean = (x * w[:, None, :]).sum(-1)
    noise = draw.normal(key, self.length, stream=2)
    y = clean + self.noise * noise
    y[:, -1] = 0
    inputs = np.concatenate([x, y[:, :, None]], axis=-1, dtype=np.float32)
    targets = np.zeros(shape, np.float32)
    targets[:, -1] = clean[:, -1]
    weights = np.zeros(shape, np.float32)
    weights[:, -1] = 1
    return Batch(inputs, targets, weights)

  def oracle(self, inputs: np.ndarray) -> np.ndarray:
    """The best answer that there is, from the inputs alone.

    The mean of w given the pairs is Bayes-optimal for squared errors. With
    noise it is ridge regression,

        w = (X^T X + noise^2 I)^-1 X^T y

    and its limit without noise is least squares of least norm.

    Args:
      inputs: 'b t d+1'.

    Returns:
      'b t 1' float64, as a model answers: at the last token x_q.w, else 0.
    """
    inputs = np.asarray(inputs, np.float64)
    x, y = inputs[:, :-1, :-1], inputs[:, :-1, -1:]
    if self.noise:
      across = np.swapaxes(x, 1, 2)
      gram = across @ x + self.noise**2 * np.eye(self.dimension)
      w = np.linalg.solve(gram, across @ y)
    else:
      w = np.linalg.pinv(x) @ y
    answers = np.zeros((*inputs.shape[:2], 1))
    answers[:, -1:] = inputs[:, -1:, :-1] @ w
    return answers

  def losses(self, outputs, batch: Batch):
    """Squared errors of outputs 'b t 1', 'b t': what training lowers."""
    exact = jnp.promote_types(jnp.float32, outputs.dtype)
    return jnp.square(outputs[..., 0].astype(exact) - batch.targets)

  def metrics(self, outputs, batch: Batch) -> dict[str, tuple]:
    """(sum, count) of the normalised and of the plain squared error."""
    loss = self.losses(outputs, batch)
    return {
      'normalised_error': weighed(loss / self.dimension, batch.weights),
      'loss': weighed(loss, batch.weights),
    }

  def fingerprint(self) -> str:
    """16 hex digits that change when the data does."""
    return fingerprint(self, **dataclasses.asdict(self))
