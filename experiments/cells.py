"""The cells of an ablation: every mechanism on every task, rate and seed.

A cell is one run, described by the dict that `jaxattn.train.loop.fit` takes,
and it lives in a folder named after a hash of that dict and of its data. So a
finished cell is found again, and a changed one is another cell.

All mechanisms of a task get as many parameters as the one that the config
names in `match`: what a mechanism saves or spends goes to the feed-forward,
whose width `hidden` is solved for.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import jax

from jaxattn.registry import did_you_mean
from jaxattn.train import build

SECTION = ('mechanisms', 'rates')  # of a task; all else it has is the run's


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of an ablation.

  Attributes:
    task: the section of the config it comes from.
    mechanism: its label in the config.
    rate, seed: the learning rate at its peak, and the seed.
    config: what `fit` takes; {} if there is no such run.
    about: facts of the task that tables and figures need.
    error: why there is no such run, or None.
  """

  task: str
  mechanism: str
  rate: float
  seed: int
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  about: dict[str, Any] = dataclasses.field(default_factory=dict)
  error: str | None = None

  @property
  def key(self) -> str:
    """8 hex digits that change with the config or the data."""
    what = [self.config, self.about.get('fingerprint')]
    text = json.dumps(what, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]

  @property
  def name(self) -> str:
    return f'{self.task}/{self.mechanism}/rate={self.rate:g}/seed={self.seed}'

  @property
  def folder(self) -> str:
    words = re.sub(r'\W+', '-', f'{self.task}-{self.mechanism}')
    return f'{words}-{self.key}'


def plan(config: Mapping[str, Any]) -> list[Cell]:
  """The cells of a config (see configs/quickstart.py), task by task.

  A run that cannot be built becomes a cell with an error: the others go on.

  Raises:
    ValueError: the config does not hang together: a section with fields of a
      mechanism that is not compared, or a `match` that is not among them.
  """
  labels = list(config['mechanisms'])
  for task, section in config['tasks'].items():
    for label in section.get('mechanisms', {}):
      if label not in labels:
        raise ValueError(
          f'tasks.{task}.mechanisms has fields for {label!r}, which is not '
          f'compared.{did_you_mean(label, labels)}'
        )
  if config['match'] and config['match'] not in labels:
    raise ValueError(
      f'match={config["match"]!r} is not among the mechanisms compared.'
      f'{did_you_mean(config["match"], labels)}'
    )
  return [
    cell
    for task in config['tasks']
    for label in labels
    for cell in _cells(config, task, label)
  ]


def _cells(config, task: str, label: str) -> list[Cell]:
  """The rates and seeds of a mechanism on a task."""
  rates = config['tasks'][task].get('rates') or config['rates']
  cells = [
    Cell(task, label, rate, seed) for rate in rates for seed in config['seeds']
  ]
  try:
    hidden = _hidden(config, task, label)
    for i, cell in enumerate(cells):
      run = _run(config, task, label)
      run['model']['hidden'] = hidden
      run['optimizer']['schedule']['peak'] = cell.rate
      run['seed'] = run['task']['seed'] = cell.seed
      run = build.complete(run)
      cells[i] = dataclasses.replace(cell, config=run, about=_about(run))
  except ValueError as error:
    cells = [dataclasses.replace(cell, error=str(error)) for cell in cells]
  return cells


def _run(config, task: str, label: str) -> dict[str, Any]:
  """The run of a mechanism on a task, but for hidden, rate and seed."""
  section = config['tasks'][task]
  own = {k: v for k, v in section.items() if k not in SECTION}
  fields = _merged(
    config['mechanisms'][label], section.get('mechanisms', {}).get(label, {})
  )
  # A label of several words is a pattern over the layers, and its fields stand
  # below the names of its mechanisms.
  model = {
    'mixer': label,
    'mechanisms': fields if ' ' in label else {label: fields},
  }
  return _merged(_merged(config['run'], own), {'model': model})


def _merged(first: Mapping, second: Mapping) -> dict[str, Any]:
  """A copy of `first` with the entries of `second`, section by section."""
  both = {
    key: _merged(value, {}) if isinstance(value, Mapping) else value
    for key, value in first.items()
  }
  for key, value in second.items():
    if isinstance(value, Mapping):
      before = both.get(key)
      value = _merged(before if isinstance(before, Mapping) else {}, value)
    both[key] = value
  return both


def parameters(run: Mapping[str, Any]) -> int:
  """How many parameters a run's model has, counted without making any."""
  task, model = build.build(run)
  blank = build.blank(build.facts(task) | {'length': 1}, rows=1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), blank)['params']
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _hidden(config, task: str, label: str) -> int | None:
  """The width of the feed-forward at which the parameters match.

  They grow by the same number with every hidden unit, so two counts tell all.
  """
  first = config['match']
  run = _run(config, task, label)
  if not first or label == first:
    return run['model']['hidden']
  target = parameters(_run(config, task, first))

  def count(hidden):
    return parameters(_merged(run, {'model': {'hidden': hidden}}))

  one, two = count(1), count(2)
  hidden = 1 + round((target - one) / (two - one))
  off = abs(one + (hidden - 1) * (two - one) - target) / target
  if hidden < 1 or off > config['within']:
    raise ValueError(
      f'{label} has {one} parameters at hidden=1 and {two - one} more for each '
      f'further unit: it cannot match the {target} of {first} within '
      f'{config["within"]:.0%}; take a larger tasks.{task}.model.hidden'
    )
  return hidden


def _about(run: Mapping[str, Any]) -> dict[str, Any]:
  """What tables and figures say of a task."""
  task, _ = build.build(run)
  levels = {'chance': task.chance[task.headline]}
  if hasattr(task, 'chance_in_row'):
    levels['chance within a row'] = task.chance_in_row[task.headline]
  return {
    'headline': task.headline,
    'better': task.better,
    **build.facts(task),
    'test_rows': task.test_rows,
    'tested_rows': min(task.test_rows, run['batch'] * run['eval_batches']),
    'asked': task.asked,
    'levels': levels,
    'fingerprint': task.fingerprint(),
  }
