"""The training loop: what happens when, and what is written where."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import processes
from jaxattn.train import build, checkpoint, log, optimizer, step

# How many steps the host may be ahead of the devices: enough to hide its own
# work, and few enough that their batches fit.
AHEAD = 16

Progress = Callable[[int, int, dict[str, Any]], None]


def fit(
  config: Mapping[str, Any],
  workdir: str | os.PathLike,
  *,
  progress: Progress | None = None,
) -> dict[str, Any]:
  """Trains to the end, from wherever the run of this folder has come to.

  On the same devices and versions a run that was stopped, by whatever means,
  ends with the same bits as one that was not, weights and metrics alike.

  Several processes (`jax.distributed`) all call this, and all return the same.
  The folder is one that all of them see; the first writes what stands there
  beside the checkpoints, which all write together.

  Args:
    config: see `build.DEFAULTS`; what is left out has its default.
    workdir: the run's folder, new or begun. A finished run returns at once.
    progress: called with (step, steps, numbers) whenever training is recorded,
      in every process; numbers has the record's 'loss', 'grad_norm',
      'learning_rate', 'steps_per_second' and 'seconds', and 'headline', the
      task's headline score at the last evaluation. Some are None at first.

  Returns:
    A dict of 'step'; 'metrics', the last evaluation; 'best', the best one and
    its 'step'; 'train_loss'; 'parameters'; 'flops' of a forward pass over one
    sequence; 'state_bytes' of decoding one sequence of the task's length;
    'steps_per_second', the median over records, without compilation (None where
    no record has one); 'seconds'; and 'notes', what happened to the run that a
    reader of its numbers should know.

  Raises:
    ValueError: the configuration cannot work; the folder belongs to another
      run; none of its checkpoints is good.
    FloatingPointError: a loss, gradient or update was not finite. The message
      names the step and the last good checkpoint, which stays.
  """
  config = build.complete(config)
  task, model = build.build(config)
  mesh = meshes.make(**config['mesh'])
  feed = step.Feed.of(config, task, model, mesh)
  update, rate = optimizer.make(config['steps'], **config['optimizer'])
  workdir = Path(workdir)
  notes = checkpoint.claim(workdir, config, task)
  finished = workdir / 'result.json'
  result = processes.agreed(lambda: _finished(finished))
  if result:
    return result

  with jax.set_mesh(mesh):
    programs = step.programs(model, feed, update, rate, seed=config['seed'])
    store = checkpoint.Store(workdir, keep=config['keep'], better=task.better)
    try:
      state = store.newest(programs.shapes)
      if state is None:
        state = programs.init()
      records = _train(config, feed, programs, state, store, workdir, progress)
    finally:
      store.close()

  def finish():
    weights = jax.tree.leaves(programs.shapes.params)
    result = {
      **_summary(records, task),
      'parameters': sum(w.size for w in weights),
      'flops': model.flops(task.length),
      'state_bytes': model.state_bytes(task.length),
      'notes': notes + store.notes,
    }
    log.replace(finished, json.dumps(result, indent=2) + '\n')
    return result

  return processes.agreed(finish)


def _finished(path: Path) -> dict[str, Any] | None:
  return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def _train(
  config: dict[str, Any],
  feed: step.Feed,
  programs: step.Programs,
  state: step.TrainState,
  store: checkpoint.Store,
  workdir: Path,
  progress: Progress | None,
) -> list[dict[str, Any]]:
  """Takes a state to the last step, and returns all records of the run."""
  start, steps = int(state.step), config['steps']
  path = workdir / 'metrics.jsonl'
  records = processes.agreed(lambda: _resumed(path, start))
  earlier = records[-1]['seconds'] if records else 0.0
  began = time.perf_counter()
  window, headline = _Window(), None

  def record(kind, numbers):
    seconds = round(earlier + time.perf_counter() - began, 3)
    line = {'step': done, 'kind': kind, **numbers, 'seconds': seconds}
    # All keep them, for who reads `progress`; the first one's are the run's.
    records.append(log.append(path, line) if processes.first() else line)

  due = lambda key: done % config[key] == 0 or done == steps
  for done in range(start + 1, steps + 1):
    state, metrics = programs.train(state, feed.train(done - 1))
    window.add(metrics)
    saves = due('checkpoint_every')
    scores = saves or due('eval_every')
    # A window ends wherever a run may resume, so that a resumed run has the
    # same windows.
    if scores or due('log_every'):
      numbers, stopped_at = window.read()
      if stopped_at >= 0:
        raise _not_finite(stopped_at, numbers, store)
      record('train', numbers)
      if progress:
        progress(done, steps, {**records[-1], 'headline': headline})
    if scores:
      metrics = _evaluate(config, feed, programs, state)
      headline = metrics[feed.task.headline]
      record('eval', metrics)
    if saves:
      if processes.first():
        log.sync(path)  # a checkpoint always has its records
      store.save(done, state, headline)
    if scores:
      window.restart()
  return records


def _resumed(path: Path, start: int) -> list[dict[str, Any]]:
  """The records of the first `start` steps, and no others left in the file."""
  # What was recorded after this state was saved will be recorded again.
  records = [r for r in log.read(path) if r['step'] <= start]
  if start and not records:
    raise ValueError(
      f'{path} has no records, but there is a checkpoint after {start} steps: '
      'put it back, or choose another folder'
    )
  log.rewrite(path, records)
  return records


class _Window:
  """The steps since the last record, as they were dispatched.

  Nobody waits for a step until its window is read, but for two cases: the
  first, which compiles and is kept off the clock, and those that the host is
  AHEAD steps ahead of.
  """

  def __init__(self):
    self._metrics, self._timed, self._clock = [], 0, None

  def add(self, metrics: dict[str, Any]) -> None:
    self._metrics.append(metrics)
    if self._clock is None:
      jax.block_until_ready(metrics)
      self.restart()
      return
    self._timed += 1
    if len(self._metrics) > AHEAD:
      jax.block_until_ready(self._metrics[-1 - AHEAD])

  def restart(self) -> None:
    """Leaves what was done since the last record off the clock."""
    self._timed, self._clock = 0, time.perf_counter()

  def read(self) -> tuple[dict[str, Any], int]:
    """The numbers of the window, and `stopped_at`; begins the next one."""
    rows = jax.device_get(self._metrics)
    passed = time.perf_counter() - self._clock
    rate = self._timed / passed if self._timed else None
    total = sum(float(row['loss'][0]) for row in rows)
    count = sum(float(row['loss'][1]) for row in rows)
    last = rows[-1]
    self._metrics = []
    self.restart()
    numbers = {
      'loss': total / count if count else math.nan,
      'grad_norm': float(last['grad_norm']),
      'learning_rate': float(last['learning_rate']),
      'steps_per_second': rate and round(rate, 4),
    }
    return numbers, int(last['stopped_at'])


def _evaluate(
  config: dict[str, Any],
  feed: step.Feed,
  programs: step.Programs,
  state: step.TrainState,
) -> dict[str, float]:
  """Scores on the first `eval_batches` batches of the test set."""
  pairs = jax.device_get(
    [
      programs.evaluate(state.variables(), feed.test(number))
      for number in range(feed.tests(config['eval_batches']))
    ]
  )
  scores = {}
  for name in pairs[0]:
    total = sum(float(part[name][0]) for part in pairs)
    count = sum(float(part[name][1]) for part in pairs)
    scores[name] = total / count if count else math.nan
  return scores


def _not_finite(
  stopped_at: int, numbers: dict[str, Any], store: checkpoint.Store
) -> FloatingPointError:
  latest = store.latest()
  kept = (
    'no checkpoint had been written yet'
    if latest is None
    else f'the last good checkpoint, after {latest} steps, is kept'
  )
  return FloatingPointError(
    f'step {stopped_at} was not finite, in its loss, gradient or update: the '
    f'{stopped_at} updates before it were good, and none was made since; '
    f'{kept}. A lower learning rate, a longer warm-up or clip may help '
    f'(learning_rate={numbers["learning_rate"]:.3g}).'
  )


def _summary(records: list[dict[str, Any]], task: Any) -> dict[str, Any]:
  """What the records of a finished run come to."""
  training = [r for r in records if r['kind'] == 'train']
  evaluations = [r for r in records if r['kind'] == 'eval']
  sign = {'lower': 1, 'higher': -1}[task.better]

  def rank(record):  # a headline that is not finite is None on disk
    score = record[task.headline]
    return (score is None, sign * (score or 0))

  scores = lambda record: {
    key: value
    for key, value in record.items()
    if key not in ('step', 'kind', 'seconds')
  }
  best = min(evaluations, key=rank)
  rates = [r['steps_per_second'] for r in training if r['steps_per_second']]
  return {
    'step': records[-1]['step'],
    'metrics': scores(evaluations[-1]),
    'best': {'step': best['step'], **scores(best)},
    'train_loss': training[-1]['loss'],
    'steps_per_second': statistics.median(rates) if rates else None,
    'seconds': records[-1]['seconds'],
  }
