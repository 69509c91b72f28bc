"""The house figure: recall against the bytes of decoding state.

How much of what it has read can a mechanism still answer, and what does it
carry along for that? After Arora et al., "Simple linear attention language
models balance the recall-throughput tradeoff", 2024,
https://arxiv.org/abs/2402.18668, figure 2.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from jaxattn.analysis import style
from jaxattn.analysis.summary import Row


def figure(
  rows: Iterable[Row],
  path: Path,
  title: str = '',
  looks: Mapping[str, style.Look] | None = None,
) -> Path | None:
  """Draws accuracy against state bytes, one marker a mechanism, as a PNG.

  Several rows of one mechanism (other widths, as sections of their own) are
  joined by a line. Rows that do not measure accuracy are left out. `looks`
  keeps colours equal over several figures.

  Returns:
    `path`, or None if no row was left.
  """
  rows = [
    r for r in rows if r.headline == 'accuracy' and not math.isnan(r.score.mean)
  ]
  if not rows:
    return None
  drawing, ax = style.axes(
    title or 'Recall against decoding state',
    'decoding state of one sequence (bytes)',
    'share of questions answered right',
  )
  looks = looks or style.looks(row.mechanism for row in rows)
  for name in dict.fromkeys(row.mechanism for row in rows):
    own = sorted(
      (row for row in rows if row.mechanism == name),
      key=lambda row: row.mean('state_bytes'),
    )
    look = looks[name]._asdict()
    if len(own) == 1:
      look['linestyle'] = 'none'  # in the legend, too
    spread = [row.score.spread or 0 for row in own]
    ax.errorbar(
      [row.mean('state_bytes') for row in own],
      [row.score.mean for row in own],
      yerr=spread if any(spread) else None,
      **look,
      markersize=11,
      markeredgecolor='white',
      linewidth=1.5,
      capsize=3,
      label=style.words(name),
      clip_on=False,
      zorder=3,
    )
  ax.set_ylim(0, 1.02)
  style.levels(ax, rows[0].about['levels'])
  _bytes_axis(ax, [row.mean('state_bytes') for row in rows])
  # Below the axes no label can meet a marker or a line.
  drawing.legend(
    loc='outside lower center', ncols=3, frameon=False, fontsize=10
  )
  return style.write(drawing, path)


def _bytes_axis(ax, values: list[float]) -> None:
  """Powers of two from below the least to above the most, as 512 B, 4 KiB."""
  low = math.floor(math.log2(min(values)) - 0.3)
  high = math.ceil(math.log2(max(values)) + 0.3)
  every = max(1, math.ceil((high - low) / 8))
  ax.set_xscale('log', base=2)
  ax.set_xlim(2**low, 2**high)
  ax.xaxis.set_major_locator(
    FixedLocator([2**i for i in range(low, high + 1, every)])
  )
  ax.xaxis.set_minor_locator(NullLocator())
  ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: in_bytes(v)))


def in_bytes(value: float) -> str:
  """512 B, 4 KiB, 1.5 MiB."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if value < 1024 or unit == 'GiB':
      break
    value /= 1024
  return f'{value:.3g} {unit}'
