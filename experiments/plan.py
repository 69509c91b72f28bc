"""Compiles a training step for chips that are not there, and says if it fits.

  pip install -e '.[aot]'
  python -m experiments.plan --config=configs/long_context.py:size=7b \\
      --topology=v5e:16x16 --length=1048576

The step is the one that `experiments.train` would run with this configuration,
compiled by the compiler of those chips: so it is their verdict on memory, and
what is sent and hidden is read from the program that would run. For TPUs it is
known once the compiler has laid out memory, before it makes machine code, which
takes several times as long; only where the code may decide is that awaited.

  --length       tokens of a row, in place of the task's; any number: a row that
                 devices cannot share evenly is filled up
  --longest      finds the longest row that fits, to an eighth of an octave; it
                 begins at that length, and goes up or down
  --compare      several ways side by side: strategies (of which `ring` and
                 `hybrid` take the layout that is chosen, mostly a zigzag),
                 layouts of a ring (`contiguous`, `striped`, `zigzag`), and
                 `blockwise`, for which a row stays on one device:
                 --compare=ring,striped,ulysses,hybrid,gather,blockwise

Topologies: v3:4x4 to 16x16, v4:2x2x1 to 8x8x8, v5e:2x2 to 16x16, v5p:2x2x1 to
8x8x16, v6e:2x2 to 16x16, tpu7x:2x2x1 to 4x4x4; h200:2, 4 or 8. A v3 or tpu7x
chip has two devices, any other has one.

The exit status is 1 if it does not fit, or something was wrong.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

# What is here does not matter, and a plugin that looks for its chips complains.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import app, flags, logging
from ml_collections import config_flags
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import laid
from experiments.planned import Plan, amount, plan
from experiments.screen import Clock
from experiments.train import parsed
from jaxattn.parallel import sequence, stripe
from jaxattn.tasks import registry as tasks
from pallas_kernels import chips

# Lengths that `--longest` tells apart, in an octave.
STEPS = 8
# Where it ends: places in a row are numbers of 32 bits.
MOST = 2**30


def way(config: dict[str, Any], name: str) -> dict[str, Any]:
  """A configuration as `--compare` names it."""
  policy = dict(config['policy'])
  if name == 'blockwise':  # FSDP alone: each device has whole rows
    mesh = {**config['mesh'], 'data': -1, 'seq': 1}
    return {**config, 'mesh': mesh, 'batch': 'devices', 'layout': 'contiguous'}
  if name in stripe.LAYOUTS:
    policy['strategy'] = 'ring'
    return {**config, 'policy': policy, 'layout': name}
  if name not in sequence.STRATEGIES:
    known = (*sequence.STRATEGIES, *stripe.LAYOUTS, 'blockwise')
    raise ValueError(f'--compare={name} is none of {", ".join(known)}')
  policy['strategy'] = name
  return {**config, 'policy': policy}


@dataclasses.dataclass(frozen=True)
class Refused:
  """A length that the model, its task or a strategy does not take, and why."""

  length: int
  why: str
  fits = False


def longest(
  config: dict[str, Any], topology: str, length: int, clock: Clock
) -> tuple[Plan, Plan | Refused | None, dict[int, Plan]]:
  """The longest row that fits, the shortest seen that does not, and all seen.

  Lengths are doubled or halved from `length` on until one fits and the next
  does not. Then the octave between is divided into STEPS and searched, where
  the bytes that both need let expect the answer. All but the first are lengths
  that devices can share evenly, for others are filled up to such. If none fits,
  the first answer is the shortest there is; if all do, the second is None.
  Once one fits, a length that is refused is one that does not.

  Raises:
    ValueError, NotImplementedError: a length is refused, and none has fitted.
  """
  all_seen = {}

  def seen(length):
    clock.say(f'{length:,} tokens')
    try:
      here = all_seen[length] = plan(config, topology, length)
    except (ValueError, NotImplementedError) as error:
      if not any(one.fits for one in all_seen.values()):
        raise
      here = Refused(length, str(error))
    says = here.why if isinstance(here, Refused) else here.verdict
    clock.note(f'{length:,} tokens: {says}')
    return here

  here = seen(length)
  here, unit = dataclasses.replace(here, length=here.filled), here.unit
  fits, fails = (here, None) if here.fits else (None, here)
  while fits is None or fails is None:
    length = here.length * 2 if here.fits else here.length // 2 // unit * unit
    if not 0 < length <= MOST:
      return here, None, all_seen
    here = seen(length)
    fits, fails = (here, fails) if here.fits else (fits, here)
  step = max(fits.length // STEPS // unit, 1) * unit
  while (between := (fails.length - fits.length) // step) > 1:
    share = 1 / 2
    if not isinstance(fails, Refused):
      share = (fits.room - fits.needs) / (fails.needs - fits.needs)
    ahead = min(max(int(share * between), 1), between - 1)
    here = seen(fits.length + ahead * step)
    fits, fails = (here, fails) if here.fits else (fits, here)
  return fits, fails, all_seen


def ends(found: Plan, fails: Plan | Refused | None) -> str:
  """What a search for the longest row came to."""
  if found.fits:
    longer = f'{fails.length:,} do not' if fails else 'no longer were tried'
    if isinstance(fails, Refused):
      longer = f'{fails.length:,} are refused: {fails.why}'
    return f'{found.length:,} tokens a row fit, {longer}'
  tokens = 'one token' if found.length == 1 else f'{found.length:,} tokens'
  return f'none: not even {tokens} a row fit' + (
    ', and devices cannot share fewer' if found.unit > 1 else ''
  )


def report(found: Plan, console: Console, search: str | None = None) -> None:
  """What one device holds and sends, and what to change if that is too much."""
  tokens = f'{found.length:,} a row'
  if found.filled > found.length:
    tokens += f', filled up to {found.filled:,} for devices to share'
  lines = {
    'model': f'{found.parameters:,} parameters, {found.pattern}',
    'devices': f'{found.devices} x {found.kind} ({found.mesh})',
    'tokens': f'{tokens}, {found.batch:,} rows a step',
  }
  if found.held:
    lines |= {
      'parameters': amount(found.held['parameters']),
      'optimiser': amount(found.held['optimiser']),
      'batch': amount(found.held['batch']),
      'program': 'machine code was not waited for, and is not counted',
      'temporaries': amount(found.held['temporaries']),
    }
    if 'program' in found.held:
      lines['program'] = amount(found.held['program'])
  lines['in all'] = found.verdict
  if not found.held:
    lines['in all'] += ', by a rough count: the compiler gave up before it laid'
    lines['in all'] += ' out memory, so what is held by what is not known'
  else:
    share = found.hidden / found.sent if found.sent else 1
    lines['sent a step'] = (
      f'{amount(found.sent)} by each device, {share:.0%} behind other work'
    )
  lines['layout'] = found.layout
  for i, text in enumerate(found.strategies):
    lines['strategy' + (f' {i + 1}' if i else '')] = text
  lines['known after'] = f'{found.seconds:.0f} s'
  if search:
    lines['longest'] = search
  width = max(map(len, lines))
  for name, value in lines.items():
    console.print(f'{name:{width}}  {value}', markup=False, highlight=False)
  for text in found.advice:
    console.print(f'to change: {text}', markup=False, highlight=False)


def compared(plans: dict[str, Plan | str], console: Console) -> None:
  """Ways side by side, or why one cannot be."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  left = 'way', 'layout'
  for name in (*left, 'tokens', 'rows', 'held', 'left', 'sent', 'hidden'):
    table.add_column(name, justify='left' if name in left else 'right')
  refused = {n: found for n, found in plans.items() if isinstance(found, str)}
  for name, found in plans.items():
    if isinstance(found, str):
      table.add_row(name, 'refused')
      continue
    sent = hidden = 'not compiled'
    if found.held:
      sent = amount(found.sent)
      hidden = f'{found.hidden / found.sent:.0%}' if found.sent else ''
    table.add_row(
      name,
      found.layout,
      f'{found.length:,}',
      f'{found.batch:,}',
      amount(found.needs),
      amount(found.room - found.needs),
      sent,
      hidden,
    )
  console.print(table)
  console.print('Held, left and sent (in a step) are of one device.')
  for name, why in refused.items():
    console.print(f'{name}: {why}', markup=False, highlight=False)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  terminal = sys.stdout.isatty()
  console = Console(soft_wrap=not terminal, width=None if terminal else 100)
  options = flags.FLAGS
  config = options.config.to_dict()
  try:
    if 'task' not in config or 'model' not in config:
      raise ValueError(
        'this configuration is not of one run: it needs `task` and `model`, as'
        ' configs/lm.py and configs/long_context.py have them'
      )
    topology = options.topology
    devices = chips.devices(topology)
    length = options.length or config['task'].get('length')
    if not length:  # that of its preset
      length = tasks.make(**config['task']).length
    ways = {'': config}
    if options.compare:
      ways = {name: way(config, name) for name in options.compare}
    plans, search = {}, None
    with Clock(console) as clock:
      for name, asked in ways.items():
        title = f'{name + ": " if name else ""}compiles for {len(devices)} x'
        clock.start(f'{title} {devices[0].device_kind}')
        try:
          if options.longest:
            plans[name], fails, _ = longest(asked, topology, length, clock)
            search = ends(plans[name], fails)
          else:
            plans[name] = plan(asked, topology, length)
        except (ValueError, NotImplementedError) as error:
          if len(ways) == 1:
            raise
          plans[name] = str(error)
  except KeyboardInterrupt:
    sys.exit(130)
  except (*laid.PLAIN, laid.Ended) as error:
    sys.exit(f'error: {error}')
  if options.compare:
    compared(plans, console)
  else:
    report(plans[''], console, search)
  made = [found for found in plans.values() if isinstance(found, Plan)]
  sys.exit(0 if any(found.fits for found in made) else 1)


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags. Not on import: other programs have theirs."""
  config_flags.DEFINE_config_file(
    'config',
    help_string='Python file with get_config(); FILE:ARGUMENT sets it.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'topology', None, 'Chips, as v5e:16x16.', flag_values=values
  )
  flags.DEFINE_integer(
    'length', None, 'Tokens of a row.', lower_bound=1, flag_values=values
  )
  flags.DEFINE_bool(
    'longest', False, 'Find the longest row that fits.', flag_values=values
  )
  flags.DEFINE_list(
    'compare', [], 'Ways to show side by side.', flag_values=values
  )
  for name, example in (
    ('config', 'a configuration, as --config=configs/long_context.py:size=7b'),
    ('topology', 'the chips, as --topology=v5e:16x16'),
  ):
    flags.register_validator(
      name, bool, message=f'give {example}', flag_values=values
    )


if __name__ == '__main__':
  define()
  app.run(main, flags_parser=parsed)
