"""What every task hands out, and what every task measures with.

A task is one file with a frozen dataclass whose fields are its whole
configuration. Its batches are a pure function of (seed, split, step, row):

- `batch('train', step, rows)`: row r of step s is the same whatever other rows
  are asked for with it, so hosts may each ask for their own, and a run resumes
  by its step number alone.
- `batch('test', 0, rows)`: the test set is one long batch of `test_rows` rows.
  Read it in pieces of any size: `range(0, 64)`, `range(64, 128)`, ...

Beside it stand

- `length`, `asked` (positions a row that count), and what a model must know:
  `vocab` where inputs are token ids, else `features` and `outputs`, the numbers
  that come in and go out at every position;
- `losses(outputs, batch)`, 'b t', what training lowers at each position: `nats`
  for token ids; `metrics(outputs, batch)`, (sum, count) by name; `headline`,
  the name of the one that tells most, and `better`, 'lower' or 'higher'. Rows
  may come with padding of weight 0 behind their `length` tokens;
- `chance`, scores of a guess, and `oracle`, who answers from the inputs alone
  as well as anyone can (None where nobody knows how);
- `fingerprint()`, and in the module `PRESETS` and `make(preset, **fields)`.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.packing import Packing

SPLITS = ('train', 'test')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Inputs, and what should be answered where; a pytree.

  Targets stand at the position that must answer: they are shifted here, in the
  data, and a model never slices time.
  """

  inputs: Any  # 'b t' int32: token ids; or 'b t f' float32: features
  targets: Any  # 'b t' like the inputs: the answer; 0 where none is asked
  weights: Any  # 'b t' float32: 1 where an answer is asked, else 0
  packing: Packing | None = None  # None: one dense segment a row


def nats(logits, targets) -> jax.Array:
  """-log p(target), 'b t', of logits 'b t vocab', computed in float32 at least.

  The target's logit is picked by comparing and summing: unlike a gather that
  works as it is when the vocabulary is spread over devices.
  """
  logits = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
  hit = jnp.arange(logits.shape[-1]) == targets[..., None]
  chosen = jnp.where(hit, logits, 0).sum(-1)
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def right(logits, targets) -> jax.Array:
  """1 where the largest logit is the target's, else 0; 'b t' float32."""
  return (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


def weighed(values, weights) -> tuple[jax.Array, jax.Array]:
  """(sum, count) of the values that are asked for.

  Pairs add up over batches and hosts; divide at the very end.
  """
  return jnp.sum(values * weights), jnp.sum(weights)


def checked_rows(task, split: str, step: int, rows) -> np.ndarray:
  """`rows` as an array, or ValueError for a batch that does not exist."""
  rows = np.asarray(rows, np.int64)
  if split not in SPLITS:
    raise ValueError(f'split={split!r}; known splits: {", ".join(SPLITS)}')
  if rows.ndim != 1 or (rows < 0).any() or step < 0:
    raise ValueError(
      f'rows must be a list of integers >= 0, step >= 0; '
      f'got step={step}, rows={rows.tolist()}'
    )
  if split == 'test' and step != 0:
    raise ValueError(
      f'step={step}: the test set is one batch, step 0, of {task.test_rows} '
      f'rows; ask for other rows instead'
    )
  if split == 'test' and (rows >= task.test_rows).any():
    raise ValueError(
      f'row {rows.max()} asked of a test set of test_rows={task.test_rows}'
    )
  return rows


def fingerprint(task, **source: Any) -> str:
  """16 hex digits that change when the data changes.

  They cover `source` (the task's fields, or what stands for them) and a row of
  each split, so that a changed generator shows as well.
  """
  sha = hashlib.sha256(json.dumps(source, sort_keys=True).encode())
  for split in SPLITS:
    sample = task.batch(split, 0, range(1))
    for array in (sample.inputs, sample.targets, sample.weights):
      sha.update(np.ascontiguousarray(array).tobytes())
  return sha.hexdigest()[:16]
