"""How figures look: the same mechanism has one colour and marker everywhere.

Figures are made without pyplot, so that nothing needs a display and nothing
stays open.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for the colour-blind, without their
# yellow, which is too pale for a line on white.
COLOURS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#56B4E9',
  '#E69F00',
  '#000000',
)
MARKERS = 'osD^vPX*'  # eight: it takes 56 mechanisms to use a pair twice
DASHES = ('-', '--', '-.', ':')
GREY = '#666666'


class Look(NamedTuple):
  """How one mechanism is drawn."""

  color: str
  marker: str
  linestyle: str


def looks(names: Iterable[str]) -> dict[str, Look]:
  """A look for each name, in order; equal names share one."""
  return {
    name: Look(
      COLOURS[i % len(COLOURS)],
      MARKERS[i % len(MARKERS)],
      DASHES[i % len(DASHES)],
    )
    for i, name in enumerate(dict.fromkeys(names))
  }


def axes(
  title: str, x: str, y: str, height: float = 4.4
) -> tuple[Figure, Axes]:
  """A figure with one set of axes, in the house style."""
  figure = Figure(figsize=(8, height), layout='constrained', dpi=150)
  ax = figure.add_subplot()
  ax.set_title(title, fontsize=13, loc='left', pad=12)
  ax.set_xlabel(x, fontsize=11)
  ax.set_ylabel(y, fontsize=11)
  ax.tick_params(labelsize=10)
  ax.spines[['top', 'right']].set_visible(False)
  ax.grid(color='#e6e6e6', linewidth=0.8)
  ax.set_axisbelow(True)
  return figure, ax


def levels(ax: Axes, values: Mapping[str, float], apart: float = 0.1) -> None:
  """Dashed lines across, labelled on the right, outside of the axes.

  Call it when the limits of y stand. Labels keep `apart`, a share of the axes'
  height, between them, so lines that lie close have labels above one another.
  """
  low, high = ax.get_ylim()
  place = -1.0
  for name, value in sorted(values.items(), key=lambda item: item[1]):
    ax.axhline(value, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
    place = max(place + apart, (value - low) / (high - low))
    ax.annotate(
      f'{name}\n{value:.3g}',
      (1.01, place),
      xycoords='axes fraction',
      va='center',
      fontsize=9,
      color=GREY,
    )


def words(name: str) -> str:
  """A mechanism's or metric's name as it is read in a figure."""
  return name.replace('_', ' ')


def write(figure: Figure, path: Path) -> Path:
  figure.savefig(path, facecolor='white')
  return path
