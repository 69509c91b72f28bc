"""Trains every mechanism of a config on every task of it, and compares them.

  python -m experiments.ablate --config=configs/quickstart.py

Results go to runs/<name>/: report.md with its figures, results.jsonl with one
line a run, and cells/ with what was trained. Run the command again and finished
cells are skipped; one that was interrupted carries on from its last checkpoint;
one whose config or data changed is trained anew.

  --only='mqar/.*delta'           cells whose name has this in it, such as
                                  mqar/delta_net/rate=0.003/seed=0
  --config=configs/quickstart.py:quick    a few steps of everything
  --config.seeds='(0, 1, 2)'      mean and spread over seeds
  --config.tasks.mqar.steps=2000  any number of the config

The exit status is 1 if a cell failed; the others are in the report all the
same.
"""

import datetime
import json
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import compiled, machine
from experiments.cells import Cell, plan
from experiments.screen import Screen
from jaxattn.analysis import report, table
from jaxattn.analysis.summary import summarise
from jaxattn.tasks.bytes import Bytes
from jaxattn.tasks.ngram import references as simple_models
from jaxattn.train import build, log, loop

CONFIG = config_flags.DEFINE_config_file(
  'config', help_string='Python file with get_config(); FILE:quick is short.'
)
NAME = flags.DEFINE_string(
  'name', None, "Folder below --runs; the config's name if not given."
)
RUNS = flags.DEFINE_string('runs', 'runs', 'Folder of all ablations.')
ONLY = flags.DEFINE_string(
  'only', '', 'Regular expression: train just the cells whose name has it.'
)

Record = dict[str, Any]


def ablate(
  cells: Sequence[Cell],
  folder: Path,
  console: Console,
  *,
  only: str = '',
  fit: Callable[..., dict] = loop.fit,
) -> list[Record]:
  """Trains the cells that are not finished, one after the other.

  A cell that fails leaves the others alone: its record has an 'error' instead
  of results, and it is tried again next time.

  Args:
    cells: of `plan`.
    folder: of the ablation.
    console: where to print.
    only: regular expression; cells whose name has it nowhere are not trained.
    fit: `jaxattn.train.loop.fit`, or what stands in for it.

  Returns:
    The records of all cells but those that were never trained, in order; also
    written to results.jsonl.
  """
  records = [finished(cell, folder) for cell in cells]
  todo = [
    i
    for i, cell in enumerate(cells)
    if records[i] is None and re.search(only, cell.name)
  ]
  if done := sum(record is not None for record in records):
    console.print(f'{done} of {len(cells)} cells are finished already.')
  with Screen(console, [cells[i] for i in todo]) as screen:
    for i in todo:
      screen.start(cells[i])
      records[i] = train(cells[i], folder, fit, screen.step)
      write_results(folder, records)
      screen.finish(said(records[i]))
  write_results(folder, records)
  return [record for record in records if record]


def finished(cell: Cell, folder: Path) -> Record | None:
  """The record that an earlier call left, if the cell was finished."""
  path = folder / 'cells' / cell.folder / 'cell.json'
  if cell.error or not path.exists():
    return None
  return json.loads(path.read_text(encoding='utf-8'))


def train(cell: Cell, folder: Path, fit, progress) -> Record:
  """Trains one cell and returns its record."""
  record = {
    'task': cell.task,
    'mechanism': cell.mechanism,
    'rate': cell.rate,
    'seed': cell.seed,
    'folder': cell.folder,
    'config': cell.config,
    'about': cell.about,
    'versions': machine.versions(),
    'device': machine.device(),
    'date': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
  }
  if cell.error:
    return record | {'error': cell.error}
  workdir = folder / 'cells' / cell.folder
  workdir.mkdir(parents=True, exist_ok=True)
  try:
    record |= fit(cell.config, workdir, progress=progress)
  except Exception as error:  # whatever it is, the other cells must not suffer
    trace = workdir / 'error.txt'
    trace.write_text(traceback.format_exc(), encoding='utf-8')
    return record | {'error': f'{type(error).__name__}: {error}'}
  log.replace(workdir / 'cell.json', json.dumps(record, indent=2))
  return record


def said(record: Record) -> str:
  """How a cell ended, in a few words."""
  if error := record.get('error'):
    return f'FAILED: {error}'
  name = record['about']['headline']
  return f'{name.replace("_", " ")} {record["metrics"][name]:.3f}'


def write_results(folder: Path, records) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(record) + '\n' for record in records if record]
  log.replace(folder / 'results.jsonl', ''.join(lines))


def references(records: Sequence[Record], folder: Path) -> dict[str, dict]:
  """task -> what simple models reach on its bytes; kept in references.json."""
  path = folder / 'references.json'
  kept = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
  found = {}
  for record in records:
    if record.get('error') or record['task'] in found:
      continue
    # Seeds choose crops to train on; the text and the test rows stay.
    run = json.loads(json.dumps(record['config']))
    run['task']['seed'] = 0
    data, _ = build.build(run)
    if isinstance(data, Bytes):
      key = data.fingerprint()
      if key not in kept:
        kept[key] = simple_models(data)
        log.replace(path, json.dumps(kept, indent=2))
      found[record['task']] = kept[key]
  return found


def show(records: Sequence[Record], console: Console) -> None:
  """The table at the end."""
  screen = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  screen.add_column('task')
  screen.add_column('mechanism', no_wrap=True)
  for column in table.COLUMNS:
    screen.add_column(column, justify='right')
  rows = summarise(records)
  for task in dict.fromkeys(row.task for row in rows):
    own = [row for row in rows if row.task == task]
    for row in own:
      screen.add_row(task, row.mechanism, *table.cells(row).values())
      task = ''
    screen.add_section()
  console.print(screen)
  console.print(
    'FLOPs are of a forward pass, per token; state bytes are what one sequence '
    'keeps for decoding after its last token.'
  )


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  compiled.keep()
  # JSON knows no tuples: what is compared and hashed is what will be read back.
  config = json.loads(json.dumps(CONFIG.value.to_dict()))
  folder = Path(RUNS.value) / (NAME.value or config['name'])
  terminal = sys.stdout.isatty()
  console = Console(soft_wrap=not terminal, width=None if terminal else 110)
  cells = plan(config)
  if not any(re.search(ONLY.value, cell.name) for cell in cells):
    raise app.UsageError(
      f'--only={ONLY.value!r} is in no name of a cell: '
      f'{", ".join(cell.name for cell in cells)}'
    )
  try:
    records = ablate(cells, folder, console, only=ONLY.value)
  except KeyboardInterrupt:
    console.print('Stopped. The same command carries on from here.')
    sys.exit(130)
  command = 'python -m experiments.ablate ' + shlex.join(sys.argv[1:])
  page = report.write(folder, records, references(records, folder), command)
  show(records, console)
  console.print(report.caveat(records), highlight=False)
  console.print(f'Written: {page}')
  failed = [record for record in records if record.get('error')]
  for record in failed:
    name = f'{record["task"]}/{record["mechanism"]}'
    console.print(f'FAILED {name}: {record["error"]}', markup=False)
  sys.exit(1 if failed else 0)


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  # Of what the libraries log only warnings; a --verbosity given later wins.
  app.run(main, [sys.argv[0], '--verbosity=-1', *sys.argv[1:]])
