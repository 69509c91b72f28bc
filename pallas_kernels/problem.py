"""What a call of attention asks for, checked and filled in, for every backend.

A backend is an `Engine`, of which two functions,

  forward(rule, q, k, v, extras, query, key) -> o, m, l
  backward(rule, q, k, v, extras, query, key, o, m, l, do, dm, dl)
    -> dq, dk, dv, dextras

with o 'b t h e' finished, in rule.dtype, and m, l 'b t h' as in `Partial`, of
which m is held constant in gradients. `Rule` is static, all others are arrays.
Gradients are as wide as their sums; `reverse`, which makes the two one that JAX
differentiates, rounds them to what their inputs are. Forward may be asked of
some of the keys and backward be given o, m and l of all of them: so what keys
contribute adds up, on one device or round a ring of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels import dispatch
from pallas_kernels.blocks import Blocks
from pallas_kernels.dropout import Dropout
from pallas_kernels.masks import Mask, Range, Side, Tokens
from pallas_kernels.scores import Score, SoftCap, Table

NOT_TWICE = (
  'JAX does not differentiate its kernels, so there are no second derivatives:'
  " use implementation='plain', which has all of them, or 'xla', which has"
  ' forward mode over reverse'
)


class Operands(NamedTuple):
  """What the function of one `Score` reads."""

  heads: tuple = ()  # 'h ...'
  queries: tuple = ()  # 'b t h', 'b t 1' or with 1 for b; in a tile 'b h t 1'
  keys: tuple = ()  # 'b s h', 'b s 1' or with 1 for b; in a tile 'b h 1 s'

  @classmethod
  def of(cls, score: Score) -> 'Operands':
    return cls(score.operands, score.queries, score.keys)


class Extras(NamedTuple):
  """All that bears on scores and weights besides q, k and where tokens stand.

  The gradient of extras is extras again, with None for integers.
  """

  scores: tuple[Operands, ...] = ()  # for each function in Rule.scores
  weights: tuple[Operands, ...] = ()  # for each in Rule.weights
  bias: jax.Array | None = None  # 'b h t s', with 1 for b or h where shared

  def __bool__(self):
    return bool(self.scores or self.weights or self.bias is not None)


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is known of a call while tracing.

  Attributes:
    mask: which keys a query sees.
    scale: multiplies q k^T.
    scores: what then happens to the scores, before the bias; see `Score.fn`.
    weights: what happens to exp(score - m) in the numerator alone: functions of
      the same form, linear in their first argument.
    dtype: of the result.
    ordered: the orders of queries and of keys are 0, 1, 2, ...
    blocks: sides of the tiles.
  """

  mask: Mask
  scale: float
  scores: tuple[Callable[..., Any], ...]
  weights: tuple[Callable[..., Any], ...]
  dtype: np.dtype
  ordered: bool
  blocks: Blocks

  def elementwise(self) -> 'Rule':
    """The same for a kernel: functions that gather replaced by others."""
    own = lambda fn: fn.elementwise() if hasattr(fn, 'elementwise') else fn
    return dataclasses.replace(
      self,
      scores=tuple(map(own, self.scores)),
      weights=tuple(map(own, self.weights)),
    )

  @property
  def tables(self) -> tuple[int, ...]:
    """Which of the scores read a table, see `scores.Table`."""
    return tuple(
      at for at, fn in enumerate(self.scores) if isinstance(fn, Table)
    )

  def of_one(self) -> 'Rule':
    """The same where a tile reads one entry of each: its operand then."""
    own = lambda fn: type(fn).of_one if isinstance(fn, Table) else fn
    return dataclasses.replace(self, scores=tuple(map(own, self.scores)))

  def same(self, extras: Extras, query: Range, key: Range):
    """Whether all pairs of two blocks of tokens read the same of each table."""
    found = np.True_
    for at in self.tables:
      (table,) = extras.scores[at].heads
      found &= self.scores[at].same(query, key, table.shape[1])
    return found

  def scored(self, x, query: Side, key: Side, extras: Extras):
    """Scores `b h t s` modified; sides `b 1 t 1`, `b 1 1 s`."""
    dtype = x.dtype
    for fn, own in zip(self.scores, extras.scores):
      x = fn(x, query, key, *own.heads, *own.queries, *own.keys).astype(dtype)
    return x if extras.bias is None else x + extras.bias.astype(x.dtype)

  def weighed(self, p, query: Side, key: Side, extras: Extras):
    """Weights `b h t s` of the numerator, likewise."""
    dtype = p.dtype
    for fn, own in zip(self.weights, extras.weights):
      p = fn(p, query, key, *own.heads, *own.queries, *own.keys).astype(dtype)
    return p


class Monoid(NamedTuple):
  """Attention to some of the keys, as something that adds up.

  Attributes:
    nothing: (q, v) -> attention to none; as wide as sums are.
    open: the results of `forward`, one by one -> attention to its keys.
    merge: two of these -> attention to the keys of both.
    finish: -> the results again.
    total: (one of these, a mesh axis) -> attention to the keys of all devices
      along it: what `merge` would make of theirs.
  """

  nothing: Callable[[jax.Array, jax.Array], Any]
  open: Callable[..., Any]
  merge: Callable[[Any, Any], Any]
  finish: Callable[[Any], tuple]
  total: Callable[[Any, str], Any]


class Engine(NamedTuple):
  """Attention of some kind on one device; functions take the same arguments.

  Attributes:
    attend: the results of forward, for JAX to differentiate.
    forward, backward: see above; None where JAX alone knows the gradient.
    monoid: how results for different keys become one.
  """

  attend: Callable[..., tuple]
  forward: Callable[..., tuple] | None = None
  backward: Callable[..., tuple] | None = None
  monoid: Monoid | None = None


# How an engine serves many devices that each hold a part: as another engine.
Over = Callable[[Engine], Engine]


def problem(
  q,
  k,
  v,
  *,
  mask: Mask,
  query: tuple,
  key: tuple,
  scale: float | None = None,
  softcap: float | None = None,
  score: Score | None = None,
  bias: jax.Array | None = None,
  factor: Score | None = None,
  dropout: Dropout | None = None,
  blocks: Blocks | None = None,
  wide: bool = False,
  spread: bool = False,
) -> tuple[Rule, Extras, Tokens, Tokens]:
  """Checks the arguments of a call and fills in what was left out.

  Args:
    q, k, v, mask, scale, softcap, score, bias, factor, dropout, blocks: see
      `flash.attention`.
    query, key: (order, segments, tags), each as given or None.
    wide: the result is in float32 or wider, whatever q is.
    spread: there are more keys on other devices: a bias has columns for all.

  Raises:
    TypeError: an argument is of another kind than it has to be.
    ValueError: shapes that do not fit each other.
  """
  for name, given, kind in (
    ('mask', mask, Mask),
    ('score', score, Score),
    ('factor', factor, Score),
    ('dropout', dropout, Dropout),
    ('blocks', blocks, Blocks),
  ):
    if not isinstance(given, kind) and (given is not None or name == 'mask'):
      raise TypeError(f'{name} must be a {kind.__name__}, not {given!r}')
  _check_static('mask', mask)
  for name, x in (('q', q), ('k', k), ('v', v), ('bias', bias)):
    if x is not None:
      check_floats(name, x)
  if not (
    q.ndim == k.ndim == v.ndim == 4
    and q.shape[0] == k.shape[0]
    and q.shape[3] == k.shape[3]
    and k.shape[:3] == v.shape[:3]
  ):
    raise ValueError(
      'q, k and v must be `b t h d`, `b s k d` and `b s k e`, not'
      f' {q.shape}, {k.shape} and {v.shape}'
    )
  (b, t, h, d), s = q.shape, k.shape[1]
  if h == 0 or d == 0:
    raise ValueError(f'there are no heads, or they have no width: q {q.shape}')
  if k.shape[2] == 0 or h % k.shape[2]:
    raise ValueError(
      f'{h} query heads cannot share {k.shape[2]} key heads evenly'
    )
  ordered = query[0] is None and key[0] is None
  query, key = _tokens('query', q, *query), _tokens('key', k, *key)
  if (query.segments is None) != (key.segments is None):
    query, key = one_segment(query), one_segment(key)
  scale = 1 / math.sqrt(d) if scale is None else _number('scale', scale)
  scores = []
  if softcap is not None:
    scores.append(Score(SoftCap(_number('softcap', softcap))))
  scores += [] if score is None else [score]
  weights = [] if factor is None else [factor]
  if dropout is not None and dropout.rate:
    weights.append(dropout.score(b, h, query, key))
  for one in (*scores, *weights):
    _check_operands(one, b, t, s, h)
  if bias is not None:
    shape = bias.shape
    columns = spread and s and shape[-1] % s == 0
    if len(shape) != 4 or not (
      shape[0] in (1, b)
      and shape[1] in (1, h)
      and shape[2] == t
      and (shape[3] == s or columns)
    ):
      raise ValueError(
        f'a bias must be `b h t s`, here {(b, h, t, s)} (with 1 for b or h'
        f' where it is shared), not {shape}'
      )
  # As wide as scores: so gradients, which add up over tiles, are rounded once.
  dtype = accumulator(q)
  operands = lambda one: jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
    Operands.of(one),
  )
  if bias is not None and jnp.promote_types(bias.dtype, dtype) != dtype:
    bias = bias.astype(dtype)
  rule = Rule(
    mask=mask,
    scale=scale,
    scores=tuple(one.fn for one in scores),
    weights=tuple(one.fn for one in weights),
    dtype=np.dtype(dtype if wide else q.dtype),
    ordered=ordered,
    blocks=blocks or Blocks(),
  )
  extras = Extras(
    tuple(map(operands, scores)), tuple(map(operands, weights)), bias
  )
  return rule, extras, query, key


def check_floats(name, x):
  """Raises a TypeError if x is no array of floats."""
  if not hasattr(x, 'dtype'):
    raise TypeError(f'{name} must be an array, not a {type(x).__name__}')
  if not jnp.issubdtype(x.dtype, jnp.floating):
    hint = ': who sees whom is for a mask to say' if name == 'bias' else ''
    raise TypeError(f'{name} must be of a float type, not {x.dtype}{hint}')


# Where a number that is learned goes, for what is static has no gradient.
LEARNED = {
  'scale': 'multiply q by it',
  'softcap': 'write a Score of which it is an operand',
}


def _number(name, x) -> float:
  try:
    return float(x)
  except jax.errors.ConcretizationTypeError:
    raise TypeError(
      f'{name} must be a Python number, and is traced: {LEARNED[name]} instead'
    ) from None


def _check_static(what, fn):
  """What is static is compared by its fields, and so must have no others."""
  try:
    hash(fn)
  except TypeError as error:
    raise TypeError(
      f'the {what} {fn!r} must be hashable: let its fields be Python scalars'
    ) from error
  kept = [cell.cell_contents for cell in getattr(fn, '__closure__', None) or ()]
  if isinstance(fn, functools.partial):
    kept += [fn.args, fn.keywords]
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(kept)):
    raise TypeError(
      f'the {what} {fn!r} closes over an array that is traced, whose gradient'
      ' would be lost: let it be one of the operands of the Score'
    )
  if dataclasses.is_dataclass(fn):
    fields = {x.name for x in dataclasses.fields(fn) if x.compare}
    if others := sorted(set(vars(fn)) - fields):
      raise TypeError(
        f'the {what} {type(fn).__name__} has {", ".join(others)} besides its'
        ' fields that are compared, so two of them would count as equal: make'
        ' it a frozen dataclass with them as such fields'
      )
    for name in fields:
      if isinstance(getattr(fn, name), Mask):
        _check_static(what, getattr(fn, name))


def _check_operands(score, b, t, s, h):
  _check_static('score', score.fn)
  if not all(
    isinstance(group, tuple)
    for group in (score.operands, score.queries, score.keys)
  ):
    raise TypeError(
      'operands, queries and keys of a Score are tuples of arrays'
    )
  for x in (*score.operands, *score.queries, *score.keys):
    if not hasattr(x, 'dtype') or not hasattr(x, 'shape'):
      raise TypeError(
        f'an operand of a Score must be an array, not a {type(x).__name__}'
      )
  for operand in score.operands:
    if operand.shape[:1] != (h,):
      raise ValueError(
        f'operands of a score lead with the {h} heads, not {operand.shape}'
      )
  for what, length, group in (
    ('query', t, score.queries),
    ('key', s, score.keys),
  ):
    for operand in group:
      rows, *rest = operand.shape or (0,)
      if rows not in (1, b) or rest not in ([length, 1], [length, h]):
        raise ValueError(
          f'numbers of each {what} for a score must be {(b, length, h)} (with'
          f' 1 for the rows or for the heads where shared), not {operand.shape}'
        )


def _tokens(name, x, order, segments, tags):
  b, t = x.shape[:2]

  def per_token(what, values):
    if not isinstance(values, jax.Array):
      values = np.asarray(values)
    if not (
      jnp.issubdtype(values.dtype, jnp.integer) or values.dtype == jnp.bool_
    ):
      raise TypeError(f'{name} {what} must be integers, not {values.dtype}')
    # What is traced, or in part elsewhere, cannot be looked at.
    known = isinstance(values, np.ndarray) or (
      not isinstance(values, jax.core.Tracer) and values.is_fully_addressable
    )
    may_be_large = values.dtype.name in ('uint32', 'int64', 'uint64')
    if known and may_be_large and values.size:
      bound = np.iinfo(np.int32)
      if not bound.min <= values.min() <= values.max() <= bound.max:
        raise ValueError(f'{name} {what} must fit into 32 bits')
    values = jnp.atleast_2d(jnp.asarray(values, jnp.int32))
    if values.shape not in ((b, t), (1, t)):
      raise ValueError(
        f'{name} {what} must have shape {(b, t)} or {(t,)}, not {values.shape}'
      )
    return values

  if tags is not None and not isinstance(tags, Mapping):
    raise TypeError(
      f'{name}_tags must be a dict of arrays by their names, not a'
      f' {type(tags).__name__}'
    )
  order = per_token('order', np.arange(t) if order is None else order)
  tags = {tag: per_token(f'tag {tag}', x) for tag, x in (tags or {}).items()}
  if segments is not None:
    segments = per_token('segments', segments)
  return Tokens(Side(order, tags), segments)


def one_segment(tokens: Tokens) -> Tokens:
  """Tokens whose segments are spelled out: what was None is segment 1."""
  if tokens.segments is not None:
    return tokens
  return tokens._replace(segments=jnp.ones_like(tokens.side.order))


def unfit(q, k, v, dtypes: tuple[str, str]) -> str | None:
  """Why kernels for two types cannot take these arrays, or None."""
  if 0 in (*q.shape, *k.shape, *v.shape):
    return f'there is nothing in q {q.shape}, k {k.shape} or v {v.shape}'
  if not q.dtype == k.dtype == v.dtype:
    return f'q, k and v differ in type: {q.dtype}, {k.dtype}, {v.dtype}'
  if q.dtype.name not in dtypes:
    return f'it is for {" and ".join(dtypes)}, not {q.dtype}'
  return None


def accumulator(x: ArrayLike) -> np.dtype:
  """What sums over keys are kept in."""
  return jnp.promote_types(jnp.float32, x.dtype)


def floats(extras):
  """The same, with None for integers: what can have a gradient."""
  inexact = lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None
  return jax.tree.map(inexact, extras)


def with_floats(extras, values):
  """Extras with other floating-point arrays; the inverse of `floats`."""
  return jax.tree.map(
    lambda value, x: x if value is None else value,
    values,
    extras,
    is_leaf=lambda x: x is None,
  )


def alike(inputs, tokens):
  """Adds to all inputs a zero made of them all.

  Under shard_map they then vary over the same mesh axes, and so do the carries
  made from them; and the gradient of an input is summed over the axes along
  which it did not vary. Elsewhere it is a constant that costs nothing.
  """
  leaves = jax.tree.leaves((inputs, tokens))
  nothing = [jnp.sum(x[..., :0]).astype(jnp.float32) for x in leaves]
  return jax.tree.map(lambda x: x + sum(nothing).astype(x.dtype), inputs)


def reverse(forward, backward):
  """`forward`, of which `backward` is the gradient in reverse mode."""

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def attend(rule, q, k, v, extras, query, key):
    return forward(rule, q, k, v, extras, query, key)

  def attend_fwd(rule, *inputs):
    results = forward(rule, *inputs)
    return results, (inputs, results)

  def attend_bwd(rule, residuals, gradients):
    inputs, results = residuals
    found = backward(rule, *inputs, *results, *gradients)
    rounded = jax.tree.map(
      lambda dx, x: dx.astype(x.dtype), found, floats(inputs[:-2])
    )
    return *rounded, None, None

  attend.defvjp(attend_fwd, attend_bwd)
  return attend


def once(name: str, platform: str):
  """Makes a forward or backward of kernels say that they have no derivative.

  What differentiates an attention twice would come upon the kernels, and JAX
  then says nothing of what to do. Nor does it where a program is made for
  another platform. In compiled programs there is no trace of either.

  Args:
    name: of the implementation.
    platform: for which it is, as JAX calls it.
  """
  here = dispatch.bound('attention', name, platform)

  def of(run):
    there = lambda rule, q, *inputs: run(rule, here(q), *inputs)
    guarded = jax.custom_jvp(there, nondiff_argnums=(0,))

    @guarded.defjvp
    def differentiate(rule, inputs, tangents):
      raise NotImplementedError(
        f'attention, implementation={name!r}: {NOT_TWICE}'
      )

    return guarded

  return of
