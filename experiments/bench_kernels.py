"""The static schedules of TPU kernels, ours beside jax's, with no TPU.

The compiler of a TPU writes down the program that it makes: bundles of
instructions, one a cycle, and which units each keeps busy. So how long a tile
takes, what of it the matrix units work, and what does not fit in the registers
and is spilled, can be counted. What cannot be seen are waits for memory.

  python -m experiments.bench --kernels --static

compiles every kernel of CELLS in a process of its own, for the compiler is told
where to write when it is loaded.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

CHIPS = ('v5e', 'v5p', 'v6e')
TILES = {  # queries x keys, the chosen ones among them
  'forward': ((512, 512), (1024, 512), (1024, 1024), (2048, 512)),
  'backward': ((512, 512), (1024, 512)),
}
PART = 512  # keys of a tile that splash computes at a time
HEADS, LENGTH, WIDTH = 8, 32768, 128
OTHERS = (64, 256)  # widths of which the page has the chosen tiles alone
DKV, DQ = 'backward, dk and dv', 'backward, dq'  # of flash, each a kernel
MXU, VALU, FILL, SPILL = 0, 2, 6, 8  # columns of the table of units
# Cycles of a matrix unit for a product of 16 rows of bfloat16: those of v5e and
# v5p, of 128 x 128, take a row each, which is the chips' peak.
HOLD = {'v5e': 16, 'v5p': 16}
# What else ours may be asked for, in the chosen tiles: see `_asked`.
FEATURES = (
  *('window and sinks', 'documents', 'soft cap', 'ALiBi', 'T5 buckets'),
  *('forget gates', 'dropout'),
)
KERNELS = {  # what they are called, and in the names of the compiler's files
  ('ours', 'forward'): 'flash_forward',
  ('ours', 'backward'): 'flash_backward',
  ('splash', 'forward'): 'splash_mha_fwd_residuals',
  ('splash', 'backward'): 'splash_mha_dkv',
  ('flash', 'forward'): 'flash_attention',
  ('flash', DKV): 'flash_mha_bwd_dkv',
  ('flash', DQ): 'flash_mha_bwd_dq',
}


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The steady state of a kernel: a step of a loop that computes a tile.

  Attributes:
    tile: bundles of the part with the matrix products.
    step: tile, and what every step does besides.
    cycles: of a step, if a bundle waits until the matrix units that it gives
      products are done with those before; None where that is not known.
    masked: tile, where the tile needs a mask and has a program of its own.
    busy: share of the slots for matrix work that a step fills.
    vector: the same for arithmetic on vectors.
    fills, spills: in `tile`.
    masked_spills: in `masked`.
    seconds: of compiling.
  """

  tile: int
  step: int
  masked: int | None
  busy: float
  vector: float
  fills: int
  spills: int
  masked_spills: int | None = None
  cycles: int | None = None
  seconds: float = 0.0


def read(folder: Path, kernel: str, hold: int | None) -> Schedule:
  """The schedule that the compiler wrote of a kernel; `hold` as of HOLD."""
  (program,) = (
    path
    for path in folder.glob(f'*{kernel}*-final_bundles.txt')
    if 'schedule-analysis' not in path.name
  )
  (usage,) = folder.glob(f'*{kernel}*-final_hlo-static-per-bundle-utiliz*.txt')
  head, _, table = usage.read_text().partition('== UTILIZATION:')
  capacity = [int(x) for x in head.split('\n')[2].split()]
  units = [[int(x) for x in row.split()] for row in table.split('\n') if row]
  return steady(lines(program.read_text()), units, capacity, hold)


def lines(program: str) -> list[str]:
  """One for each bundle: address, marks, and instructions."""
  _, _, text = program.partition('control target key end')
  return [x for x in text.split('\n') if re.match(r' *(0x)?[0-9a-f]+ .*?:', x)]


def loop_of(bundles: Sequence[str]) -> dict[int, tuple[int, ...]]:
  """Where the loops begin that a bundle is in, from the outermost inwards."""
  found, loops = {}, ()
  for at, text in enumerate(bundles):
    marks = text.partition('{')[0]
    depth = marks.count('>')
    if not depth:  # behind all loops, or nothing that runs
      continue
    loops = (*loops[: depth - 1], at) if 'LB' in marks else loops[:depth]
    found[at] = loops
  return found


def cycles(bundles: Sequence[str], hold: int) -> int:
  """Of bundles in a row, which wait for the matrix units, and for no other."""
  now, free = 0, {}
  for bundle in bundles:
    used = re.findall(r'vmatmul\S*\.(mxu\d)', bundle)
    now = max([now + 1, *(free.get(unit, 0) for unit in used)])
    free |= dict.fromkeys(used, now + hold)
  return now


def steady(
  bundles: Sequence[str],
  units: Sequence[Sequence[int]],
  capacity: Sequence[int],
  hold: int | None = None,
) -> Schedule:
  """What of a program is the steady state.

  Branches enclose spans of bundles. Those with matrix products are tiles: of
  several those that fill most slots, for the others begin or end a row of
  tiles; and of these the one without a mask. A step is what is in the same loop
  as the tile, but for a span that holds no tile: it begins or ends a row, too.
  """
  if len(bundles) != len(units):
    raise ValueError(f'{len(bundles)} bundles, but units of {len(units)}')
  begins, branches = {}, []
  for at, text in enumerate(bundles):
    for region in re.findall(r'Start(?:/End empty)? region (\d+)', text):
      begins[region] = at
    for region in re.findall(r'sbr\.rel .*?target = \$region(\d+)', text):
      branches.append((at, region))
  spans = [
    (at, begins[region])
    for at, region in branches
    if begins.get(region, -1) > at
  ]
  loops, own = loop_of(bundles), {}
  for at in loops:
    around = [
      (end - start, start, end) for start, end in spans if start < at < end
    ]
    own.setdefault(min(around)[1:] if around else None, []).append(at)
  total = lambda inside, unit: sum(units[at][unit] for at in inside)
  work = {span: total(inside, MXU) for span, inside in own.items()}
  most = max(work.values())
  tiles = [span for span in own if work[span] > 0.9 * most]
  cost = lambda span: (total(own[span], VALU), len(own[span]))
  tile = min(tiles, key=cost)  # a mask is arithmetic
  holds = lambda span: (
    span is None
    or (span != tile and tile and span[0] <= tile[0] and tile[1] <= span[1])
  )
  inner = loops[own[tile][0]]
  around = sum(
    loops[at][: len(inner)] == inner
    for span, inside in own.items()
    for at in inside
    if holds(span)
  )
  if tile is None:
    around = 0
  step = len(own[tile]) + around
  # Of several, as of a row's first tile and of those behind, the longest.
  masked = max((x for x in tiles if x != tile), key=cost, default=None)
  return Schedule(
    tile=len(own[tile]),
    step=step,
    masked=masked and len(own[masked]),
    busy=work[tile] / (capacity[MXU] * step),
    vector=total(own[tile], VALU) / (capacity[VALU] * step),
    fills=total(own[tile], FILL),
    spills=total(own[tile], SPILL),
    masked_spills=masked and total(own[masked], SPILL),
    cycles=hold and cycles([bundles[at] for at in own[tile]], hold) + around,
  )


# ------------------------------------------------------------- what is compiled


def program(whose: str, direction: str, q: int, k: int, width: int):
  """A function and the shapes of its arguments; causal, in bfloat16."""
  import jax
  import jax.numpy as jnp

  shape = lambda *x: jax.ShapeDtypeStruct(x, jnp.bfloat16)
  heads = HEADS * WIDTH // width  # so that what fits in HBM fits with others
  if whose in ('ours', *FEATURES):
    asked = _asked(whose, heads)
    attend, shapes = _ours(q, k, asked), [shape(1, LENGTH, heads, width)] * 3
  elif whose == 'splash':
    attend = _splash(heads, q, k, direction == 'forward')
    shapes = [shape(heads, LENGTH, width)] * 3
  else:
    attend = _flash(q, k)
    shapes = [shape(1, heads, LENGTH, width)] * 3
  if direction == 'forward':
    return attend, shapes

  def loss(*inputs):
    out = jax.tree.leaves(attend(*inputs))[0]
    return jnp.sum(out.astype(jnp.float32))

  return jax.grad(loss, (0, 1, 2)), shapes


def _ours(q, k, asked):
  from pallas_kernels.blocks import Blocks
  from pallas_kernels.flash import tpu
  from pallas_kernels.problem import problem

  def attend(*inputs):
    given = asked()
    side = (None, given.pop('segments', None), None)
    rule, extras, query, key = problem(
      *inputs, query=side, key=side, blocks=Blocks(q, k), **given
    )
    return tpu.attend(rule, *inputs, extras, query, key)

  return attend


def _asked(feature: str, heads: int):
  """What makes the arguments of `problem`, to be called while it is traced."""
  import jax.numpy as jnp

  from pallas_kernels.dropout import Dropout
  from pallas_kernels.masks import Causal, Sinks, Window
  from pallas_kernels.scores import Buckets, Difference, Score, Slopes

  more = {
    'window and sinks': lambda: {
      'mask': Causal() & (Window(LENGTH // 8) | Sinks(4))
    },
    'documents': lambda: {
      'segments': 1 + jnp.arange(LENGTH)[None] // (LENGTH // 4 + 100)
    },
    'soft cap': lambda: {'softcap': 30.0},
    'ALiBi': lambda: {'score': Score(Slopes(), (jnp.ones(heads),))},
    'T5 buckets': lambda: {
      'score': Score(Buckets(128, causal=True), (jnp.ones((heads, 32)),))
    },
    'forget gates': lambda: {
      'score': Score(
        Difference(),
        queries=(gates := jnp.ones((1, LENGTH, heads)),),
        keys=(gates,),
      )
    },
    'dropout': lambda: {'dropout': Dropout(0.1, seed=3)},
  }
  return lambda: {'mask': Causal()} | more.get(feature, dict)()


def _splash(heads, q, k, residuals):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  blocks = splash.BlockSizes(
    block_q=q,
    block_kv=k,
    block_kv_compute=min(PART, k),
    block_q_dkv=q,
    block_kv_dkv=k,
    block_kv_dkv_compute=min(PART, k),
    use_fused_bwd_kernel=True,
  )
  mask = splash.CausalMask((LENGTH, LENGTH))
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=blocks,
    save_residuals=residuals,
  )
  return lambda *inputs: kernel(*inputs)


def _flash(q, k):
  from jax.experimental.pallas.ops.tpu import flash_attention as flash

  blocks = flash.BlockSizes(
    **dict(block_q=q, block_k_major=k, block_k=k, block_b=1),
    **dict(block_q_major_dkv=q, block_k_major_dkv=k),
    **dict(block_q_dkv=q, block_k_dkv=k),
    **dict(block_q_dq=q, block_k_major_dq=k, block_k_dq=k),
  )

  def attend(*inputs):
    return flash.flash_attention(*inputs, causal=True, block_sizes=blocks)

  return attend


def compile_one(cell: Sequence[str], folder: str) -> None:
  """In a process of its own: compiles a cell, and prints its schedule."""
  import os
  import time

  whose, direction, chip, *sizes = cell
  os.environ['JAX_PLATFORMS'] = 'cpu'
  flags = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
  os.environ['LIBTPU_INIT_ARGS'] = flags
  import jax

  from pallas_kernels import chips

  attend, shapes = program(whose, direction, *map(int, sizes))
  own = 'ours' if whose in FEATURES else whose
  with jax.set_mesh(chips.mesh(chip)):
    lowered = jax.jit(attend).lower(*chips.on(chip, shapes))
  began = time.perf_counter()
  lowered.compile()
  seconds = time.perf_counter() - began
  found = read(Path(folder), KERNELS[own, direction], HOLD.get(chip))
  found = dataclasses.replace(found, seconds=seconds)
  print(json.dumps(dataclasses.asdict(found)))


def schedule(cell: Sequence[str | int]) -> Schedule:
  """Of whose kernel, direction, chip, queries and keys in a tile, and width."""
  cell = list(map(str, cell))
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, '-m', 'experiments.bench_kernels', *cell]
    done = subprocess.run(
      [*command, folder], capture_output=True, text=True, check=False
    )
  if done.returncode:
    raise RuntimeError(f'{" ".join(cell)}:\n{done.stderr[-2000:]}')
  return Schedule(**json.loads(done.stdout.splitlines()[-1]))


def chosen(direction: str, chip: str, width: int) -> tuple[int, int]:
  """Queries and keys in the tile that a chip gets, in bfloat16."""
  import jax

  from pallas_kernels import blocks, chips

  with jax.set_mesh(chips.mesh(chip)):
    tile = blocks.tile(blocks.Blocks(), direction, LENGTH, LENGTH, 2 * width)
  return tile.q, tile.k


def static(args: argparse.Namespace) -> list[str]:
  """The page: a title, and paragraphs."""
  del args
  from jaxattn.analysis.table import markdown

  tiles = [
    (direction, chip, *tile, WIDTH)
    for chip in CHIPS
    for direction, tiles in TILES.items()
    for tile in tiles
  ] + [
    (direction, chip, *chosen(direction, chip, width), width)
    for width in OTHERS
    for chip in CHIPS
    for direction in TILES
  ]
  cells = [(whose, *tile) for tile in tiles for whose in ('ours', 'splash')] + [
    ('flash', direction, chip, 128, 128, WIDTH)
    for chip in CHIPS
    for direction in ('forward', DKV, DQ)
  ]
  asked = [
    (feature, direction, chip, *chosen(direction, chip, WIDTH), WIDTH)
    for chip in CHIPS
    for direction in TILES
    for feature in FEATURES
  ]
  found = {
    cell: schedule(cell)
    for cell in track(cells + asked, 'compiling', console=Console(stderr=True))
  }
  rows = []
  for cell in cells:
    one, (whose, direction, chip, q, k, width) = found[cell], cell
    rival = found.get(('splash', *cell[1:]))
    rows.append(
      [
        *(chip, direction, str(width), f'{q} x {k}', whose),
        *(f'{one.tile:,}', f'{one.step:,}'),
        '-' if one.masked is None else f'{one.masked:,}',
        f'{one.step / rival.step:.2f}' if rival else '-',
        '-' if one.cycles is None else f'{one.cycles:,}',
        f'{one.cycles / rival.cycles:.2f}' if rival and one.cycles else '-',
        *(f'{one.busy:.0%}', f'{one.fills:,}', f'{one.spills:,}'),
        '-' if one.masked is None else f'{one.masked_spills:,}',
        f'{one.seconds:.0f}',
      ]
    )
  head = [
    *('chip', 'direction', 'width', 'queries x keys', 'whose'),
    *('bundles, tile', 'step', 'tile masked', 'step over splash'),
    *('cycles', 'cycles over splash'),
    *('MXU slots', 'fills', 'spills', 'spills masked', 'seconds to compile'),
  ]
  features = []
  for cell in asked:
    one, (feature, direction, chip, q, k, _) = found[cell], cell
    plain = found['ours', *cell[1:]]
    features.append(
      [
        *(chip, direction, f'{q} x {k}', feature, f'{one.step:,}'),
        f'{one.step / plain.step:.2f}',
        *(f'{one.masked or 0:,}', f'{one.vector:.0%}'),
        *(f'{one.spills:,}', f'{one.masked_spills or 0:,}'),
      ]
    )
  libtpu = importlib.metadata.version('libtpu')
  return [
    '# Static schedules of attention on TPUs',
    f'Causal, {LENGTH:,} tokens, bfloat16, compiled by libtpu {libtpu}; '
    f'nothing is run. There are {HEADS} heads of width {WIDTH}, in several '
    'tiles with the chosen ones among them, and fewer that are wider, or more '
    'that are narrower, in the chosen ones.',
    'A tile is the part of a step that computes one; a step is that and what '
    'every step does besides, such as starting copies: of the grid, or of our '
    'loop over the tiles of a row. What a row begins and ends with is in '
    'neither. Ours computes '
    'tiles that lie wholly under the diagonal without a mask, and the others '
    'by a program of their own ("masked"); splash masks all. Splash saves '
    f'residuals forward, computes {PART} keys at a time, and its backward is '
    "the fused one; `flash` is jax's, with its default blocks, and has two "
    'kernels backward, which both compute all weights. MXU slots are those '
    'that a step fills: no more of the peak can be reached. A bundle takes a '
    'cycle, and more where it waits: for memory, or for a matrix unit that is '
    'not done with the product before, which takes '
    f"{HOLD['v5p']} cycles on v5e and v5p (a row each, as at the chips' peak). "
    'Cycles are those of a step with the second kind of wait. A '
    'spill is a register written to memory for want of room, a fill is one '
    'read back. Seconds to compile include writing the schedules down.',
    markdown(head, rows),
    '## With more than a causal mask',
    f'Ours, in the chosen tiles, {WIDTH} wide: a window of {LENGTH // 8:,} keys'
    ' and 4 first ones, 4 documents, a soft cap, ALiBi, a T5 bias of 32 buckets'
    ' up to a distance of 128, sums of forget gates, and dropout; bundles of'
    ' a step, those over what a step takes under a causal mask alone, and the'
    ' share of the slots for arithmetic on vectors that it fills: what fills'
    ' them can be no shorter, whatever it spills. In a step whose tokens are'
    ' further apart than the buckets tell, the table is read once; tiles that'
    ' are nearer have the program of those with a mask.',
    markdown(
      [
        *('chip', 'direction', 'queries x keys', 'with', 'step'),
        *('step over causal', 'tile masked', 'VALU slots'),
        *('spills', 'spills masked'),
      ],
      features,
    ),
  ]


if __name__ == '__main__':
  *asked, where = sys.argv[1:]
  compile_one(asked, where)
