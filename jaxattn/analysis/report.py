"""report.md: what an ablation found, and how it was made.

Everything a reader needs to judge the numbers stands beside them: the command,
versions, device, date, seeds and learning rates, what chance scores and what
simple models score on the same data.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxattn.analysis import figures, style, table
from jaxattn.analysis.summary import Row, summarise

CAVEAT = (
  'A single run can mislead, above all for recurrent mechanisms: read this as '
  'a first look, not as a finding.'
)


def write(
  folder: Path,
  records: Sequence[Mapping[str, Any]],
  references: Mapping[str, Mapping[str, float]],
  command: str,
) -> Path:
  """Writes report.md and its figures beside results.jsonl.

  Args:
    folder: of the ablation; the run of a record lies in
      `cells/<record['folder']>`.
    records: all cells, also those that failed; see `summary`.
    references: task -> reference model -> bits per byte.
    command: what made all this.

  Returns:
    The path of report.md.
  """
  rows = summarise(records)
  tasks = list(dict.fromkeys(row.task for row in rows))
  done = [record for record in records if not record.get('error')]
  drawn = figures.draw(folder, rows, references)
  parts = [f'# Ablation: {folder.name}', _made(records, command)]
  for task in tasks:
    own = [row for row in rows if row.task == task]
    parts += [f'## {task}', _setting(own), table.scores(own)]
    parts += _levels(own, references.get(task, {}))
    parts += [table.positions(own), table.rates(own)]
    parts += [f'![{Path(name).stem}]({name})' for name in drawn.get(task, ())]
  if len(done) < len(records):
    parts += ['## Failed', _failures(records)]
  if any(record.get('notes') for record in done):
    parts += ['## Notes', _notes(done)]
  parts += ['## Raw data', _raw(bool(references))]
  path = folder / 'report.md'
  path.write_text('\n\n'.join(filter(None, parts)) + '\n', encoding='utf-8')
  return path


def caveat(records: Sequence[Mapping[str, Any]]) -> str:
  """Which seeds and rates were run, and what that means for the reader."""
  seeds = sorted({record['seed'] for record in records})
  rates: dict[str, list[float]] = {}
  for record in records:
    rates.setdefault(record['task'], []).append(record['rate'])
  grid = '; '.join(
    f'{task} {", ".join(f"{rate:g}" for rate in sorted(set(own)))}'
    for task, own in rates.items()
  )
  most = max(len(set(own)) for own in rates.values())
  said = (
    f'{_count(len(seeds), "seed")} ({", ".join(map(str, seeds))}) and '
    f'{_count(most, "learning rate")} ({grid}) for each mechanism.'
  )
  said = said[0].upper() + said[1:]
  if len(seeds) < 3 or most == 1:
    return f'{said} {CAVEAT}'
  return f'{said} Scores are mean ± standard deviation at the best rate.'


def _count(number: int, thing: str) -> str:
  return f'one {thing}' if number == 1 else f'{number} {thing}s'


def _made(records, command: str) -> str:
  done = [record for record in records if not record.get('error')]
  lines = [f'Made by `{command}`.', '']
  if done:
    versions = sorted(
      {
        ', '.join(f'{k} {v}' for k, v in record['versions'].items())
        for record in done
      }
    )
    dates = sorted({record['date'][:10] for record in done})
    devices = sorted({record['device'] for record in done})
    lines += [
      f'- Versions: {"; ".join(versions)}',
      f'- Device: {"; ".join(devices)}',
      f'- Date: {" to ".join(dict.fromkeys((dates[0], dates[-1])))}',
      f'- Time: {sum(r["seconds"] for r in done) / 60:.1f} minutes in the runs',
    ]
  return '\n'.join([*lines, '', f'**{caveat(records)}**'])


def _setting(rows: Sequence[Row]) -> str:
  done = [row for row in rows if row.records]
  if not done:
    return 'No run finished.'
  config, about = done[0].records[0]['config'], done[0].about
  optimizer = config['optimizer']
  lines = [
    f'- Task: {_fields(config["task"])}; {about["length"]} tokens a sequence, '
    f'{_inputs(about)}; tested on {about["tested_rows"]} of '
    f'{about["test_rows"]} sequences.',
    f'- Training: {config["steps"]} steps of {config["batch"]} sequences, '
    f'{optimizer["name"]} with {optimizer["schedule"]["name"]}.',
    f'- Model: width {config["model"]["width"]}, {config["model"]["depth"]} '
    f'layers; {table.spread(rows)} (`hidden`, the width of the feed-forward, '
    'takes up the difference).',
  ]
  for row in done:
    model = row.records[0]['config']['model']
    own = {'hidden': model['hidden']} | model['mechanisms']
    lines.append(f'  - `{row.mechanism}`: {_fields(own)}')
  lines.append(
    '- FLOPs are of a forward pass, per token; state bytes are what one '
    'sequence keeps for decoding after its last token.'
  )
  return '\n'.join(lines)


def _inputs(about: Mapping[str, Any]) -> str:
  """What a token is."""
  if 'vocab' in about:
    return f'vocabulary {about["vocab"]}'
  return f'{about["features"]} numbers each'


def _fields(section: Mapping[str, Any]) -> str:
  """'heads 2, window 16': a section in words, inner sections opened."""
  parts = [
    _fields(value) if isinstance(value, Mapping) else f'{name} {value}'
    for name, value in section.items()
  ]
  return ', '.join(part for part in parts if part)


def _levels(rows: Sequence[Row], references: Mapping[str, float]) -> list[str]:
  run = next((row.records[0] for row in rows if row.records), None)
  if run is None:
    return []
  levels = references or run['about']['levels']
  metric = style.words(run['about']['headline'])
  said = ', '.join(f'{name} {value:.3f}' for name, value in levels.items())
  said = f'For comparison, {metric}: {said}.'
  if 'chance within a row' in levels:
    said += ' Chance within a row is that of guessing among its own values.'
  if metric == 'accuracy':
    about = run['about']
    count = about['tested_rows'] * about['asked']
    said += (
      f' Over {count:,} questions the standard error of an accuracy is at most '
      f'{0.5 / math.sqrt(count):.3f}.'
    )
  return [said]


def _failures(records) -> str:
  return '\n'.join(
    f'- `{record["task"]}/{record["mechanism"]}`, rate {record["rate"]:g}, '
    f'seed {record["seed"]}: {record["error"]}'
    for record in records
    if record.get('error')
  )


def _notes(records) -> str:
  """What the trainer says that a reader should know, such as a bad start."""
  return '\n'.join(
    f'- `{record["task"]}/{record["mechanism"]}`: {note}'
    for record in records
    for note in record.get('notes', ())
  )


def _raw(references: bool) -> str:
  lines = [
    '- `results.jsonl`: one line a run with its config, metrics, parameters, '
    'FLOPs, state bytes, seed, rate, versions, device and date.',
    '- `cells/<folder>/metrics.jsonl`: the log of each run; `config.json` '
    'beside it is what `jaxattn.train.loop.fit` took.',
  ]
  if references:
    lines.append('- `references.json`: bits per byte of the simple models.')
  return '\n'.join(lines)
