"""Which tiles a kernel visits, against every pair of tokens."""

import numpy as np
import pytest

from pallas_kernels import masks, runs
from pallas_kernels.masks import Causal, Everything, Sinks, Window
from pallas_kernels.problem import one_segment
from pallas_kernels.runs import CLEAR, CLEAR_END, COUNT, FIRST, JUMP, TOTAL

Q, K = 4, 8
ROWS = np.arange(48)[None]
DOCUMENTS = np.repeat([1, 2, 3, 0], [16, 12, 12, 8])[None]
CASES = {
  'everything': (Everything(), ROWS, None),
  'causal': (Causal(), ROWS, None),
  'window': (Causal() & Window(9), ROWS, None),
  'window and sinks': (Causal() & (Window(9) | Sinks(4)), ROWS, None),
  'striped': (Causal(), np.concatenate([ROWS, ROWS * 2 + 1]), None),
  'packed': (Causal(), ROWS, DOCUMENTS),
  'all ahead': (~Causal(), ROWS, None),
}


@pytest.mark.parametrize('by_query', [True, False])
def test_a_table_has_the_rows_of_any_array(by_query):
  """Which those who read it count, whatever the mask reads."""
  one = tokens(ROWS, None)
  tags = {'position': np.concatenate([ROWS, ROWS])}
  two = one._replace(side=masks.Side(one.side.order, tags))
  for query, key in ((two, two), (two, one), (one, two)):
    table = runs.table(Causal(), query, key, Q, K, by_query)
    alone = runs.table(Causal(), one, one, Q, K, by_query)
    assert table.tolist() == 2 * alone.tolist()


def tokens(order, segments):
  side = masks.Side(order.astype(np.int32), {})
  return one_segment(masks.Tokens(side, segments))


@pytest.mark.parametrize('by_query', [True, False])
@pytest.mark.parametrize('name', CASES)
def test_runs_are_the_tiles_that_are_not_empty(name, by_query):
  mask, order, segments = CASES[name]
  every = tokens(order, segments)
  table = runs.table(mask, every, every, Q, K, by_query)
  query = masks.Side(order[:, :, None], {})
  key = masks.Side(order[:, None], {})
  seen = np.broadcast_to(mask(query, key), (len(order), 48, 48))
  if segments is not None:
    one, other = segments[:, :, None], segments[:, None]
    seen = seen & (one == other) & (other != 0)
  seen = seen.reshape(len(order), 48 // Q, Q, 48 // K, K)
  some, all_ = seen.any((2, 4)), seen.all((2, 4))
  if not by_query:
    some, all_ = some.swapaxes(1, 2), all_.swapaxes(1, 2)
  table = np.asarray(table).reshape(*some.shape[:2], runs.FIELDS)
  for at in np.ndindex(some.shape[:2]):
    row = table[at]
    n = np.arange(row[TOTAL])
    visited = n + np.where(n < row[COUNT], row[FIRST], row[JUMP])
    assert visited.tolist() == np.flatnonzero(some[at]).tolist()
    clear = np.arange(row[CLEAR], row[CLEAR_END])
    assert all_[at][clear].all()
    if all_[at].any() and name != 'window and sinks':
      assert len(clear) > 0  # there, neither mask alone fills those tiles
