"""Tables of an ablation: scores beside what they cost.

FLOPs are of a forward pass, per token; state bytes are what one sequence keeps
for decoding after its last token.
"""

import math
from collections.abc import Sequence

from jaxattn.analysis.summary import Row

COLUMNS = (
  'accuracy',
  'bits per byte',
  'parameters',
  'FLOPs per token',
  'state bytes',
  'steps/s',
)


def cells(row: Row) -> dict[str, str]:
  """What the table says of a row: column -> text."""
  if not row.records:
    return dict.fromkeys(COLUMNS, 'failed')
  score = {name: row.metric(name) for name in ('accuracy', 'bits_per_byte')}
  text = {name: '-' if s is None else s.text() for name, s in score.items()}
  flops = row.mean('flops') / row.about['length']
  speed = row.mean('steps_per_second')
  return {
    'accuracy': text['accuracy'],
    'bits per byte': text['bits_per_byte'],
    'parameters': f'{row.mean("parameters"):,.0f}',
    'FLOPs per token': f'{flops:,.0f}',
    'state bytes': f'{row.mean("state_bytes"):,.0f}',
    'steps/s': '-' if math.isnan(speed) else f'{speed:.1f}',
  }


def scores(rows: Sequence[Row]) -> str:
  """The rows of one task as a Markdown table."""
  head = ('mechanism', *COLUMNS)
  body = [(f'`{row.mechanism}`', *cells(row).values()) for row in rows]
  return markdown(head, body)


def rates(rows: Sequence[Row]) -> str:
  """The headline at every learning rate, in Markdown; '' if there was one."""
  if all(len(row.grid) == 1 for row in rows):
    return ''
  tried = sorted({rate for row in rows for rate in row.grid})
  body = []
  for row in rows:
    text = {rate: score.text() for rate, score in row.grid.items()}
    text[row.rate] = f'**{text[row.rate]}**'
    body.append([f'`{row.mechanism}`', *(text.get(r, '-') for r in tried)])
  head = ['learning rate', *(f'{rate:g}' for rate in tried)]
  return 'All learning rates, the best in bold:\n\n' + markdown(head, body)


def positions(rows: Sequence[Row]) -> str:
  """Bits per byte by place in the context, in Markdown; '' if none are there.

  They fall from left to right as far as a mechanism uses a longer context.
  """
  prefix = 'bits_per_byte@'
  done = [row for row in rows if row.records]
  names = [
    name
    for name in (done[0].records[0]['metrics'] if done else ())
    if name.startswith(prefix)
  ]
  if not names:
    return ''
  names.sort(key=lambda name: int(name.removeprefix(prefix).split('-')[0]))
  body = [
    [f'`{row.mechanism}`', *(row.metric(name).text() for name in names)]
    for row in done
  ]
  head = ['position', *(name.removeprefix(prefix) for name in names)]
  said = 'Bits per byte by position in the sequence (does context help?):'
  return f'{said}\n\n{markdown(head, body)}'


def spread(rows: Sequence[Row]) -> str:
  """How far apart the parameter counts of one task lie."""
  counts = [row.mean('parameters') for row in rows if row.records]
  if not counts:
    return 'no run finished'
  off = max(counts) / min(counts) - 1
  return f'{min(counts):,.0f} to {max(counts):,.0f} parameters, {off:.2%} apart'


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
  """A Markdown table; the first column is text, the others are numbers."""
  lines = [head, ['---'] + ['---:'] * (len(head) - 1), *body]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
