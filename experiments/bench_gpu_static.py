"""What GPU kernels take of a Hopper GPU, ours beside jax's, with no GPU.

The assembler of a GPU says how many registers a thread of a kernel has, and
what does not fit in them and is spilled to far memory; the program around the
kernel says how much shared memory it asks for. How fast a kernel is cannot be
read off this: spills cost time, and the rest decides more.

  python -m experiments.bench --kernels --static --gpu

compiles every cell of CELLS for a described H200 in a process of its own, for
the compiler is told what to write when it is loaded.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

from rich.console import Console
from rich.progress import track

from jaxattn.analysis.table import markdown
from pallas_kernels import chips

CHIP = 'h200'
HEADS, LENGTH = 8, 4096
WRITTEN = 'PTX', 'PTXAS', 'HOST_LLVM'  # of what the compiler makes
NAMES = {  # of our kernels
  'flash_forward': 'forward',
  'flash_backward_dq': 'dq',
  'flash_backward_dk_dv': 'dk, dv',
  'flash_backward_dk': 'dk',
  'flash_backward_dv': 'dv',
}
# Sides of the grid, of a cluster and of a block; then shared memory.
LAUNCH = r'call void @mosaic_gpu_\w+\(ptr \S+, (?:i32 \S+, ){9}i32 (\d+),'
SCORES = 'soft cap', 'ALiBi', 'T5 buckets', 'dropout'
KEYS = 128, 64  # in a tile of jax's forward kernel


@dataclasses.dataclass(frozen=True)
class Cell:
  """What is compiled at once.

  Attributes:
    whose: 'ours' or 'attention_mgpu'.
    what: 'all' kernels, or of jax's 'forward', 'dq' or 'dk, dv'.
    keys: in a tile of jax's; ours chooses.
    scores: what happens to them, of SCORES.
  """

  whose: str
  what: str
  d: int
  causal: bool
  dtype: str = 'bfloat16'
  keys: int = 64
  scores: str = ''


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What the compiler says of one.

  Attributes:
    registers: of a thread when the kernel begins.
    most: of a thread that computes, which takes those of the others.
    stores, loads: bytes that a thread spills, and fetches again.
    shared: bytes of memory that the threads of a block share.
    barriers: of the hardware's kind; those in shared memory are not counted.
    warnings: of the assembler, but for spills.
  """

  registers: int
  most: int
  stores: int
  loads: int
  shared: int
  barriers: int
  warnings: tuple[str, ...] = ()


def read(text: str) -> dict[str, Kernel]:
  """Kernels by name, of what the compiler wrote."""
  found = {}
  _, *parts = re.split(r'^\.visible \.entry ', text, flags=re.MULTILINE)
  for part in parts:
    entry = part.partition('(')[0]
    one = functools.partial(re.search, string=part)
    said = one(rf"Compiling entry function '{entry}'")
    shared = one(LAUNCH)
    if said is None or shared is None:
      raise ValueError(f'the compiler says nothing of {entry}:\n{part[-2000:]}')
    spills = one(r'(\d+) bytes spill stores, (\d+) bytes spill loads')
    registers = one(r'Used (\d+) registers')[1]
    barriers = one(r'used (\d+) barriers')
    most = one(r'setmaxnreg\.inc\S*\s+(\d+)')
    warnings = re.findall(r'ptxas (?:warning|info) *: (.*)', part)
    name = entry.removesuffix('_mosaic_gpu_kernel')
    while name in found:  # jax's kernels for gradients have none
      name += "'"
    found[name] = Kernel(
      registers=int(registers),
      most=int(most[1] if most else registers),
      stores=int(spills[1]),
      loads=int(spills[2]),
      shared=int(shared[1]),
      barriers=int(barriers[1]) if barriers else 0,
      warnings=tuple(
        line
        for line in warnings
        if 'serialized' in line or 'Performance' in line
      ),
    )
  return found


# ------------------------------------------------------------- what is compiled


def attention(cell: Cell):
  """Ours, or jax's, of q, k and v; and our further arguments' shapes."""
  if cell.whose == 'ours':
    return _ours(cell)
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  sides = 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq'
  config = attention_mgpu.TuningConfig(
    block_q=64,
    block_kv=cell.keys,
    max_concurrent_steps=2,
    causal=cell.causal,
    **dict.fromkeys(sides, 64),
  )
  return lambda q, k, v: attention_mgpu.attention(q, k, v, config), ()


def _ours(cell: Cell):
  import jax
  import jax.numpy as jnp

  from pallas_kernels import flash, scores
  from pallas_kernels.masks import Causal, Everything

  numbers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  more: tuple = ()
  given: Callable[..., dict[str, Any]] = lambda *more: {}
  if cell.scores == 'soft cap':
    given = lambda: {'softcap': 30.0}
  elif cell.scores == 'ALiBi':
    more = (numbers(HEADS),)
    given = lambda x: {'score': flash.Score(scores.Slopes(), (x,))}
  elif cell.scores == 'T5 buckets':
    more = (numbers(HEADS, 32),)
    fn = scores.Buckets(128, causal=cell.causal)
    given = lambda x: {'score': flash.Score(fn, (x,))}
  elif cell.scores == 'dropout':
    given = lambda: {'dropout': flash.Dropout(0.1, 7)}
  mask = Causal() if cell.causal else Everything()

  def attend(q, k, v, *more):
    return flash.attention(
      q, k, v, mask=mask, implementation='gpu', **given(*more)
    )

  return attend, more


def compile_one(cell: Cell) -> None:
  """In a process of its own: compiles a cell, and prints what tiles it has."""
  import jax

  from pallas_kernels.flash import gpu

  attend, more = attention(cell)
  x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, cell.d), cell.dtype)
  tiles = {}
  if cell.whose != 'ours':
    backward = 'dq', 'dk, dv'
    tiles = {'forward': f'128 x {cell.keys}'} | dict.fromkeys(
      backward, '64 x 64'
    )

  def run(q, k, v, *more):
    o, back = jax.vjp(lambda *x: attend(*x, *more), q, k, v)
    if cell.what == 'forward':  # beside what the gradient would need
      return o, back
    dq, dk, dv = back(o)
    wanted = {'dq': dq, 'dk, dv': (dk, dv)}
    return wanted.get(cell.what, (dq, dk, dv))

  @functools.wraps(gpu._call)
  def noted(rule, plan, kernel, name, *rest, **others):
    tiles[name] = f'{plan.tile.q} x {plan.tile.k}'
    return call(rule, plan, kernel, name, *rest, **others)

  call = gpu._call
  with mock.patch.object(gpu, '_call', noted), jax.set_mesh(chips.mesh(CHIP)):
    lowered = jax.jit(run).lower(*chips.on(CHIP, (x, x, x, *more)))
    lowered.compile()
  print()
  print(json.dumps(tiles))


class Refused(Exception):
  """A cell does not compile."""


def compiled(cell: Cell) -> dict[str, tuple[str, Kernel]]:
  """Its kernels, by what they are: the tile, and what the compiler says."""
  settings = {f'MOSAIC_GPU_DUMP_{what}': '1' for what in WRITTEN}
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.bench_gpu_static'),
      json.dumps(dataclasses.asdict(cell)),
    ],
    env={**os.environ, **settings, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    errors='replace',
    check=False,
  )
  if done.returncode:
    raise Refused(done.stderr.strip())
  tiles = json.loads(done.stdout.splitlines()[-1])
  kernels = read(done.stdout)
  if cell.whose == 'ours':
    return {NAMES[name]: (tiles[name], one) for name, one in kernels.items()}
  # Forward is among them always; the others have no names.
  (forward,) = (name for name in kernels if name == 'entry')
  if cell.what != 'forward':
    del kernels[forward]
  (one,) = kernels.values()
  return {cell.what: (tiles[cell.what], one)}


def cells() -> list[Cell]:
  """All of them, the plain ones first."""
  sizes = [(d, causal) for d in (64, 128, 256) for causal in (True, False)]
  ours = [Cell('ours', 'all', *size) for size in sizes]
  alike = [
    Cell('ours', 'all', 128, causal, 'float16') for causal in (True, False)
  ]
  modified = [
    Cell('ours', 'all', d, True, scores=scores)
    for d in (64, 128)
    for scores in SCORES
  ]
  theirs = functools.partial(Cell, 'attention_mgpu')
  forward = [
    theirs('forward', *size, 'float16', keys) for size in sizes for keys in KEYS
  ]
  backward = [
    theirs(what, d, False, 'float16')
    for d in (64, 128, 256)
    for what in ('dq', 'dk, dv')
  ]
  # What it says that it cannot do; the page has its words.
  beyond = [theirs('forward', 128, True), theirs('dq', 128, True, 'float16')]
  return [*ours, *alike, *modified, *forward, *backward, *beyond]


def row(
  cell: Cell, what: str, tile='-', one: Kernel | None = None
) -> list[str]:
  numbers = ['-'] * 6
  if one is not None:
    fields = one.registers, one.most, one.stores, one.loads, one.shared
    numbers = [f'{x:,}' for x in (*fields, one.barriers)]
  pairs = 'causal' if cell.causal else 'all'
  about = what, cell.scores or '-', pairs, str(cell.d), cell.dtype
  return [*about, cell.whose, tile, *numbers]


def table(
  found: Mapping[Cell, dict[str, tuple[str, Kernel]] | str],
) -> tuple[str, list[str]]:
  """A row for each kernel, or for what a cell says instead; and these words."""
  rows, said = [], []
  for cell, kernels in found.items():
    if isinstance(kernels, str):
      if kernels not in said:
        said.append(kernels)
      note = f'no ({said.index(kernels) + 1})'
      tile = f'128 x {cell.keys}' if cell.what == 'forward' else '64 x 64'
      rows.append([*row(cell, cell.what, tile)[:7], note, *['-'] * 5])
    else:
      rows += [row(cell, what, *one) for what, one in kernels.items()]
  order = [*NAMES.values()]
  modified = ['-', *SCORES]
  rows.sort(
    key=lambda x: (modified.index(x[1]), order.index(x[0]), int(x[3]), x[2])
  )
  head = [
    *('kernel', 'scores', 'pairs', 'd', 'type', 'whose', 'queries x keys'),
    *('registers', 'that compute', 'spill stores', 'loads'),
    *('shared memory', 'barriers'),
  ]
  return markdown(head, rows), said


def page(args: argparse.Namespace) -> list[str]:
  """The page: a title, and paragraphs."""
  del args
  if why := chips.missing(CHIP):
    raise SystemExit(f'--static --gpu compiles for a GPU: {why}')
  found: dict[Cell, dict[str, tuple[str, Kernel]] | str] = {}
  console = Console(stderr=True)
  for cell in track(cells(), 'compiling', console=console):
    try:
      found[cell] = compiled(cell)
    except Refused as refusal:
      if cell.whose == 'ours':
        raise RuntimeError(f'{cell}:\n{str(refusal)[-2000:]}') from None
      found[cell] = words(str(refusal))
  rows, said = table(found)
  warned = {
    f'{cell.whose}, {what}, d = {cell.d}: {line}'
    for cell, kernels in found.items()
    if not isinstance(kernels, str)
    for what, (_, one) in kernels.items()
    for line in one.warnings
  }
  device = re.search(r'device_description_str: "(.*)"', chips.GPUS[CHIP])[1]
  most = re.search(r'memory_per_block_optin: (\d+)', chips.GPUS[CHIP])[1]
  return [
    '# Registers and spills of attention on a described H200',
    f'For {device}, which was described to the compiler and is not there: '
    f'{HEADS} heads, {LENGTH:,} tokens, compiled with {versions()}. Nothing is '
    'run, and how fast these kernels are is not known; see the '
    '[log](flash_gpu_log.md).',
    'Registers are those of a thread when a kernel begins, and of one that '
    'computes after it has taken those of the threads that fetch. What is '
    'spilled is in bytes of a thread, over its whole program, in or out of '
    f'loops. Shared memory is in bytes, of {int(most):,} that a block can '
    "have. `attention_mgpu` is jax's; of its forward kernel both tiles are "
    'here from which `--gpu` takes the faster. All forward kernels write what '
    'a backward pass needs. Barriers are named ones.',
    rows,
    '\n'.join(f'{i}. {why}' for i, why in enumerate(said, 1)),
    'The assembler says that matrix products wait for each other: '
    + ('; '.join(sorted(warned)) if warned else 'nowhere.'),
  ]


def words(error: str) -> str:
  """Of what a process wrote, what its exception says."""
  lines = [line for line in error.splitlines() if re.match(r'[\w.]+: ', line)]
  return lines[-1] if lines else error.splitlines()[-1]


def versions() -> str:
  """Of the compiler."""
  found = []
  for package in ('jaxlib', 'jax-cuda13-plugin', 'nvidia-cuda-nvcc'):
    try:
      found.append(f'{package} {importlib.metadata.version(package)}')
    except importlib.metadata.PackageNotFoundError:
      found.append(f'no {package}')
  return ', '.join(found)


if __name__ == '__main__':
  compile_one(Cell(**json.loads(sys.argv[1])))
