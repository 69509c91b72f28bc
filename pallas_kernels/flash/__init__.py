"""Softmax attention in memory linear in the lengths, on CPU, TPU and GPU.

One set of semantics for every implementation:

  plain   JAX differentiates it: forward mode, any order of derivative
  xla     the same tiles with a gradient written by hand
  tpu     kernels for TPUs, in which stages of different tiles overlap
  gpu     kernels for Hopper GPUs, in which warpgroups take turns
  cudnn   the kernels of cuDNN, for what they mean the same by

  o = flash.attention(q, k, v, mask=masks.Causal())

Who sees whom is decided by data that travels with the tokens (orders, segments,
tags), so packed, padded, striped and cached layouts are one kernel.
"""

from typing import Any

import jax
from jax.typing import ArrayLike

from pallas_kernels import dispatch
from pallas_kernels.blocks import Blocks, chip
from pallas_kernels.dropout import Dropout
from pallas_kernels.flash import cudnn, gpu, plain, tpu, xla
from pallas_kernels.flash.partial import Partial, finish, merge, sink
from pallas_kernels.masks import Everything, Mask
from pallas_kernels.problem import Over, check_floats, problem
from pallas_kernels.scores import Score

__all__ = [
  'Blocks',
  'Dropout',
  'Partial',
  'Score',
  'attention',
  'finish',
  'merge',
]

EVERYTHING = Everything()
BACKENDS = {
  'plain': plain.ENGINE,
  'xla': xla.ENGINE,
  'tpu': tpu.ENGINE,
  'gpu': gpu.ENGINE,
  'cudnn': cudnn.ENGINE,
}
# By a part of what JAX calls the device.
PREFERRED = {
  'TPU': ('tpu', 'xla'),
  'NVIDIA': ('gpu', 'cudnn', 'xla'),
  '': ('xla',),
}


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: Mask = EVERYTHING,
  query_order: ArrayLike | None = None,
  key_order: ArrayLike | None = None,
  query_segments: ArrayLike | None = None,
  key_segments: ArrayLike | None = None,
  query_tags: dict[str, ArrayLike] | None = None,
  key_tags: dict[str, ArrayLike] | None = None,
  bias: jax.Array | None = None,
  score: Score | None = None,
  factor: Score | None = None,
  sinks: jax.Array | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  dropout: Dropout | None = None,
  implementation: str | None = None,
  blocks: Blocks | None = None,
  return_partial: bool = False,
  over: Over | None = None,
) -> Any:
  """softmax(mask(scale q k^T)) v, in memory linear in t and s.

  A score is scale q . k, then softcap, then `score`, then + `bias`. All inputs
  must be finite, masked or not, and scores above -1e38: what is below counts as
  unseen on a TPU or a GPU.

  Args:
    q: queries, `b t h d`.
    k: keys, `b s k d`. h is a multiple of k: each key head serves h / k query
      heads that stand together.
    v: values, `b s k e`.
    mask: which keys a query sees, besides the rule of segments.
    query_order: `b t`, or `t` for every row: what the mask reads; by default
      0, 1, ... t - 1. Likewise key_order, `b s` or `s`.
    query_segments: `b t` or `t`: tokens see each other iff their segments are
      equal and at least 1: 0, and below, is padding. None stands for 1
      everywhere. Likewise key_segments.
    query_tags: what else mask and score read, each `b t` or `t`. Likewise
      key_tags.
    bias: added to the scores, `b h t s` with 1 for b or h where it is shared;
      gets a gradient. It is the one argument of size t s: where distances
      decide, a `score` makes the same inside the tiles.
    score: what else happens to the scores; its operands get gradients.
    factor: what happens to exp(score) in the numerator alone, a Score whose fn
      is linear in its first argument (URPE); its operands get gradients.
    sinks: `h`, the score of one more key a head, which has no value; gets a
      gradient. With partial results, give it to one of the calls only.
    scale: a Python number that multiplies q . k; by default 1 / sqrt(d).
    softcap: if given, scores become softcap tanh(score / softcap).
    dropout: of the weights, after the softmax.
    implementation: one of those above; None chooses by the device: on a TPU
      'tpu', on an NVIDIA GPU 'gpu', else 'cudnn'; what they refuse is for
      'xla'.
    blocks: sides of the tiles; by default chosen from the lengths.
    return_partial: return a Partial, to be merged with attention to other keys
      and finished.
    over: how devices that each hold a part of the keys work together: given an
      engine, one that answers for all keys. None for one device. A bias
      then has the rows of this device, and the columns of all.

  Returns:
    `b t h e` in the dtype of q; or a Partial in float32, or wider if q is. A
    query that sees no key has o = 0, lse = -inf (the sink's score, if there is
    one) and no gradient.

  Differentiate it in reverse mode. Forward mode and second derivatives of any
  kind are what `implementation='plain'` is for ('xla' has forward over
  reverse). A score reaches traced arrays through its operands, never by closing
  over them.

  Raises:
    TypeError: an argument is of another kind than it has to be.
    ValueError: shapes that do not fit each other.
    NotImplementedError: the implementation asked for cannot serve this call;
      the message says why.
  """
  if sinks is not None:
    check_floats('sinks', sinks)
  rule, extras, query, key = problem(
    *(q, k, v),
    mask=mask,
    query=(query_order, query_segments, query_tags),
    key=(key_order, key_segments, key_tags),
    scale=scale,
    softcap=softcap,
    score=score,
    bias=bias,
    factor=factor,
    dropout=dropout,
    blocks=blocks,
    wide=return_partial or sinks is not None,
    spread=over is not None,
  )
  call = rule, q, k, v, extras, query, key
  name = dispatch.choose(
    'attention',
    {
      'plain': lambda: None,
      'xla': lambda: None,
      'tpu': lambda: tpu.refuses(*call),
      'gpu': lambda: gpu.refuses(*call),
      'cudnn': lambda: cudnn.refuses(*call, over is not None),
    },
    implementation,
    next(names for make, names in PREFERRED.items() if make in chip()),
  )
  engine = BACKENDS[name]
  if over is not None:
    engine = over(engine)
  o, m, total = engine.attend(*call)
  if sinks is None and not return_partial:
    return o
  partial = Partial(m, total, total[..., None] * o)
  if sinks is not None:
    if sinks.shape != q.shape[2:3]:
      raise ValueError(
        f'sinks must have shape {q.shape[2:3]}, one a head, not {sinks.shape}'
      )
    partial = merge(partial, sink(sinks, partial))
  return partial if return_partial else finish(partial)[0].astype(q.dtype)
