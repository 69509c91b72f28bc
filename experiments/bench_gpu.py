"""Attention on a Hopper GPU: is it right, and how fast is it beside others.

  python -m experiments.bench --kernels --gpu

First every cell is checked, see `bench_gpu_cells`. Then ours, cuDNN's, jax's
`attention_mgpu` and torch's attention are timed, taking turns, on random
numbers. A rival that is not installed, or refuses, has no numbers, and the page
says why.

One process does it all, in about ten minutes; it ends with the page.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments import bench_gpu_cells as cells
from experiments.bench_gpu_cells import say
from jaxattn.analysis.table import markdown
from pallas_kernels import flash
from pallas_kernels.flash import gpu
from pallas_kernels.masks import Causal, Everything

LENGTHS = tuple(2**n for n in range(10, 17))
ROWS, WIDE = 2**15, 2048  # tokens of a batch; heads times width
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Timed:
  """What is timed: h heads of width d, of b rows of t tokens, in bfloat16."""

  t: int
  d: int
  causal: bool

  @property
  def shape(self):
    return max(1, ROWS // self.t), self.t, WIDE // self.d, self.d

  def flops(self, backward: bool) -> float:
    """Of the matrix products: two forward, five backward."""
    b, t, h, d = self.shape
    products = 5 if backward else 2
    return products * 2 * b * h * t * t * d / (2 if self.causal else 1)


def arrays(case: Timed, dtype='bfloat16'):
  """q, k, v and the gradient of o."""
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(key, case.shape, dtype) for key in keys]


def forward(attend, case: Timed, dtype='bfloat16') -> Call:
  q, k, v, _ = arrays(case, dtype)
  program = jax.jit(attend).lower(q, k, v).compile()
  return lambda: program(q, k, v)


def backward(attend, case: Timed, dtype='bfloat16') -> Call:
  """It alone, after a forward pass that is not timed."""
  q, k, v, do = arrays(case, dtype)
  _, back = jax.jit(lambda *x: jax.vjp(attend, *x))(q, k, v)
  program = jax.jit(lambda back, do: back(do)).lower(back, do).compile()
  return lambda: program(back, do)


def of_jax(attend, case: Timed) -> tuple[Call, Call]:
  return forward(attend, case), backward(attend, case)


def ours(case: Timed):
  mask = Causal() if case.causal else Everything()
  return of_jax(
    functools.partial(flash.attention, mask=mask, implementation='gpu'), case
  )


def cudnn(case: Timed):
  return of_jax(
    functools.partial(
      jax.nn.dot_product_attention,
      is_causal=case.causal,
      implementation='cudnn',
    ),
    case,
  )


def mgpu(case: Timed) -> tuple[Call, Call | None]:
  """With the faster of two tiles. It has no bfloat16, and backward no mask."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  sides = 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq'
  attend = lambda block: functools.partial(
    attention_mgpu.attention,
    config=attention_mgpu.TuningConfig(
      block_q=64,
      block_kv=block,
      max_concurrent_steps=2,
      causal=case.causal,
      **dict.fromkeys(sides, 64),
    ),
  )
  found, said = [], ''
  for block in (128, 64):
    try:
      found.append(forward(attend(block), case, 'float16'))
    except Exception as error:  # what does not fit is not a candidate
      said = str(error)
  if not found:
    raise RuntimeError(said)
  best = min(found, key=seconds)
  return best, None if case.causal else backward(attend(64), case, 'float16')


def of_torch(case: Timed):
  import torch
  from torch.nn.functional import scaled_dot_product_attention as attend

  make = lambda: torch.randn(
    *(case.shape[0], case.shape[2], case.shape[1], case.d),
    device='cuda',
    dtype=torch.bfloat16,
    requires_grad=True,
  )
  q, k, v = make(), make(), make()
  do = make().detach()
  o = attend(q, k, v, is_causal=case.causal)

  def forward():
    with torch.no_grad():
      return attend(q, k, v, is_causal=case.causal)

  return forward, lambda: torch.autograd.grad(
    o, (q, k, v), do, retain_graph=True
  )


RIVALS = {
  'ours': ours,
  'cuDNN': cudnn,
  'attention_mgpu': mgpu,
  'torch SDPA': of_torch,
}


def wait(result) -> None:
  if hasattr(jax.tree.leaves(result)[0], 'is_cuda'):
    import torch

    torch.cuda.synchronize()
  else:
    jax.block_until_ready(result)


def seconds(call: Call, least: float = 0.02) -> float:
  """Of one call, of as many in a row as take `least` seconds together."""
  wait(call())
  count = 1
  while True:
    began = time.perf_counter()
    for _ in range(count):
      result = call()
    wait(result)
    took = time.perf_counter() - began
    if took > least:
      return took / count
    count = max(2 * count, int(1.2 * count * least / max(took, 1e-6)))


def measured(case: Timed, turns: int) -> tuple[dict, dict[str, str]]:
  """(rival, backward) -> seconds of each turn; and why rivals are missing."""
  calls: dict[tuple[str, bool], Call] = {}
  missing = {}
  for name, make in RIVALS.items():
    try:
      pair = make(case)
      for call in filter(None, pair):
        wait(call())
    except Exception as error:  # not installed, or not for this case
      missing[name] = f'{type(error).__name__}: {error}'.partition('\n')[0][
        :200
      ]
    else:
      both = zip((False, True), pair)
      calls |= {(name, back): call for back, call in both if call}
  took = {which: [] for which in calls}
  for _ in range(turns):
    for which, call in calls.items():
      took[which].append(seconds(call))
  return took, missing


def compared(cases, turns: int) -> tuple[str, dict[str, str]]:
  """A table of rates and of ratios within a turn, and who is missing where."""
  rows, missing = [], {}
  for case in cases:
    took, absent = measured(case, turns)
    for name, why in absent.items():
      missing.setdefault(name, f'{case}: {why}')
    for backward in (False, True):
      own = took.get(('ours', backward))
      line = []
      for name in RIVALS:
        if other := took.get((name, backward)):
          rate = case.flops(backward) / statistics.median(other) / 1e12
          line.append(f'{rate:.0f}')
        else:
          line.append('-')
      for name in list(RIVALS)[1:]:
        other = took.get((name, backward))
        both = own and other
        ratio = [b / a for a, b in zip(own, other)] if both else []
        line.append(f'{statistics.median(ratio):.2f}' if both else '-')
      what = 'causal' if case.causal else 'all pairs'
      which = 'backward' if backward else 'forward'
      rows.append([what, which, str(case.d), f'{case.t:,}', *line])
      say(' | '.join(rows[-1]))
  head = ['pairs', 'pass', 'd', 'tokens', *RIVALS]
  head += [f'ours over {name}' for name in list(RIVALS)[1:]]
  return markdown(head, rows), missing


def page(args: argparse.Namespace) -> list[str]:
  """The page: a title, and paragraphs."""
  device = jax.devices()[0]
  if device.platform != 'gpu' or not gpu.HOPPER.search(device.device_kind):
    raise SystemExit(
      '--gpu needs a Hopper GPU, as an H100 or H200; JAX sees'
      f' {device.device_kind!r}. Nothing was run. (What can be proved without'
      ' one is: tests/test_flash_gpu.py.)'
    )
  say('cell | o | lse | dq | dk | dv | of operands | verdict')
  right, wrong = cells.checked(cells.CELLS)
  cases = [
    *(Timed(t, 128, True) for t in LENGTHS),
    *(Timed(t, 128, False) for t in LENGTHS[::2]),
    *(Timed(t, d, True) for d in (64, 256) for t in LENGTHS[3::2]),
  ]
  fast, missing = compared(cases, args.turns or 5)
  absent = [f'Missing: {name}, at {why}' for name, why in missing.items()]
  verdict = (
    f'**Wrong or not run: {", ".join(wrong)}.**' if wrong else 'All right.'
  )
  return [
    '# Attention on a Hopper GPU',
    f'**Is it right?** {cells.about()} {verdict}',
    right,
    '**How fast is it?** TFLOP/s, of two matrix products forward and five '
    f'backward, causal counted as half; {ROWS:,} tokens or one row, heads '
    f'times d = {WIDE:,}, bfloat16, random numbers. Backward does not include '
    'forward. Contenders take turns: a rate is that of the median turn, "ours '
    'over" the median of the ratios of rates within a turn (above 1: ours is '
    'faster). `attention_mgpu` has the faster of two tiles, and was given '
    'float16, for it has no bfloat16; backward it has no causal mask.',
    fast,
    *absent,
  ]
