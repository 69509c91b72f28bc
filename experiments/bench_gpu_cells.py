"""Attention on a Hopper GPU: is it right; see `bench_gpu`.

Values and gradients of every cell, by the kernels, beside the formula in
float64: they may be off by at most twice what the formula in the type of the
inputs is off.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.analysis.table import markdown
from pallas_kernels import masks
from pallas_kernels.dropout import Dropout
from pallas_kernels.flash import gpu
from pallas_kernels.masks import BlockCausal, Causal, Everything, Sinks, Window
from pallas_kernels.problem import Extras, Operands, problem
from pallas_kernels.scores import (
  Buckets,
  Difference,
  RelativeFactor,
  Score,
  Slopes,
)

# Of cells: queries, keys and heads; no tile divides the lengths.
T, S, HEADS, KEY_HEADS = 1000, 1100, 4, 2
DRAWS = 3  # of the formula in the narrow type, of which the worst counts


def say(text: str) -> None:
  """Progress."""
  print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
  """What is asked of the kernels at once.

  Attributes:
    rule: from further arrays to what `problem` takes; without a query_order of
      their own queries are the last T of S tokens.
    given: shapes of these arrays, by name, with letters for sizes; they get
      gradients.
    d, e: widths of keys and of values.
    dtype: of q, k and v.
    scale: multiplies q: outliers are large.
  """

  rule: Callable[..., dict[str, Any]] = lambda: {'mask': Causal()}
  given: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  d: int = 128
  e: int = 128
  dtype: str = 'bfloat16'
  scale: float = 1.0


def about() -> str:
  """What the table of cells shows."""
  return (
    f'Errors of the kernels, over the largest of {DRAWS} draws of the formula '
    'in the type of the inputs; both against the formula in float64, as a '
    f'share of its RMS. At most 2 is right. {T:,} queries, {S:,} keys, {HEADS} '
    f'heads, {KEY_HEADS} of keys, 2 rows; bfloat16 and d = 128 where nothing '
    'else is said.'
  )


def documents(length: int) -> np.ndarray:
  """Three, of which the last is short, and pads."""
  at = np.arange(length)
  return np.minimum(1 + 5 * at // (2 * length), 3) * (at > 9)


def packed():
  own = documents(S)
  mask = Causal() & (Window(300) | Sinks(4))
  return {'mask': mask, 'query': (None, own[-T:]), 'key': (None, own)}


CELLS = {
  'no mask': Cell(lambda: {}),
  'causal': Cell(),
  'causal, float16': Cell(dtype='float16'),
  'causal, d = 64': Cell(d=64, e=64),
  'causal, d = 256': Cell(d=256, e=256),
  'causal, d = 64, e = 256': Cell(d=64, e=256),
  'causal, d = 80, e = 40': Cell(d=80, e=40),
  'outliers': Cell(scale=30.0),
  'window, first keys, documents': Cell(packed),
  'window, documents, d = 256': Cell(packed, d=256, e=256),
  'block-causal': Cell(lambda: {'mask': BlockCausal(150)}),
  'striped': Cell(
    lambda: {
      'mask': Causal(),
      'query': (np.arange(T) * 4 + 2, None),
      'key': (np.arange(S) * 4, None),
    }
  ),
  'soft cap': Cell(lambda: {'mask': Causal(), 'softcap': 5.0}),
  'slopes': Cell(
    lambda slopes: {'mask': Causal(), 'score': Score(Slopes(), (slopes,))},
    {'slopes': ('h',)},
  ),
  'T5 buckets, float16': Cell(
    lambda table: {'score': Score(Buckets(64, causal=False), (table,))},
    {'table': ('h', 32)},
    dtype='float16',
  ),
  'numbers of tokens': Cell(
    lambda a, b: {
      'mask': Causal(),
      'score': Score(Difference(), (), (a,), (b,)),
    },
    {'a': (2, 't', 'h'), 'b': (1, 's', 1)},
  ),
  'factor': Cell(
    lambda table: {
      'mask': Causal(),
      'factor': Score(RelativeFactor(4), (table,)),
    },
    {'table': ('h', 33)},
  ),
  'bias': Cell(
    lambda bias: {'mask': Causal(), 'bias': bias}, {'bias': (1, 'h', 't', 's')}
  ),
  'dropout': Cell(lambda: {'mask': Causal(), 'dropout': Dropout(0.2, 7)}),
}


def dense(rule, q, k, v, extras: Extras, query, key):
  """o and lse by the formula, with a matrix of all pairs, in the type of q."""
  h, dtype = q.shape[2], q.dtype
  k, v = (jnp.repeat(x, h // x.shape[2], 2) for x in (k, v))
  own = lambda one: Operands(
    one.heads,
    tuple(jnp.swapaxes(x, 1, 2)[..., None] for x in one.queries),
    tuple(jnp.swapaxes(x, 1, 2)[:, :, None] for x in one.keys),
  )
  extras = Extras(
    tuple(map(own, extras.scores)), tuple(map(own, extras.weights)), extras.bias
  )
  across, along = (
    jax.tree.map(turn, tokens)
    for tokens, turn in (
      (query, lambda x: x[:, None, :, None]),
      (key, lambda x: x[:, None, None]),
    )
  )
  sides = across.side, along.side
  x = jnp.einsum('bthd,bshd->bhts', q, k) * jnp.asarray(rule.scale, dtype)
  x = rule.scored(x, *sides, extras)
  x = jnp.where(masks.sees(rule.mask, across, along), x, -jnp.inf)
  m = jax.lax.stop_gradient(x.max(-1, keepdims=True))
  m = jnp.where(m == -jnp.inf, 0, m)
  p = jnp.exp(x - m)
  total = p.sum(-1, keepdims=True)
  some = jnp.where(total == 0, 1, total)
  w = rule.weighed(p / some, *sides, extras)
  o = jnp.einsum('bhts,bshe->bthe', w.astype(dtype), v)
  lse = jnp.where(total > 0, m + jnp.log(some), -jnp.inf)[..., 0]
  return o, jnp.swapaxes(lse, 1, 2)


def kernels(rule, q, k, v, extras, query, key):
  """o and lse by the kernels, if they do not refuse."""
  why = gpu.refuses(rule, q, k, v, extras, query, key)
  if why:
    raise NotImplementedError(why)
  o, m, total = gpu.attend(rule, q, k, v, extras, query, key)
  seen = total > 0
  return o, jnp.where(seen, m + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)


def draw(cell: Cell, seed: int) -> tuple[list, dict]:
  """q, k, v, the weight of o in what is differentiated; and what is given.

  Numbers are those of the narrow type, whatever they are computed in.
  """
  rng = np.random.default_rng(seed)
  b, h, k = 2, HEADS, KEY_HEADS
  shapes = (b, T, h, cell.d), (b, S, k, cell.d), (b, S, k, cell.e)
  narrow = lambda x: np.asarray(jnp.asarray(x, cell.dtype), np.float64)
  q, *rest = (narrow(rng.normal(size=x)) for x in (*shapes, (b, T, h, cell.e)))
  sizes = {'t': T, 's': S, 'h': HEADS}
  given = {
    name: rng.uniform(0.01, 0.1, [sizes.get(n, n) for n in shape])
    for name, shape in cell.given.items()
  }
  return [narrow(q * cell.scale), *rest], given


def results(cell: Cell, attend, dtype, draws: int) -> list[dict]:
  """o, lse and all gradients of some draws, computed in a type."""
  wide = jnp.promote_types(dtype, jnp.float32)

  def loss(arrays, given, w):
    asked = {'mask': Everything(), **cell.rule(**given)}
    order, documents = asked.pop('query', (np.arange(T) + S - T, None))
    asked['query'] = order, documents, None
    asked['key'] = *asked.pop('key', (np.arange(S), None)), None
    rule, extras, query, key = problem(*arrays, **asked)
    o, lse = attend(rule, *arrays, extras, query, key)
    seen = jnp.where(lse > -jnp.inf, lse, 0)
    total = jnp.sum((o * w).astype(wide)) + 0.1 * jnp.sum(seen.astype(wide))
    return total, {'o': o, 'lse': lse}

  gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  found = []
  for seed in range(draws):
    arrays, given = draw(cell, seed)
    *arrays, w = (jnp.asarray(x, dtype) for x in arrays)
    given = {name: jnp.asarray(x, wide) for name, x in given.items()}
    (own, more), values = gradient(arrays, given, w)
    values |= dict(zip(('dq', 'dk', 'dv'), own))
    values |= {f'd {name}': x for name, x in more.items()}
    values = {name: np.asarray(x, np.float64) for name, x in values.items()}
    found.append(values)
  return found


def off(found, exact) -> dict[str, float]:
  """The largest error of each, in units of the RMS of what is exact."""

  def error(x, exact):
    finite = np.isfinite(exact)
    if not np.array_equal(finite, np.isfinite(x)):
      return np.inf
    rms = np.sqrt(np.mean(np.square(exact[finite])))
    return np.abs(x[finite] - exact[finite]).max() / (rms or 1)

  return {name: error(found[name], exact[name]) for name in exact}


def check(cell: Cell, attend=kernels) -> dict[str, float]:
  """Errors over those of the formula in the narrow type: at most 2 is right."""
  with jax.enable_x64(True):
    exact = results(cell, dense, jnp.float64, DRAWS)
  (found,) = results(cell, attend, cell.dtype, 1)
  narrow = map(off, results(cell, dense, cell.dtype, DRAWS), exact)
  eps = float(jnp.finfo(jnp.float32).eps)
  allowed = functools.reduce(
    lambda x, y: {name: max(x[name], y[name]) for name in x}, narrow
  )
  return {
    name: x / (allowed[name] + eps) for name, x in off(found, exact[0]).items()
  }


def checked(cells: Mapping[str, Cell]) -> tuple[str, list[str]]:
  """A table of all cells, and those that are wrong or did not run."""
  rows, wrong = [], []
  names = 'o', 'lse', 'dq', 'dk', 'dv'
  for name, cell in cells.items():
    try:
      found = check(cell)
    except Exception as error:  # one cell that fails must not hide the others
      said = f'{type(error).__name__}: {error}'.partition('\n')[0][:200]
      rows.append([name, *['-'] * (len(names) + 1), said])
      wrong.append(name)
    else:
      right = max(found.values()) <= 2
      rest = [x for which, x in found.items() if which not in names]
      cells_ = [f'{found[which]:.2f}' for which in names]
      cells_.append(f'{max(rest):.2f}' if rest else '-')
      rows.append([name, *cells_, 'right' if right else '**wrong**'])
      wrong += [] if right else [name]
    say(' | '.join(rows[-1]))
  return markdown(['cell', *names, 'of operands', 'verdict'], rows), wrong
