"""How evenly a ring's work is spread: tiles that are computed, counted.

Each device computes, hop by hop, those tiles of its queries and of the keys
that it holds in which a causal mask leaves anything. A hop ends when the last
device has, for then all pass their keys on. So a ring takes the sum over hops
of the most that any device computes, and at best the sum of the means.
"""

import argparse
from pathlib import Path

import numpy as np

from jaxattn.analysis import style
from jaxattn.analysis.table import markdown
from jaxattn.parallel import stripe
from pallas_kernels.masks import Causal

LENGTHS = (2**14, 2**16, 2**18, 2**20)
DEVICES = (4, 8, 16, 32, 64)
TILE = 512
SHOWN = (2**18, 16)  # of which the figure shows every hop


def page(args: argparse.Namespace) -> list[str]:
  """The page: a title, and paragraphs. Draws balance.png beside it."""
  rows, speed = [], {}
  for length in LENGTHS:
    for n in DEVICES:
      counts = {
        layout: stripe.work(Causal(), length, n, layout, TILE)
        for layout in stripe.LAYOUTS
      }
      took = {layout: x.max(0).sum() for layout, x in counts.items()}
      plain = took['contiguous']
      most = plain / counts['contiguous'].mean(0).sum()
      for layout, x in counts.items():
        speed[length, n, layout] = plain / took[layout]
        rows.append(
          [
            *(f'{length:,}', str(n), layout, f'{x.sum():,}'),
            f'{(x.max(0) / x.mean(0)).max():.3f}',
            f'{plain / took[layout]:.3f}',
            f'{most:.3f}',
            f'{plain / took[layout] / most:.3f}',
          ]
        )
  draw(args.out / 'balance.png', speed)
  head = [
    *('tokens', 'devices', 'layout', 'tiles', 'max / mean, worst hop'),
    *('speed-up over contiguous', 'at most', 'share of it'),
  ]
  return [
    "# Balance of a ring's work",
    f'Causal attention, tiles of {TILE} queries and keys, or as many as a'
    ' device has: counted by `jaxattn.parallel.stripe.work`, which asks the'
    ' masks what kernels ask them. Nothing is run. A hop takes as long as the'
    ' device with the most tiles; "at most" is the speed-up of a ring in which'
    ' all devices had the same number of those tiles that the contiguous layout'
    ' computes.',
    'A striped tile is never seen wholly and always computed, so there are'
    ' more of them. In a zigzag tiles are seen wholly or not at all, but for'
    ' those on the diagonal: the shorter the sequence, the more that is worth.'
    ' It is what is chosen where nothing forbids it.',
    '![Speed-up over the contiguous layout by length, and tiles of each device'
    ' in each hop](balance.png)',
    markdown(head, rows),
  ]


def draw(path: Path, speed: dict[tuple[int, int, str], float]) -> None:
  """Speed-ups by length, and all hops of one case."""
  from matplotlib.figure import Figure

  length, n = SHOWN
  figure = Figure(figsize=(11, 7.2), layout='constrained', dpi=150)
  upper, lower = figure.subfigures(2, 1, height_ratios=(1.1, 1))
  looks = style.looks(str(n) for n in DEVICES)
  for ax, layout in zip(upper.subplots(1, 2, sharey=True), stripe.LAYOUTS[1:]):
    for count in DEVICES:
      y = [speed[x, count, layout] for x in LENGTHS]
      look = looks[str(count)]._asdict()
      ax.plot(LENGTHS, y, label=f'{count} devices', **look)
    ax.set_xscale('log', base=2)
    ax.set_xticks(LENGTHS, [f'{x // 1024}k' for x in LENGTHS])
    ax.set_title(f'{layout}: speed-up over contiguous', loc='left')
    ax.set_xlabel('tokens')
    ax.axhline(1, color=style.GREY, linewidth=1)
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(color='#e6e6e6', linewidth=0.8)
  ax.legend(fontsize=9, loc='lower right')
  counts = [
    stripe.work(Causal(), length, n, layout, TILE) for layout in stripe.LAYOUTS
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
