"""All figures of an ablation."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxattn.analysis import bits_per_byte, curves, recall_state, style
from jaxattn.analysis.summary import Row


def draw(
  folder: Path,
  rows: Sequence[Row],
  references: Mapping[str, Mapping[str, float]],
) -> dict[str, list[str]]:
  """Makes the figures; task -> names of its PNG files.

  Sections with the same data (other models on it) share the recall figure,
  which stands with the first of them.
  """
  looks = style.looks(row.mechanism for row in rows)
  workdirs = {
    r['folder']: folder / 'cells' / r['folder']
    for row in rows
    for r in row.records
  }
  figures: dict[str, list[str]] = {}
  shared: dict[str, list[Row]] = {}
  for row in rows:
    if row.records:
      data = dict(row.records[0]['config']['task'], seed=None)
      shared.setdefault(json.dumps(data, sort_keys=True), []).append(row)
  for same in shared.values():
    task = same[0].task
    path = folder / f'recall-{task}.png'
    title = f'{task}: recall against decoding state'
    if recall_state.figure(same, path, title, looks):
      figures.setdefault(task, []).append(path.name)
  for task in dict.fromkeys(row.task for row in rows):
    own = [row for row in rows if row.task == task]
    path = folder / f'bits-per-byte-{task}.png'
    title = (
      f'{task}: bits per byte, beside simple models (grey) on the same bytes'
    )
    bars = bits_per_byte.figure(
      own, references.get(task, {}), path, title, looks
    )
    loss = folder / f'loss-{task}.png'
    title = f'{task}: training loss'
    lines = curves.figure(own, workdirs, loss, title, looks)
    made = [figure.name for figure in (bars, lines) if figure]
    figures.setdefault(task, []).extend(made)
  return figures
