"""Loss curves: training loss against the step, one line a mechanism."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxattn.analysis import style
from jaxattn.analysis.summary import Row

WIDE = 20  # times from the least to the largest loss: then the axis is a log


def read(metrics: Path, kind: str = 'train') -> tuple[list[int], list[float]]:
  """Steps and losses out of a run's metrics.jsonl.

  A killed run may have logged a step twice, before and after it was resumed:
  the later one counts. A last line that it did not finish is passed over, and
  so is a loss that was not finite.
  """
  losses = {}
  for line in metrics.read_text(encoding='utf-8').split('\n')[:-1]:
    entry = json.loads(line)
    if entry['kind'] == kind and entry['loss'] is not None:
      losses[entry['step']] = entry['loss']
  steps = sorted(losses)
  return steps, [losses[step] for step in steps]


def figure(
  rows: Iterable[Row],
  workdirs: Mapping[str, Path],
  path: Path,
  title: str = '',
  looks: Mapping[str, style.Look] | None = None,
) -> Path | None:
  """Draws the loss of every seed at each row's best rate, as a PNG.

  Args:
    rows: of one task.
    workdirs: a record's 'folder' -> where its metrics.jsonl lies.
    path: of the PNG.
    title: of the figure.
    looks: to keep colours equal over several figures.

  Returns:
    `path`, or None if there was nothing to draw.
  """
  rows = [row for row in rows if row.records]
  if not rows:
    return None
  drawing, ax = style.axes(
    title or 'Training loss', 'step', 'training loss (nats per target)'
  )
  seen = []
  looks = looks or style.looks(row.mechanism for row in rows)
  for name in dict.fromkeys(row.mechanism for row in rows):
    runs = [r for row in rows if row.mechanism == name for r in row.records]
    for i, run in enumerate(runs):
      steps, losses = read(workdirs[run['folder']] / 'metrics.jsonl')
      seen += losses
      ax.plot(
        steps,
        losses,
        color=looks[name].color,
        linestyle=looks[name].linestyle,
        linewidth=1.8 if len(runs) == 1 else 1,
        label=None if i else style.words(name),
      )
  if seen and min(seen) > 0 and max(seen) / min(seen) > WIDE:
    ax.set_yscale('log')
    ax.yaxis.set_major_formatter('{x:g}')
  ax.margins(x=0)
  ax.set_xlim(left=0)
  drawing.legend(
    loc='outside lower center', ncols=3, frameon=False, fontsize=10
  )
  return style.write(drawing, path)
