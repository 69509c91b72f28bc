"""The capability table as pages, in Markdown and in HTML, of its fragments."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxattn.analysis.capabilities import (
  DTYPE,
  LENGTHS,
  WIDTH,
  Fragment,
  declined,
  told,
)
from jaxattn.spec import LAWS

MEANING = {
  'reference': "values and gradients are those of the paper's formula: against "
  'float64, at most twice the error of the formula in float32',
  'causality': 'the gradient of an output by a later input is exactly zero',
  'segmentation': 'a stream cut anywhere, and handed on by its state, is the '
  'same stream, gradients included',
  'padding': 'pads are invisible wherever they stand, even if they hold NaN',
  'packing': 'documents that share a row do not see each other',
  'batch': 'rows do not see each other',
  'layout': 'tokens may lie in any order, if their packing lies in the same',
  'bfloat16': 'in bfloat16 at most twice the error of the formula in bfloat16',
  'lengths': 'every length works, from none on, and gives what the beginning '
  'of a longer input gives',
  'initial': 'a new layer keeps the scale of its input, and every weight of it '
  'gets a gradient',
  'tracing': 'traced once for a shape; at the size of a 7B model no array of '
  'length by length is made while tracing',
  'sharding': 'time spread over devices changes neither outputs nor gradients',
}


class Table(NamedTuple):
  """A table that both pages show; cells are Markdown of one line.

  Attributes:
    head: names of the columns.
    body: (name of a group or '', rows) in order.
    align: one letter a column, 'l', 'c' or 'r'.
    narrow: whether the names of columns stand upright where they can.
  """

  head: Sequence[str]
  body: Sequence[tuple[str, Sequence[Sequence[str]]]]
  align: str
  narrow: bool = False


Part = str | Table  # a paragraph of Markdown, or a table


def content(fragments: Sequence[Fragment]) -> list[tuple[str, list[Part]]]:
  """The sections of the page: title, and paragraphs and tables in order."""
  fragments = _in_order(fragments)
  numbers = _numbers(fragments)
  return [
    ('What each can do', _can(fragments)),
    ('What each costs', _costs(fragments)),
    ('Which laws hold', _laws(fragments, numbers)),
    ('Every no, with its reason', _reasons(numbers)),
    ('How this was made', [_made(fragments)]),
  ]


def _in_order(fragments) -> list[Fragment]:
  """As history has it: families by their first paper, and papers in them."""
  began: dict[str, int] = {}
  for f in fragments:
    began[f['family']] = min(began.get(f['family'], f['year']), f['year'])
  rank = lambda f: (began[f['family']], f['family'], f['year'], f['mechanism'])
  return sorted(fragments, key=rank)


def _grouped(fragments, row) -> list[tuple[str, list[list[str]]]]:
  """The rows of a table, family by family."""
  families = dict.fromkeys(fragment['family'] for fragment in fragments)
  return [
    (family, [row(f) for f in fragments if f['family'] == family])
    for family in families
  ]


def _can(fragments) -> list[Part]:
  yes = lambda value: 'yes' if value else 'no'
  row = lambda f: [
    f'`{f["mechanism"]}`',
    _link(cite(f), f['link'], f['paper']),
    f['causal'],
    yes(f['streams']),
    yes(f['cross']),
    yes(f['packing']),
    f['layout'],
    ', '.join(f['implementations']) or 'none',
    ', '.join(f['sequence_parallelism']) or 'none',
  ]
  head = ['mechanism', 'paper', 'causal', 'streams', 'cross', 'packing']
  head += ['layout', 'implementations', 'sequence parallelism']
  text = (
    '**Causal**: always, or optional, as the field `causal` says. '
    '**Streams**: decodes, and reads a stream in chunks of any size, through '
    'a state of fixed shape. **Cross**: attends to a context. **Packing**: '
    'several documents may share a row. **Layout**: whether tokens may lie in '
    'any order in the array, or neighbours in time must be neighbours. '
    '**Sequence parallelism**: how devices that each hold a part of time work '
    'together. Attention has five ways, of which one is chosen by sizes and '
    'mask: `halo` (the last keys of the neighbour), `ulysses` (heads for '
    'time), `gather` (of all keys), `ring` (keys travel), and '
    '`hybrid` (a ring of groups that exchange). `prefix` sends a state and '
    'what becomes of it, whatever the length, and before that a short '
    "convolution takes the neighbour's last tokens; `channels` exchanges "
    'channels for time, unless filters end within the neighbour.'
  )
  return [text, Table(head, _grouped(fragments, row), 'llccccccc')]


def _link(text: str, link: str, title: str) -> str:
  return '[{}]({} "{}")'.format(text, link, title.replace('"', "'"))


def _costs(fragments) -> list[Part]:
  bytes_at = lambda f, length: size(f['state_bytes'][str(length)])
  row = lambda f: [
    f'`{f["mechanism"]}`',
    *(bytes_at(f, length) for length in LENGTHS),
    f'{f["parameters"]:,}',
    ', '.join(f'`{kind}`' for kind in f['memory']) or 'nothing',
    _fields(f['fields']),
  ]
  head = [f'state at {length // 1024}k' for length in LENGTHS]
  head = ['mechanism', *head, 'parameters', 'remembers', 'default fields']
  text = (
    f'One layer of width {WIDTH} with its default fields. '
    f'**State** is what one sequence keeps for decoding after {LENGTHS[0]:,} '
    f'and {LENGTHS[1]:,} tokens: what is cached in {DTYPE}, and sums over time '
    'in float32. The classes that it **remembers** in are those of '
    '`jaxattn/state.py`.'
  )
  return [text, Table(head, _grouped(fragments, row), 'lrrrll')]


def _laws(fragments, numbers) -> list[Part]:
  def cell(fragment, law):
    result = fragment['laws'][law]
    if reason := told(result, 'no'):
      return f'no ({numbers[law, reason][0]})'
    if told(result, 'failed'):
      return '**failed**'
    return '✓ *' if law == 'causality' and fragment['fft'] else '✓'

  row = lambda f: [
    f'`{f["mechanism"]}`',
    str(f['run']['examples']),
    *(cell(f, law) for law in LAWS),
  ]
  matrix = Table(
    ['mechanism', 'examples', *LAWS],
    _grouped(fragments, row),
    'l' + 'c' * (len(LAWS) + 1),
    narrow=True,
  )
  no = declined(fragments)
  meaning = Table(
    ['law', 'what it says', 'hold it', 'no'],
    [('', [_law(law, fragments, no[law]) for law in LAWS])],
    'llrr',
  )
  text = (
    '✓: the law was run on that many examples, which are choices of fields, '
    'and held. A number behind a no is that of its reason, below.'
  )
  if any(fragment['fft'] for fragment in fragments):
    text += (
      ' *: its fast form is a Fourier transform, whose rounding reaches back '
      'in time, so causality is held to 1e-6 of the largest gradient.'
    )
  return [meaning, text, matrix, *_failures(fragments)]


def _law(law, fragments, no) -> list[str]:
  holds = sum(fragment['laws'][law] == 'holds' for fragment in fragments)
  return [f'`{law}`', MEANING[law], str(holds), str(no)]


def _failures(fragments) -> list[str]:
  return [
    f'**Failed**: `{fragment["mechanism"]}`, {law}: `{how}`'
    for fragment in fragments
    for law, result in fragment['laws'].items()
    if (how := told(result, 'failed'))
  ]


def _numbers(fragments) -> dict[tuple[str, str], tuple[int, list[str]]]:
  """(law, reason) -> its number on the page, and who gives it."""
  found: dict[tuple[str, str], list[str]] = {}
  for law in LAWS:
    for fragment in fragments:
      if reason := told(fragment['laws'][law], 'no'):
        found.setdefault((law, reason), []).append(fragment['mechanism'])
  return {key: (i, who) for i, (key, who) in enumerate(found.items(), start=1)}


def _reasons(numbers) -> list[Part]:
  if not numbers:
    return ['Every mechanism claims every law.']
  rows = [
    [str(number), f'`{law}`', reason, ', '.join(f'`{name}`' for name in who)]
    for (law, reason), (number, who) in numbers.items()
  ]
  return [Table(['#', 'law', 'reason', 'mechanisms'], [('', rows)], 'rlll')]


def _made(fragments) -> str:
  runs = [fragment['run'] for fragment in fragments]
  every = lambda key: ' and '.join(sorted({str(run[key]) for run in runs}))
  dates = sorted({run['date'] for run in runs})
  span = ' to '.join(dict.fromkeys((dates[0], dates[-1]))) if dates else ''
  return (
    '`python -m experiments.capabilities` runs the laws of every mechanism '
    'whose source changed, writes `docs/capabilities/<mechanism>.json` for it, '
    'and makes this page from those. '
    f'The laws ran with jax {every("jax")}, Python {every("python")}, on '
    f'{every("platform")}, {span}.'
  )


def cite(fragment: Fragment) -> str:
  """'Katharopoulos et al. 2020'."""
  names = [name.strip() for name in fragment['authors'].split(',')]
  who = f'{names[0]} et al.' if len(names) > 2 else ', '.join(names)
  return f'{who} {fragment["year"]}'


def size(count: int | None) -> str:
  """Bytes as they are read: '512 B', '1.00 MiB', '513 MiB'."""
  if count is None:
    return '-'
  value, unit = float(count), 'B'
  for larger in ('KiB', 'MiB', 'GiB', 'TiB'):
    if value < 1024:
      break
    value, unit = value / 1024, larger
  if unit == 'B':
    return f'{count} B'
  digits = 2 if value < 10 else 1 if value < 100 else 0
  return f'{value:.{digits}f} {unit}'


def _fields(fields: Mapping[str, Any]) -> str:
  plain = lambda value: 'none' if value is None else str(value).lower()
  return ', '.join(f'{name} {plain(value)}' for name, value in fields.items())


# ------------------------------------------------------------------- the pages

TITLE = 'Capabilities'
LEAD = (
  'What each mechanism of jaxattn claims, what it costs, and which laws held '
  'when they were last run. Generated: change the mechanism, not this page.'
)


def markdown(fragments: Sequence[Fragment]) -> str:
  """The page in Markdown."""
  parts = [f'# {TITLE}', LEAD]
  for title, section in content(fragments):
    parts.append(f'## {title}')
    parts += [p if isinstance(p, str) else _markdown(p) for p in section]
  return '\n\n'.join(parts) + '\n'


def _markdown(table: Table) -> str:
  rules = {'l': '---', 'c': ':---:', 'r': '---:'}
  lines = [table.head, [rules[letter] for letter in table.align]]
  for group, rows in table.body:
    if group:
      lines.append([f'**{group}**', *[''] * (len(table.head) - 1)])
    lines += rows
  escape = lambda cell: cell.replace('|', '\\|')
  return '\n'.join('| ' + ' | '.join(map(escape, row)) + ' |' for row in lines)


def page(fragments: Sequence[Fragment]) -> str:
  """The page in HTML: one file that needs no other."""
  body = [f'<h1>{TITLE}</h1>', f'<p class="lead">{_inline(LEAD)}</p>']
  for title, section in content(fragments):
    body.append(f'<h2>{html.escape(title)}</h2>')
    body += [
      f'<p>{_inline(part)}</p>' if isinstance(part, str) else _html(part)
      for part in section
    ]
  return PAGE.replace('{title}', f'{TITLE} of jaxattn').replace(
    '{body}', '\n'.join(body)
  )


def _html(table: Table) -> str:
  columns = range(len(table.head))
  kind = ['text' if letter == 'l' else 'mid' for letter in table.align]
  kind = ['num' if a == 'r' else k for a, k in zip(table.align, kind)]
  head = ''.join(
    f'<th scope="col" class="{kind[i]}"><span>{_inline(table.head[i])}</span>'
    '</th>'
    for i in columns
  )
  lines = [
    f'<div class="table{" upright" if table.narrow else ""}" tabindex="0">',
    f'<table>\n<thead><tr>{head}</tr></thead>',
  ]
  for group, rows in table.body:
    lines.append('<tbody>')
    if group:
      lines.append(
        f'<tr class="group"><th colspan="{len(columns)}" scope="rowgroup">'
        f'<span>{_inline(group)}</span></th></tr>'
      )
    for row in rows:
      cells = ''.join(_cell(row[i], kind[i], first=i == 0) for i in columns)
      lines.append(f'<tr>{cells}</tr>')
    lines.append('</tbody>')
  return '\n'.join([*lines, '</table>\n</div>'])


def _cell(text: str, kind: str, first: bool) -> str:
  moods = {'✓': 'good', 'no (': 'no', 'no': 'soft', '**': 'bad'}
  mood = next((m for start, m in moods.items() if text.startswith(start)), '')
  if kind == 'mid' and mood:
    kind += f' {mood}'
  tag = 'th scope="row"' if first else 'td'
  return f'<{tag} class="{kind}">{_inline(text)}</{tag.split()[0]}>'


def _inline(text: str) -> str:
  """The Markdown that is used above, as HTML."""
  text = html.escape(text, quote=False)  # titles have no quotes, see _link
  text = re.sub(r'`([^`]+)`', r'<code>\1</code>', text)
  text = re.sub(r'\*\*([^*]+)\*\*', r'<b>\1</b>', text)
  return re.sub(
    r'\[([^\]]+)\]\((\S+) "([^"]*)"\)', r'<a href="\2" title="\3">\1</a>', text
  )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {
  color-scheme: light dark;
  --ink: #1c1e21; --soft: #5c6370; --line: #dfe2e6; --paper: #fff;
  --band: #f4f5f7; --link: #0b5cad; --good: #15803d; --no: #a14300;
  --bad: #c01c28;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e6e9; --soft: #9aa1ac; --line: #34383f; --paper: #15171a;
    --band: #1e2125; --link: #7db7f5; --good: #5fc987; --no: #f0a368;
    --bad: #ff7b7b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 78rem; padding: 2rem 1.25rem 4rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0 1rem; }
.lead, .soft { color: var(--soft); }
a { color: var(--link); text-decoration-thickness: 1px; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
/* A box of its own, so that a header can stick while either way is scrolled. */
.table {
  overflow: auto; max-height: 85vh; margin: 1rem 0 1.5rem;
  border: 1px solid var(--line); border-radius: 8px;
}
table {
  border-collapse: separate; border-spacing: 0; width: 100%;
  font-size: .875rem; line-height: 1.35;
}
th, td {
  padding: .45rem .75rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); font-weight: 400;
}
tbody:last-child tr:last-child > * { border-bottom: 0; }
thead th {
  position: sticky; top: 0; z-index: 2; background: var(--band);
  font-weight: 600; vertical-align: bottom;
}
tbody th { position: sticky; left: 0; z-index: 1; background: var(--paper); }
tr:not(.group) > th:first-child { box-shadow: 1px 0 var(--line); }
thead th:first-child { left: 0; z-index: 3; }
tbody th, .num, .mid { white-space: nowrap; }
thead th.mid { white-space: normal; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
.mid { text-align: center; }
td.text { min-width: 11rem; }
td.text:last-child { min-width: 20rem; }
.group th { background: var(--band); color: var(--soft); font-weight: 600; }
.group span { position: sticky; left: .75rem; }
.upright thead th.mid { height: 8.5rem; padding: .5rem .25rem; }
.upright thead th.mid span {
  writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap;
}
.good { color: var(--good); }
.no { color: var(--no); }
.bad { color: var(--bad); }
tbody tr:not(.group):hover > * { background: var(--band); }
@media (max-width: 40rem) {
  body { padding: 1.25rem .75rem 3rem; }
  th, td { padding: .4rem .55rem; }
  .group span { left: .55rem; }
}
</style>
</head>
<body>
{body}
</body>
</html>
"""
