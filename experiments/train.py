"""Trains one model, and carries on where an earlier call was stopped.

  python -m experiments.train --config=configs/lm.py:gated_linear,size=small \\
      --workdir=runs/gla

A configuration file may take an argument behind a colon (the file says which);
any number in it can be set by name: --config.batch=16. The same command again
resumes a run that was stopped, and shows the results of one that is finished.

WORKDIR gets config.json, metrics.jsonl (one record a line), checkpoints/ and,
at the end, result.json. jaxattn.load(WORKDIR) gives back the model.

With several hosts, run the same command on each, and add what tells them of
each other: --distributed on a TPU pod or under Slurm, where they find out by
themselves, elsewhere

  --coordinator=HOST:PORT --processes=4 --process=0      (and 1, 2, 3)

where HOST is that of process 0. WORKDIR is a folder that all of them see. When
one of them dies the others end, within twice --timeout seconds, and the same
commands carry on from the last checkpoint. experiments.pod.local tries all that
on one machine.

The exit status is 1 if something was wrong, and the last line says what.
"""

import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from experiments import compiled, processes
from experiments.screen import EVERY, clock
from jaxattn.parallel.processes import first
from jaxattn.tasks import registry as tasks
from jaxattn.train.loop import fit


def train(
  config: dict[str, Any], workdir: Path, console: Console
) -> dict[str, Any]:
  """`fit` with a bar: steps, loss, rate, time left; or a line now and then."""
  bars = Progress(
    TextColumn('{task.description}'),
    BarColumn(),
    TextColumn('{task.fields[text]}'),
    console=console,
    disable=not console.is_terminal,
  )
  bar = bars.add_task('training', total=config['steps'], text='compiles')
  told = time.monotonic()

  def progress(step: int, steps: int, numbers: dict[str, Any]) -> None:
    nonlocal told
    text = f'{step}/{steps}  loss {numbers["loss"]:.4f}'
    if rate := numbers['steps_per_second']:
      text += f'  {rate:.1f} steps/s  {clock((steps - step) / rate)} left'
    bars.update(bar, completed=step, text=text)
    if not console.is_terminal and time.monotonic() - told > EVERY:
      told = time.monotonic()
      console.print(text, markup=False, highlight=False)

  with bars:
    return fit(config, workdir, progress=progress)


def report(
  result: dict[str, Any],
  config: dict[str, Any],
  workdir: Path,
  console: Console,
) -> None:
  """The table at the end, and where things lie."""
  task = tasks.make(**config['task'])
  best = result['best']
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('on test data')
  table.add_column(f'step {result["step"]}', justify='right')
  table.add_column(f'best (step {best["step"]})', justify='right')
  table.add_column('chance', justify='right')
  number = lambda value: '' if value is None else f'{value:.4f}'
  for name in in_order(result['metrics'], task.headline):
    table.add_row(
      name.replace('_', ' '),
      number(result['metrics'][name]),
      number(best[name]),
      number(task.chance.get(name)),
    )
  console.print(table)
  rate = result['steps_per_second']
  lines = {
    'loss in training': number(result['train_loss']),
    'parameters': f'{result["parameters"]:,}',
    'FLOPs, forward, one sequence': f'{result["flops"]:,}',
    'decoding state, one sequence': f'{result["state_bytes"]:,} bytes',
    'steps per second': f'{rate:.2f}' if rate else 'not measured',
    'time': clock(result['seconds']),
  }
  for name, value in lines.items():
    console.print(f'{name}: {value}', highlight=False)
  for note in result['notes']:
    console.print(f'note: {note}', markup=False, highlight=False)
  console.print(
    f'Written: {workdir}{os.sep} (metrics.jsonl, result.json, checkpoints). '
    f'The model: jaxattn.load({str(workdir)!r})',
    markup=False,
    highlight=False,
  )


def in_order(names: Iterable[str], headline: str) -> list[str]:
  """The headline first; 32-64 before 128-256."""
  numbers = lambda name: [int(n) for n in re.findall(r'\d+', name)]
  plain = lambda name: re.sub(r'\d+', '', name)
  rank = lambda name: (name != headline, plain(name), numbers(name))
  return sorted(names, key=rank)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  chosen = flags.FLAGS['verbosity'].present
  if not chosen:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file
  with processes.connected():
    if not (chosen or first()):
      logging.set_verbosity(logging.ERROR)  # what one says is enough
    compiled.keep()
    terminal = sys.stdout.isatty()
    console = Console(
      soft_wrap=not terminal,
      width=None if terminal else 100,
      quiet=not first(),
    )
    config = flags.FLAGS.config.to_dict()
    workdir = Path(flags.FLAGS.workdir)
    try:
      result = train(config, workdir, console)
    except KeyboardInterrupt:
      console.print('Stopped. The same command carries on from here.')
      sys.exit(130)
    except (ValueError, NotImplementedError, FloatingPointError) as error:
      sys.exit(f'error: {error}')
    if first():
      report(result, config, workdir, console)


def define(
  values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> None:
  """Defines the flags. Not on import: other programs have theirs."""
  config_flags.DEFINE_config_file(
    'config',
    help_string='Python file with get_config(); FILE:ARGUMENT sets it.',
    flag_values=values,
    sys_argv=argv,
  )
  flags.DEFINE_string(
    'workdir', None, 'Folder of the run, new or begun.', flag_values=values
  )
  flags.mark_flags_as_required(['config', 'workdir'], flag_values=values)
  processes.define(values)


def parsed(
  argv: Sequence[str], values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  """Flags, as absl parses them; one line says what is wrong with them.

  A configuration is made while flags are parsed, so what its file raises comes
  out here: as a traceback in the text of a flag's error, or as an
  AttributeError that has the name that there is not and a guess, on two lines.
  """
  try:
    rest = values(argv)
    values.config.to_dict()  # raises if there is no such file
    return rest
  except AttributeError as error:
    name, _, guess = str(error.__context__.args[0]).partition('\n')
    sys.exit(f'error: --config: there is no {name}. {guess}'.rstrip())
  except (flags.Error, OSError) as error:
    last = str(error).strip().splitlines()[-1].strip()
    sys.exit(f'error: {last.removeprefix("ValueError: ")}')


if __name__ == '__main__':
  define()
  app.run(main, flags_parser=parsed)
