"""Bits per byte beside what simple models reach on the same bytes."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxattn.analysis import style
from jaxattn.analysis.summary import Row

METRIC = 'bits_per_byte'


def figure(
  rows: Iterable[Row],
  references: Mapping[str, float],
  path: Path,
  title: str = '',
  looks: Mapping[str, style.Look] | None = None,
) -> Path | None:
  """Draws one bar a mechanism and a grey one a reference, as a PNG.

  Args:
    rows: of one task; those without bits per byte are left out.
    references: name -> bits per byte, as `jaxattn.tasks.ngram` makes them.
    path: of the PNG.
    title: of the figure.
    looks: to keep colours equal over several figures.

  Returns:
    `path`, or None if no row was left.
  """
  scores = {row.mechanism: row.metric(METRIC) for row in rows}
  scores = {name: score for name, score in scores.items() if score}
  if not scores:
    return None
  looks = looks or style.looks(scores)
  bars = [
    (score.mean, score.spread, style.words(name), looks[name].color)
    for name, score in scores.items()
  ]
  bars += [(value, None, name, '#b3b3b3') for name, value in references.items()]
  bars.sort(key=lambda bar: bar[0])

  drawing, ax = style.axes(
    title or 'Next byte',
    'bits per byte on held-out text (lower is better)',
    '',
    height=1.6 + 0.42 * len(bars),
  )
  for place, (value, spread, _, color) in enumerate(bars):
    ax.barh(place, value, xerr=spread, color=color, height=0.7, capsize=3)
    ax.annotate(
      f'{value:.2f}' + (f' ± {spread:.2f}' if spread is not None else ''),
      (value + (spread or 0), place),
      xytext=(5, 0),
      textcoords='offset points',
      va='center',
      fontsize=10,
    )
  ax.set_yticks(range(len(bars)), [name for _, _, name, _ in bars])
  ax.tick_params(axis='y', length=0)
  ax.spines['left'].set_visible(False)
  ax.grid(visible=False, axis='y')
  ax.invert_yaxis()  # the best on top
  ax.set_xlim(0, 1.1 * max(value for value, *_ in bars))
  return style.write(drawing, path)
