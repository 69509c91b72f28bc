"""How evenly a ring's work is spread: tiles that are computed, counted.

Each device computes, hop by hop, those tiles of its queries and of the keys
that it holds in which a causal mask leaves anything. A hop ends when the last
device has, for then all pass their keys on. So a ring takes the sum over hops
of the most that any device computes, and at best the sum of the means.
"""

import argparse
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxattn.analysis import style
from jaxattn.analysis.table import markdown
from jaxattn.parallel import stripe
from pallas_kernels import blocks, tiles
from pallas_kernels.masks import Causal

LENGTHS = (2**14, 2**16, 2**18, 2**20)
DEVICES = (4, 8, 16, 32, 64)
SHOWN = (2**18, 16)  # of which the figure shows every hop
DRAWN = 'tpu, forward'  # of whose tiles the figure is


def _tpu(direction: str, t: int) -> tuple[int, int]:
  tile = blocks.tile(blocks.Blocks(), direction, t, t)
  return tile.q, tile.k


def _tile(direction: str, t: int) -> str:
  return ' x '.join(map(str, _tpu(direction, t)))


# Tiles of queries and keys that kernels choose, for so many tokens a device.
KERNELS = {
  'xla': lambda t: (tiles.chosen(t, t),) * 2,
  'tpu, forward': functools.partial(_tpu, 'forward'),
  'tpu, backward': functools.partial(_tpu, 'backward'),
}


def page(args: argparse.Namespace) -> list[str]:
  """The page: a title, and paragraphs. Draws balance.png beside it."""
  found = {
    (name, length, n): compared(length, n, tile)
    for name, tile in KERNELS.items()
    for length, n in itertools.product(LENGTHS, DEVICES)
  }
  rows = []
  for length, n, layout in itertools.product(LENGTHS, DEVICES, stripe.LAYOUTS):
    numbers = [found[name, length, n][layout] for name in KERNELS]
    rows.append(
      [f'{length:,}', str(n), layout]
      + [f'{x:.3f}' for one in numbers for x in one]
    )
  draw(args.out / 'balance.png', found)
  head = ['tokens', 'devices', 'layout'] + [
    f'{name}: {what}'
    for name in KERNELS
    for what in ('max / mean', 'speed-up', 'share')
  ]
  longest = LENGTHS[-1]
  least = {
    layout: min(
      found[name, longest, n][layout].share for name in KERNELS for n in DEVICES
    )
    for layout in stripe.LAYOUTS
  }
  return [
    "# Balance of a ring's work",
    'Causal attention in tiles of queries and keys as kernels choose them for'
    ' what a device has, in bfloat16, at most 128 wide and without a bias: with'
    ' many tokens 512 x 512 (`xla`, of at most four heads in all rows; of more'
    " it takes smaller ones), and of the TPU's"
    f' {_tile("forward", longest)} forward and {_tile("backward", longest)}'
    ' backward; with few, smaller ones. Counted by'
    ' `jaxattn.parallel.stripe.work`, which asks the masks what kernels ask'
    ' them. Nothing is run. A hop takes as long as the device with the most'
    ' tiles: max / mean is that of the worst hop. Speed-ups are over the'
    ' contiguous layout; a share is of the speed-up that a ring would have in'
    ' which all devices had the same number of those tiles that the contiguous'
    ' layout computes.',
    'A striped tile is never seen wholly and always computed, so there are'
    ' more of them, the more the larger a tile is. In a zigzag tiles are seen'
    ' wholly or not at all, but for those on the diagonal: the shorter the'
    ' sequence, the more that is worth. It is what is chosen where nothing'
    f' forbids it. At {longest:,} tokens its share is at least'
    f' {least["zigzag"]:.3f} everywhere in this table, that of stripes'
    f' {least["striped"]:.3f}. Where a device has one tile, layouts make no'
    ' difference.',
    '![Speed-up over the contiguous layout by length, and tiles of each device'
    ' in each hop](balance.png)',
    markdown(head, rows),
  ]


class Compared(NamedTuple):
  """A layout, compared with the contiguous one."""

  even: float  # the most tiles of a device over the mean, in the worst hop
  speed: float
  share: float


def compared(length: int, n: int, tile) -> dict[str, Compared]:
  """By layout."""
  counts = {
    layout: stripe.work(Causal(), length, n, layout, tile(length // n))
    for layout in stripe.LAYOUTS
  }
  plain = counts['contiguous'].max(0).sum()
  most = plain / counts['contiguous'].mean(0).sum()
  return {
    layout: Compared(
      (x.max(0) / x.mean(0)).max(),
      plain / x.max(0).sum(),
      plain / x.max(0).sum() / most,
    )
    for layout, x in counts.items()
  }


def draw(
  path: Path, found: dict[tuple[str, int, int], dict[str, Compared]]
) -> None:
  """Speed-ups by length, and all hops of one case."""
  from matplotlib.figure import Figure

  length, n = SHOWN
  figure = Figure(figsize=(11, 7.2), layout='constrained', dpi=150)
  upper, lower = figure.subfigures(2, 1, height_ratios=(1.1, 1))
  looks = style.looks(str(n) for n in DEVICES)
  for ax, layout in zip(upper.subplots(1, 2, sharey=True), stripe.LAYOUTS[1:]):
    for count in DEVICES:
      y = [found[DRAWN, x, count][layout].speed for x in LENGTHS]
      look = looks[str(count)]._asdict()
      ax.plot(LENGTHS, y, label=f'{count} devices', **look)
    ax.set_xscale('log', base=2)
    ax.set_xticks(LENGTHS, [f'{x // 1024}k' for x in LENGTHS])
    ax.set_title(f'{layout}: speed-up over contiguous ({DRAWN})', loc='left')
    ax.set_xlabel('tokens')
    ax.axhline(1, color=style.GREY, linewidth=1)
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(color='#e6e6e6', linewidth=0.8)
  ax.legend(fontsize=9, loc='lower right')
  counts = [
    stripe.work(Causal(), length, n, layout, KERNELS[DRAWN](length // n))
    for layout in stripe.LAYOUTS
  ]
  most = max(x.max() for x in counts)
  panels = lower.subplots(1, 3, sharey=True)
  for ax, layout, x in zip(panels, stripe.LAYOUTS, counts):
    image = ax.imshow(x, vmin=0, vmax=most, cmap='viridis', aspect='auto')
    ax.set_title(f'{layout}: {x.max(0).sum():,} tiles long', loc='left')
    ax.set_xlabel('hop')
    ax.set_xticks(np.arange(0, n, 5))
  panels[0].set_ylabel('device')
  bar = lower.colorbar(image, ax=panels, shrink=0.9)
  bar.set_label(f'tiles ({length // 1024}k tokens, {n} devices)')
  style.write(figure, path)
