"""What each implementation of attention can do, found out by trying.

  python -m tests.flash_matrix

runs every cell and writes docs/flash.md; tests/test_flash_matrix.py runs them
again and holds the page to what it saw. A cell that runs is compared with
`plain` in float64, for values and for gradients of all arrays; that `plain` is
right is for tests/test_flash.py and tests/test_flash_features.py to say.
"""

import contextlib
import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jaxattn.analysis.table import markdown
from pallas_kernels import flash
from pallas_kernels.masks import (
  BlockCausal,
  Causal,
  Mask,
  Prefix,
  Sinks,
  Window,
)
from pallas_kernels.scores import (
  Buckets,
  Difference,
  Relative,
  RelativeFactor,
  Score,
  Slopes,
)

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'flash.md'
B, T, S, H, K, D, E = 2, 150, 170, 4, 2, 32, 32
WHOLE = flash.Blocks(2**30, 2**30)
ORDERS = {'query_order': np.arange(T) + S - T, 'key_order': np.arange(S)}


def documents(length: int) -> np.ndarray:
  """Three documents and some pads."""
  return np.minimum(1 + np.arange(length) // 60, 3) * (np.arange(length) > 5)


@dataclasses.dataclass(frozen=True)
class Even(Mask):
  """A mask as users write them, which says nothing of tiles."""

  def __call__(self, query, key):
    return (key.order % 2 == 0) & (key.order <= query.order)


def doubled(x, query, key, weight):
  """A score as users write them."""
  return x * weight[:, None, None].astype(x.dtype) + 0.1 * jnp.sin(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Feature:
  """One row of the matrix.

  Attributes:
    name: what stands in the table.
    given: further arrays, by name, and their shapes; they get gradients.
    rule: from those arrays to arguments of `flash.attention`.
    shapes: of q, k and v.
    dtype: of all arrays.
  """

  name: str
  rule: Callable[..., dict[str, Any]] = lambda **given: {}
  given: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  shapes: tuple = ((B, T, H, D), (B, S, K, D), (B, S, K, E))
  dtype: str = 'float32'


def masked(mask, **data):
  return lambda: {'mask': mask, **ORDERS, **data}


def scored(fn, *names, which='score'):
  score = lambda given: Score(fn, tuple(given[name] for name in names))
  return lambda **given: {'mask': Causal(), **ORDERS, which: score(given)}


def widths(d, e):
  return (B, T, H, d), (B, S, K, d), (B, S, K, e)


PERMUTED = {
  'query_order': np.random.default_rng(0).permutation(T) + S - T,
  'key_order': np.random.default_rng(1).permutation(S),
}
TAGS = {
  'query_tags': {'prefix': np.zeros(T, int)},
  'key_tags': {'prefix': np.arange(S) < 40},
}
SEGMENTS = {
  'query_segments': documents(T),
  'key_segments': documents(S),
}

FEATURES = (
  Feature('grouped queries'),
  Feature('one key head', shapes=((B, T, H, D), (B, S, 1, D), (B, S, 1, E))),
  Feature('values wider than keys', shapes=widths(32, 64)),
  Feature('values narrower than keys', shapes=widths(64, 32)),
  Feature('mask: causal', masked(Causal())),
  Feature('mask: causal window', masked(Causal() & Window(40))),
  Feature('mask: window of both sides', masked(Window(40, 30))),
  Feature(
    'mask: window and first keys', masked(Causal() & (Window(9) | Sinks(3)))
  ),
  Feature('mask: prefix, by tags', masked(Causal() | Prefix(), **TAGS)),
  Feature('mask: block-causal', masked(BlockCausal(50))),
  Feature('mask: of your own', masked(Even())),
  Feature('documents and pads', masked(Causal(), **SEGMENTS)),
  Feature('tokens in any order', lambda: {'mask': Causal(), **PERMUTED}),
  Feature('soft cap', lambda: {'softcap': 2.0}),
  Feature(
    'bias of each pair',
    lambda bias: {'bias': bias},
    {'bias': (B, H, T, S)},
  ),
  Feature(
    'bias shared by rows or heads',
    lambda bias: {'bias': bias},
    {'bias': (1, 1, T, S)},
  ),
  Feature('score: ALiBi', scored(Slopes(), 'slopes'), {'slopes': (H,)}),
  Feature(
    'score: T5 buckets',
    scored(Buckets(64, causal=False), 'table'),
    {'table': (H, 32)},
  ),
  Feature(
    'score: a table of distances',
    scored(Relative(4), 'table'),
    {'table': (H, 33)},
  ),
  Feature(
    'score: numbers of queries and keys',
    lambda a, b: {
      'mask': Causal(),
      **ORDERS,
      'score': Score(Difference(), (), (a,), (b,)),
    },
    {'a': (B, T, H), 'b': (B, S, H)},
  ),
  Feature('score: of your own', scored(doubled, 'weight'), {'weight': (H,)}),
  Feature(
    'factor of the numerator',
    scored(RelativeFactor(4), 'table', which='factor'),
    {'table': (H, 33)},
  ),
  Feature('sinks', lambda sinks: {'sinks': sinks}, {'sinks': (H,)}),
  Feature('dropout', lambda: {'dropout': flash.Dropout(0.2, 1)}),
  Feature('partial results', lambda: {'return_partial': True}),
  Feature('bfloat16', masked(Causal()), dtype='bfloat16'),
  Feature('float16', masked(Causal()), dtype='float16'),
  Feature('float64', masked(Causal()), dtype='float64'),
)


@contextlib.contextmanager
def machine(name: str):
  """Where an implementation runs: kernels are interpreted."""
  with contextlib.ExitStack() as stack:
    if name == 'tpu':
      params = pltpu.InterpretParams(uninitialized_memory='nan')
      stack.enter_context(pltpu.force_tpu_interpret_mode(params))
    yield


def results(feature, name, blocks, wider=None):
  """Gradients by q, k, v and other arrays, and o; rounded inputs, computed in
  their dtype or one that is wider."""
  rng = np.random.default_rng(0)
  rounded = lambda shape: rng.normal(size=shape).astype(feature.dtype)
  draw = lambda shape: jnp.asarray(rounded(shape), wider or feature.dtype)
  arrays = [draw(shape) for shape in feature.shapes]
  # Small: slopes of 1 at a distance of 100 would make scores of 100.
  given = {k: draw(shape) / 8 for k, shape in feature.given.items()}
  w = draw((B, T, H, feature.shapes[2][-1]))
  w = w.astype(jnp.promote_types(w.dtype, jnp.float32))

  def loss(arrays, given):
    o = flash.attention(
      *arrays, **feature.rule(**given), implementation=name, blocks=blocks
    )
    if isinstance(o, flash.Partial):
      o, lse = flash.finish(o)
      o = o + 0.1 * lse[..., None]
    return jnp.sum(o.astype(w.dtype) * w), o

  run = jax.jit(
    jax.grad(loss, (0, 1), has_aux=True),
    compiler_options={'xla_backend_optimization_level': 0},
  )
  wide = lambda x: np.asarray(x, np.float64)
  return [wide(x) for x in jax.tree.leaves(run(arrays, given))]


@functools.cache
def exact(feature: Feature):
  with jax.enable_x64(True):
    return results(feature, 'plain', WHOLE, 'float64')


def outcome(feature: Feature, name: str) -> str:
  """'yes', or why not.

  Raises:
    AssertionError: it ran, and is further off than rounding explains.
  """
  with jax.enable_x64(feature.dtype == 'float64'):
    blocks = flash.Blocks(64, 32) if name in ('plain', 'xla') else None
    try:
      with machine(name):
        got = results(feature, name, blocks)
    except NotImplementedError as refusal:
      return str(refusal).split(': ', 1)[1].rsplit('. Leave', 1)[0]
  # Precision is the matter of other tests: this is well above any rounding of
  # sums, and well below any mistake. Half precision rounds results alone.
  eps = float(jnp.finfo(feature.dtype).eps)
  bound = 8 * eps if eps > 1e-4 else 512 * eps
  for one, other in zip(got, exact(feature)):
    scale = max(np.sqrt(np.mean(np.square(other))), 1)
    error = np.abs(one - other).max() / scale
    if not error <= bound:
      raise AssertionError(f'{feature.name}, {name}: off by {error:.1e}')
  return 'yes'


def derivatives(name: str) -> dict[str, str]:
  """Which modes of differentiation an implementation has."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 150, 1, 32)))
  blocks = flash.Blocks(64, 32) if name in ('plain', 'xla') else None
  f = lambda x: jnp.sum(
    jnp.square(
      flash.attention(
        x, x, x, implementation=name, mask=Causal(), blocks=blocks
      )
    )
  )
  along = lambda f: lambda x: jax.jvp(f, (x,), (x,))[1]
  forms = {
    'derivative: reverse': jax.grad(f),
    'derivative: forward': along(f),
    'derivative: forward over reverse': along(jax.grad(f)),
    'derivative: reverse over reverse': jax.grad(
      lambda x: jnp.vdot(x, jax.grad(f)(x))
    ),
  }
  found = {}
  for mode, form in forms.items():
    try:
      with machine(name):
        result = jax.jit(form)(x)
    except (TypeError, ValueError, NotImplementedError) as refusal:
      found[mode] = next(
        (why for said, why in REFUSALS.items() if said in str(refusal)), ''
      )
      if not found[mode]:
        raise
    else:
      if not jnp.all(jnp.isfinite(result)):
        raise AssertionError(f'{mode}, {name}: not finite')
      found[mode] = 'yes'
  return found


REFUSALS = {  # what JAX says, and what that means here
  "can't apply forward-mode": "its gradient is a rule of our own: use 'plain'",
  'Reverse-mode differentiation does not work for lax.while_loop': (
    "its backward pass is a loop of unknown length: use 'plain'"
  ),
  'dynamic grid bounds unsupported': (
    "JAX does not differentiate its kernels: use 'xla' or 'plain'"
  ),
}


def matrix(said: Callable[[str], None] = lambda line: None):
  """Outcomes by feature, then by implementation."""
  names = tuple(flash.BACKENDS)
  rows: dict[str, dict[str, str]] = {}
  for feature in FEATURES:
    said(feature.name)
    rows[feature.name] = {name: outcome(feature, name) for name in names}
  for name in names:
    said(f'derivatives of {name}')
    for mode, found in derivatives(name).items():
      rows.setdefault(mode, {})[name] = found
  return rows


def page(rows) -> str:
  """docs/flash.md."""
  notes: list[str] = []

  def cell(found):
    if found == 'yes':
      return found
    if found not in notes:
      notes.append(found)
    return f'no ({notes.index(found) + 1})'

  names = tuple(flash.BACKENDS)
  table = markdown(
    ['', *(f'`{name}`' for name in names)],
    [
      [row, *(cell(cells[name]) for name in names)]
      for row, cells in rows.items()
    ],
  )
  reasons = '\n'.join(f'{i}. {why}' for i, why in enumerate(notes, 1))
  about = inspect.cleandoc(flash.__doc__ or '')
  return (
    '# What attention can do, and where\n\n'
    'Written by `python -m tests.flash_matrix`, which ran every cell and '
    'compared it with `plain` in float64, for values and gradients; '
    '`tests/test_flash_matrix.py` does so again. Kernels were interpreted.\n\n'
    f'{table}\n\n{reasons}\n\n## Implementations\n\n```\n{about}\n```\n'
  )


if __name__ == '__main__':
  PAGE.write_text(page(matrix(print)), encoding='utf-8')
  print(f'Written: {PAGE}')
