"""TPU kernels of attention, compiled for chips that are not here: do they fit?

Forward and backward go through the compiler of each chip, whose verdict on VMEM
and HBM is the chip's own. Nothing is run.

  python -m experiments.bench --kernels --compile

compiles every cell; tests compile some of them (`tests/test_flash_aot.py`).
"""

import argparse
import dataclasses
import importlib.metadata
import re

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from jaxattn.analysis.table import markdown
from jaxattn.parallel.place import amount
from pallas_kernels import chips
from pallas_kernels.blocks import Blocks
from pallas_kernels.dropout import Dropout
from pallas_kernels.flash import tpu
from pallas_kernels.masks import (
  BlockCausal,
  Causal,
  Everything,
  Mask,
  Prefix,
  Sinks,
  Window,
)
from pallas_kernels.problem import problem
from pallas_kernels.scores import (
  Buckets,
  Difference,
  RelativeFactor,
  Score,
  Slopes,
)

SMALL = Blocks(256, 256)  # compiles in a second, and has the same code


def heads(*shape):
  """Operands of a score."""
  return jax.ShapeDtypeStruct(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Even(Mask):
  """A user's own, which says of no tile that it is empty or full."""

  def __call__(self, query, key):
    return (key.order % 2 == 0) & (key.order <= query.order)


FEATURES = {
  'window and sinks': {'mask': Causal() & (Window(300) | Sinks(4))},
  'window on both sides': {'mask': Window(40, 30)},
  'block causal, own mask': {'mask': BlockCausal(50) & Even()},
  'everything': {'mask': Everything()},
  'segments': {'segments': True, 'b': 2},
  'lengths': {'t': 1000, 's': 700},
  'odd heads': {'d': 40, 'e': 72},
  'float32': {'dtype': jnp.float32},
  'soft cap': {'softcap': 30.0},
  'slopes': {'score': Score(Slopes(), (heads(2),))},
  'buckets': {'score': Score(Buckets(128, causal=True), (heads(2, 32),))},
  'factors': {'factor': Score(RelativeFactor(), (heads(2, 33),))},
  'forget': {
    'score': Score(
      Difference(), queries=(heads(1, 1024, 2),), keys=(heads(1, 1024, 1),)
    )
  },
  'bias': {'bias': True},
  'dropout': {'dropout': Dropout(0.1, seed=3)},
}
# Those of the blocks that are chosen, which take longer.
SIZES = {
  f'{d} wide, {jnp.dtype(dtype)}': {'t': 4096, 'd': d, 'dtype': dtype}
  for d in (64, 128, 256)
  for dtype in (jnp.bfloat16, jnp.float32)
} | {f'{t:,} tokens': {'t': t, 'h': 1} for t in (2**13, 2**17, 2**20)}
SIZES['all at once, 256 wide, float32'] = {
  **dict(t=4096, b=2, d=256, dtype=jnp.float32),
  'mask': Causal() & (Window(300) | Sinks(4)) | Prefix(),
  'key_tags': ('prefix',),
  'segments': True,
  'softcap': 30.0,
  'score': Score(Slopes(), (heads(2),)),
  'factor': Score(RelativeFactor(), (heads(2, 33),)),
  'bias': True,
  'dropout': Dropout(0.1, seed=3),
}
CELLS = FEATURES | {
  name: {**given, 'blocks': None} for name, given in SIZES.items()
}


def compiled(
  chip,
  t=1024,
  s=None,
  b=1,
  h=2,
  k=1,
  d=128,
  e=None,
  dtype=jnp.bfloat16,
  mask=None,
  segments=False,
  key_tags=(),
  score=None,
  factor=None,
  bias=False,
  blocks=SMALL,
  **given,
):
  """The program of o, m, l and all gradients, for one chip.

  Args:
    chip: of `chips.TOPOLOGIES`.
    t, s, b, h, k, d, e: sizes by the usual letters; s is t and e is d if None.
    dtype: of q, k and v.
    mask: who sees whom; None is causal.
    segments: several documents a row.
    key_tags: the names of tags of keys.
    score, factor: with shapes for operands.
    bias: dense, and with a gradient; True, or its rows and heads.
    blocks: None for those that are chosen.
    **given: further arguments of `problem`.

  Raises:
    JaxRuntimeError: it does not fit.
  """
  s, e, mask = s or t, e or d, mask or Causal()
  shape = lambda *x, dtype=dtype: jax.ShapeDtypeStruct(x, dtype)
  arrays = shape(b, t, h, d), shape(b, s, k, d), shape(b, s, k, e)
  bias = shape(*((1, h) if bias is True else bias), t, s) if bias else None
  ints = shape(b, t, dtype=jnp.int32), shape(b, s, dtype=jnp.int32)
  sides = ints if segments else (None, None)
  tags = dict.fromkeys(key_tags, ints[1])

  def loss(q, k, v, score, factor, bias, sides, tags):
    query, key = (None, sides[0], None), (None, sides[1], tags)
    rule, extras, query, key = problem(
      *(q, k, v),
      mask=mask,
      query=query,
      key=key,
      score=score,
      factor=factor,
      bias=bias,
      blocks=blocks,
      **given,
    )
    if why := tpu.refuses(rule, q, k, v, extras, query, key):
      raise NotImplementedError(why)
    o, m, total = tpu.attend(rule, q, k, v, extras, query, key)
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(total), m

  gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4, 5), has_aux=True))
  shapes = chips.on(chip, (*arrays, score, factor, bias, sides, tags))
  with jax.set_mesh(chips.mesh(chip)):
    return gradient.lower(*shapes).compile()


def verdict(chip: str, **given) -> str:
  """Whether it fits, with bytes of temporaries in HBM, or where it does not."""
  try:
    memory = compiled(chip, **given).memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    where = re.search(r'memory.*?\b([hv]mem|hbm)\b', str(error), re.I)
    return f'**not in {where[1].upper() if where else "?"}**'
  held = memory.temp_size_in_bytes
  return f'fits, {amount(held)}' if held else 'fits'


def page(args: argparse.Namespace) -> list[str]:
  """A title, and paragraphs."""
  del args
  if why := chips.missing():
    raise SystemExit(why)
  jax.config.update('jax_platforms', 'cpu')  # else a TPU would be looked for
  rows = [
    [name, *(verdict(chip, **given) for chip in chips.TOPOLOGIES)]
    for name, given in track(
      CELLS.items(), 'compiling', console=Console(stderr=True)
    )
  ]
  libtpu = importlib.metadata.version('libtpu')
  return [
    '# Attention, compiled for five TPUs',
    f'Forward and backward in one program, compiled by libtpu {libtpu}; '
    'nothing is run. Cells say whether it fits into VMEM and HBM, and how much '
    'of HBM temporaries take: v4, v5e and v6e keep some of those of short rows '
    'in VMEM. Where a row says nothing else it is causal, in '
    'bfloat16, 1,024 tokens, two heads on one key head, 128 wide, in small '
    'blocks; widths and lengths are in the blocks that are chosen.',
    markdown(['what', *chips.TOPOLOGIES], rows),
  ]
