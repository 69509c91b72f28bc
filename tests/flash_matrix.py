"""What each implementation of attention can do, found out by trying.

  python -m tests.flash_matrix

runs every cell and writes docs/flash.md (given a name, it prints that column);
tests/test_flash_matrix.py runs them again and holds the page to what it saw. A
cell that runs is compared with `plain` in float64, for values and for gradients
of all arrays; that `plain` is right is for tests/test_flash.py and
tests/test_flash_features.py to say.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from experiments.bench_compiled import Even
from jaxattn.analysis.table import markdown
from pallas_kernels import flash
from pallas_kernels.masks import (
  BlockCausal,
  Causal,
  Prefix,
  Sinks,
  Window,
)
from pallas_kernels.scores import (
  POSITION,
  Buckets,
  Difference,
  Relative,
  RelativeFactor,
  Score,
  Slopes,
)
from tests import devices
from tests.gpu_interpreter import interpreted

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'flash.md'
T, S = 150, 170
# Rows, heads and key heads; few where a cell takes long.
SIZES = {'b': 2, 't': T, 's': S, 'h': 4, 'k': 2}
SMALL = SIZES | {'h': 2, 'k': 1}
WHOLE = flash.Blocks(2**30, 2**30)
# Several each way.
TILES = {
  'plain': flash.Blocks(64, 32),
  'xla': flash.Blocks(64, 32),
  'tpu': flash.Blocks(128, 128),
}
ORDERS = {'query_order': np.arange(T) + S - T, 'key_order': np.arange(S)}


def documents(length: int) -> np.ndarray:
  """Three documents and some pads."""
  return np.minimum(1 + np.arange(length) // 60, 3) * (np.arange(length) > 5)


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
    key_heads: a size.
    widths: of keys and of values.
    dtype: of all arrays.
    sizes: what letters in shapes stand for.
    rows: of the batch at least, where one takes long.
  """

  name: str
  rule: Callable[..., dict[str, Any]] = lambda **given: {}
  given: dict[str, tuple] = dataclasses.field(default_factory=dict)
  key_heads: str | int = 'k'
  widths: tuple[int, int] = (32, 32)
  dtype: str = 'float32'
  sizes: Mapping[str, int] = dataclasses.field(default_factory=SIZES.copy)
  rows: int = 1

  def shape(self, *sizes: str | int) -> tuple[int, ...]:
    """With letters as sizes, and numbers as they are."""
    return tuple(self.sizes.get(size, size) for size in sizes)

  @property
  def shapes(self):
    """Of q, k and v."""
    (d, e), k = self.widths, self.key_heads
    shapes = ('b', 't', 'h', d), ('b', 's', k, d), ('b', 's', k, e)
    return [self.shape(*shape) for shape in shapes]


def masked(mask, **data):
  return lambda: {'mask': mask, **ORDERS, **data}


def scored(fn, *names, which='score'):
  score = lambda given: Score(fn, tuple(given[name] for name in names))
  return lambda **given: {'mask': Causal(), **ORDERS, which: score(given)}


PERMUTED = {
  'query_order': np.random.default_rng(0).permutation(T) + S - T,
  'key_order': np.random.default_rng(1).permutation(S),
}
# Of one side alone, and of each row its own.
TAGS = {'key_tags': {'prefix': np.arange(S) < np.array([[40], [9]])}}
POSITIONS = {
  f'{side}_tags': {POSITION: np.arange(length) * np.array([[1], [2]])}
  for side, length in (('query', T), ('key', S))
}
SEGMENTS = {
  'query_segments': documents(T),
  'key_segments': documents(S),
}

FEATURES = (
  Feature('grouped queries'),
  Feature('one key head', key_heads=1),
  Feature('values wider than keys', widths=(32, 64)),
  Feature('values narrower than keys', widths=(64, 32)),
  Feature('mask: causal', masked(Causal())),
  Feature('mask: causal window', masked(Causal() & Window(40))),
  Feature('mask: window of both sides', masked(Window(40, 30))),
  Feature(
    'mask: window and first keys', masked(Causal() & (Window(9) | Sinks(3)))
  ),
  Feature('mask: prefix, by tags', masked(Causal() | Prefix(), **TAGS), rows=2),
  Feature('mask: block-causal', masked(BlockCausal(50))),
  Feature('mask: of your own', masked(Even())),
  Feature('documents and pads', masked(Causal(), **SEGMENTS)),
  Feature('tokens in any order', lambda: {'mask': Causal(), **PERMUTED}),
  Feature('soft cap', lambda: {'softcap': 2.0}),
  Feature(
    'bias of each pair',
    lambda bias: {'bias': bias},
    {'bias': ('b', 'h', 't', 's')},
  ),
  Feature(
    'bias shared by rows or heads',
    lambda bias: {'bias': bias},
    {'bias': (1, 1, 't', 's')},
  ),
  Feature('score: ALiBi', scored(Slopes(), 'slopes'), {'slopes': ('h',)}),
  Feature(
    'score: ALiBi, of positions',
    lambda slopes: {'score': Score(Slopes(), (slopes,)), **POSITIONS},
    {'slopes': ('h',)},
    rows=2,
  ),
  Feature(
    'score: T5 buckets',
    scored(Buckets(64, causal=False), 'table'),
    {'table': ('h', 32)},
  ),
  Feature(
    'score: a table of distances',
    scored(Relative(4), 'table'),
    {'table': ('h', 33)},
  ),
  Feature(
    'score: numbers of queries and keys',
    lambda a, b: {
      'mask': Causal(),
      **ORDERS,
      'score': Score(Difference(), (), (a,), (b,)),
    },
    {'a': ('b', 't', 'h'), 'b': ('b', 's', 'h')},
  ),
  Feature('score: of your own', scored(doubled, 'weight'), {'weight': ('h',)}),
  Feature(
    'factor of the numerator',
    scored(RelativeFactor(4), 'table', which='factor'),
    {'table': ('h', 33)},
  ),
  Feature('sinks', lambda sinks: {'sinks': sinks}, {'sinks': ('h',)}),
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
      params = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory='nan',
        out_of_bounds_reads='raise',
      )
      stack.enter_context(pltpu.force_tpu_interpret_mode(params))
    if name == 'gpu':
      stack.enter_context(interpreted())
    yield


def own(feature: Feature, name: str) -> Feature:
  """The feature in the type, and of the size, that suits an implementation."""
  if name == 'tpu':
    feature = dataclasses.replace(feature, sizes=SMALL)
  if name == 'gpu':
    narrower = {'float32': 'float16'}.get(feature.dtype, feature.dtype)
    sizes = SMALL | {'b': feature.rows}
    feature = dataclasses.replace(feature, dtype=narrower, sizes=sizes)
  return feature


def results(feature, name, blocks, wider=None):
  """Gradients by q, k, v and other arrays, and o; rounded inputs, computed in
  their dtype or one that is wider."""
  rng = np.random.default_rng(0)
  rounded = lambda shape: rng.normal(size=shape).astype(feature.dtype)
  draw = lambda shape: jnp.asarray(rounded(shape), wider or feature.dtype)
  arrays = [draw(shape) for shape in feature.shapes]
  # Small: slopes of 1 at a distance of 100 would make scores of 100.
  given = {k: draw(feature.shape(*v)) / 8 for k, v in feature.given.items()}
  w = draw(feature.shape('b', 't', 'h', feature.widths[1]))
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


def reason(refusal: NotImplementedError) -> str:
  """Why an implementation refuses, of what it says."""
  who, _, why = str(refusal).partition(': ')
  if not who.startswith('attention, implementation='):
    raise refusal
  return why.rsplit('. Leave', 1)[0]


def outcome(feature: Feature, name: str) -> str:
  """'yes', or why not.

  Raises:
    AssertionError: it ran, and is further off than rounding explains.
  """
  feature = own(feature, name)
  with jax.enable_x64(feature.dtype == 'float64'):
    try:
      with machine(name):
        blocks = TILES.get(name)
        got = results(feature, name, blocks)
    except NotImplementedError as refusal:
      return reason(refusal)
  # Precision is the matter of other tests: this is well above any rounding of
  # sums, and well below any mistake. Half precision rounds results alone.
  eps = float(jnp.finfo(feature.dtype).eps)
  half = eps > 1e-4
  for i, (one, other) in enumerate(zip(got, exact(feature))):
    scale = max(np.sqrt(np.mean(np.square(other))), 1)
    error = np.abs(one - other).max() / scale
    # A gradient of what pairs share is a sum over all of them whose terms
    # cancel, and what the rounding of o has done to each row adds up in it.
    shared = 3 <= i < len(got) - 1
    if not error <= ((16 if shared else 8) if half else 512) * eps:
      raise AssertionError(f'{feature.name}, {name}: off by {error:.1e}')
  return 'yes'


def modes(name: str) -> dict[str, Callable]:
  """A derivative in each mode."""
  blocks = TILES.get(name)
  f = lambda x: jnp.sum(
    jnp.square(
      flash.attention(
        x, x, x, implementation=name, mask=Causal(), blocks=blocks
      )
    )
  )
  along = lambda f: lambda x: jax.jvp(f, (x,), (x,))[1]
  return {
    'derivative: reverse': jax.grad(f),
    'derivative: forward': along(f),
    'derivative: forward over reverse': along(jax.grad(f)),
    'derivative: reverse over reverse': jax.grad(
      lambda x: jnp.vdot(x, jax.grad(f)(x))
    ),
  }


def derivatives(name: str) -> dict[str, str]:
  """Which modes of differentiation an implementation has.

  Raises:
    AssertionError: it has one, and is further off than rounding explains.
  """
  dtype = 'float16' if name == 'gpu' else 'float32'
  x = np.random.default_rng(0).normal(size=(1, 150, 1, 32)).astype(dtype)
  found = {}
  for mode, form in modes(name).items():
    try:
      with machine(name):
        result = jax.jit(form)(jnp.asarray(x))
    except NotImplementedError as refusal:
      found[mode] = reason(refusal)
    except TypeError as refusal:
      said = str(refusal).partition('\n')[0].rstrip('.')
      if "can't apply forward-mode" not in said:
        raise
      found[mode] = f"JAX says: {said}; use implementation='plain'"
    else:
      with jax.enable_x64(True):
        right = jax.jit(modes('plain')[mode])(jnp.asarray(x, jnp.float64))
        right = np.asarray(right)
      error = np.abs(np.asarray(result, np.float64) - right).max()
      error /= np.sqrt(np.mean(np.square(right)))
      eps = float(jnp.finfo(dtype).eps)
      # As in `outcome`; a second derivative rounds the first.
      rounds = 4 if ' over ' in mode else 1
      if not error <= (8 if eps > 1e-4 else 512 * rounds) * eps:
        raise AssertionError(f'{mode}, {name}: off by {error:.1e}')
      found[mode] = 'yes'
  return found


NAMES = tuple(name for name in flash.BACKENDS if name != 'cudnn')  # a library


def column(name: str, said=lambda line: None) -> dict[str, str]:
  """Outcomes of an implementation."""
  found = {}
  for feature in FEATURES:
    said(f'{name}: {feature.name}')
    found[feature.name] = outcome(feature, name)
  said(f'{name}: derivatives')
  return found | derivatives(name)


def elsewhere(name: str) -> dict[str, str]:
  """The same, in a process as `gpu_interpreter` needs."""
  return json.loads(devices.run('-m', 'tests.flash_matrix', name))


def matrix() -> dict[str, dict[str, str]]:
  """Outcomes by feature, then by implementation."""
  columns = {
    name: elsewhere(name) if name == 'gpu' else column(name, print)
    for name in NAMES
  }
  return {
    row: {name: columns[name][row] for name in NAMES} for row in columns['xla']
  }


def page(rows) -> str:
  """docs/flash.md."""
  notes: list[str] = []

  def cell(found):
    if found == 'yes':
      return found
    if found not in notes:
      notes.append(found)
    return f'no ({notes.index(found) + 1})'

  table = markdown(
    ['', *(f'`{name}`' for name in NAMES)],
    [
      [row, *(cell(cells[name]) for name in NAMES)]
      for row, cells in rows.items()
    ],
  )
  reasons = '\n'.join(f'{i}. {why}' for i, why in enumerate(notes, 1))
  about = inspect.cleandoc(flash.__doc__ or '')
  return (
    '# What attention can do, and where\n\n'
    'Written by `python -m tests.flash_matrix`, which ran every cell and '
    'compared it with `plain` in float64, for values and gradients; '
    '`tests/test_flash_matrix.py` does so again. Kernels were interpreted; '
    'those for GPUs have been compiled besides, and have not run on hardware '
    '([log](benchmarks/flash_gpu_log.md)). '
    'Arrays were in float32 where a row says nothing else, for `gpu` in '
    'float16. `cudnn` is a library, which says itself what it can do; it is '
    'asked for a causal mask, a causal window or none, for tokens in order and '
    'of one document, and nothing else.\n\n'
    f'{table}\n\n{reasons}\n\n## Implementations\n\n```\n{about}\n```\n'
  )


if __name__ == '__main__':
  if sys.argv[1:]:
    print(json.dumps(column(sys.argv[1])))
  else:
    PAGE.write_text(page(matrix()), encoding='utf-8')
    print(f'Written: {PAGE}')
