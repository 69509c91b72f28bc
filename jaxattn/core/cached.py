"""Attention of a chunk to itself and to what a memory holds."""

from collections.abc import Callable

from jaxattn.core import softmax
from pallas_kernels.masks import Mask
from pallas_kernels.scores import POSITION, Score


def attend(
  q,
  k,
  v,
  tokens,
  memory,
  score: Score | None = None,
  *,
  mask: Mask,
  engine: Callable = softmax.attention,
  **rule,
):
  """What the queries of a chunk read, 'b t h e', and the memory after it.

  Args:
    q, k, v: of the chunk, 'b t h d', 'b t k d', 'b t k e'.
    tokens: `packing.Tokens` of the chunk.
    memory: `state.FullKV` or `state.RollingKV`; None where there is none.
    score: modification of the scores; it reads distances between positions.
    mask: who sees whom.
    engine: `softmax.attention`, or another with its arguments.
    **rule: further arguments of the engine.

  Raises:
    ValueError: a score, and more than one position for each token.
  """
  positions = tokens.positions
  if score is not None and positions.ndim != 2:
    raise ValueError(
      'a bias by distance wants one position for each token, not '
      f'{positions.shape[-1]}'
    )
  if memory is None:
    key_positions = positions
    queries = segments = None if tokens.valid is None else tokens.segments
    places = order = None if tokens.dense else tokens.order
  else:
    (k, v, order, segments, key_positions), memory = memory.read(k, v, tokens)
    queries, places = tokens.segments, tokens.order
  tags = lambda at: None if score is None else {POSITION: at}
  o = engine(
    q,
    k,
    v,
    mask=mask,
    query_order=places,
    key_order=order,
    query_segments=queries,
    key_segments=segments,
    query_tags=tags(positions),
    key_tags=tags(key_positions),
    score=score,
    **rule,
  )
  return o, memory
