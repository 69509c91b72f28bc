"""What a grid of runs says: mean and spread over seeds, the best learning rate.

A record is one finished run, a dict as it stands in `results.jsonl`:

    task, mechanism, rate, seed      where in the grid it stands
    about: headline, better          the metric that counts, 'higher' or 'lower'
    metrics: {name: value}           of the final evaluation
    parameters, flops, state_bytes, steps_per_second, ...
    error                            instead of these if the run failed
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Score:
  """The headline at one learning rate.

  Attributes:
    mean: over the seeds that finished; NaN if none did.
    spread: their sample standard deviation; None for fewer than two.
    seeds: how many finished.
    failed: how many did not.
  """

  mean: float
  spread: float | None
  seeds: int
  failed: int = 0

  def text(self, digits: int = 3) -> str:
    """'0.912 ± 0.004', without the spread where there is none."""
    if math.isnan(self.mean):
      return 'failed'
    spread = '' if self.spread is None else f' ± {self.spread:.{digits}f}'
    return f'{self.mean:.{digits}f}{spread}'


@dataclasses.dataclass(frozen=True)
class Row:
  """A mechanism on a task, at its best learning rate.

  Attributes:
    task, mechanism: which.
    headline: the metric that counts.
    rate: the best learning rate for it.
    score: the headline at that rate.
    grid: learning rate -> score, all that were tried.
    records: the runs at that rate that finished.
    errors: the messages of all that failed, at any rate.
  """

  task: str
  mechanism: str
  headline: str
  rate: float
  score: Score
  grid: Mapping[float, Score]
  records: tuple[Mapping[str, Any], ...]
  errors: tuple[str, ...]

  def metric(self, name: str) -> Score | None:
    """Any metric at the best rate; None if the task does not measure it."""
    values = [r['metrics'][name] for r in self.records if name in r['metrics']]
    return _score(values) if values else None

  def mean(self, name: str) -> float:
    """A number of the record, such as 'parameters', over the seeds.

    NaN if a run was too short to measure it.
    """
    values = [record[name] for record in self.records]
    return math.nan if None in values else statistics.fmean(values)

  @property
  def about(self) -> Mapping[str, Any]:
    return self.records[0]['about']


def summarise(records: Iterable[Mapping[str, Any]]) -> list[Row]:
  """One row for each mechanism on each task, in the order they come in.

  The best rate is the one of the best mean, 'higher' or 'lower' as the task
  says. A rate at which more runs failed than at another cannot be the best: the
  mean over those that survived would flatter it.
  """
  cells: dict[tuple[str, str], list] = {}
  for record in records:
    cells.setdefault((record['task'], record['mechanism']), []).append(record)
  return [_row(runs) for runs in cells.values()]


def _row(runs: list[Mapping[str, Any]]) -> Row:
  done = [run for run in runs if not run.get('error')]
  about = done[0]['about'] if done else {}
  headline = about.get('headline', '')
  rates = list(dict.fromkeys(run['rate'] for run in runs))
  grid = {}
  for rate in rates:
    values = [r['metrics'][headline] for r in done if r['rate'] == rate]
    tried = sum(run['rate'] == rate for run in runs)
    grid[rate] = _score(values, failed=tried - len(values))
  fewest = min(score.failed for score in grid.values())
  sign = -1 if about.get('better') == 'lower' else 1
  best = max(
    (rate for rate in rates if grid[rate].failed == fewest),
    # a rate at which nothing finished has no mean to compare
    key=lambda rate: sign * grid[rate].mean if grid[rate].seeds else -math.inf,
  )
  return Row(
    task=runs[0]['task'],
    mechanism=runs[0]['mechanism'],
    headline=headline,
    rate=best,
    score=grid[best],
    grid=grid,
    records=tuple(run for run in done if run['rate'] == best),
    errors=tuple(run['error'] for run in runs if run.get('error')),
  )


def _score(values: list[float], failed: int = 0) -> Score:
  spread = statistics.stdev(values) if len(values) > 1 else None
  mean = statistics.fmean(values) if values else math.nan
  return Score(mean, spread, len(values), failed)
