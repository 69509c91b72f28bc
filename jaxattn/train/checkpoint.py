"""A run's folder: whose it is, and its states on disk.

    config.json       the whole configuration
    run.json          what the numbers depend on besides: the data, versions,
                      devices; and what `load` must know of the task
    checkpoints/N/    the state after N steps, by orbax: written in the
                      background, under another name until it is complete
    damaged/N/        checkpoints found broken, moved out of the way

A checkpoint carries a sum over the bits of each array, taken on the devices
before it was written and again after it is read: compressed chunks on disk have
no checksum of their own, and a flipped bit would go unnoticed.

With several processes the folder is one that all of them see. The first writes
config.json and run.json, each writes its part of a checkpoint, and what is
found here, of what is good or damaged, is found by all alike.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxattn.parallel import processes
from jaxattn.train import build, log
from jaxattn.train.step import TrainState
from jaxattn.typing import PyTree

CHECKPOINTS = 'checkpoints'
DAMAGED = 'damaged'

# A run may be resumed with other values of these: they change no number.
MAY_CHANGE = ('log_every', 'keep')

_log = logging.getLogger(__name__)


class Loaded(NamedTuple):
  """A trained model: `model.apply(params, inputs)`.

  Attributes:
    model: the module.
    params: all of its variables, as `model.apply` takes them.
    config: of the run, with every default filled in.
  """

  model: nn.Module
  params: PyTree
  config: dict[str, Any]


class Damaged(ValueError):
  """A checkpoint that cannot be read, or does not hold what was written."""


def claim(
  workdir: str | os.PathLike, config: dict[str, Any], task: Any
) -> list[str]:
  """Takes a folder for a run, or takes it up again.

  Args:
    workdir: a new folder, or that of the same run.
    config: as `build.complete` returns it.
    task: what the run trains on.

  Returns:
    Notes on what else has changed since the run began: versions and devices.

  Raises:
    ValueError: the folder belongs to another run, and nothing has been written;
      or this process was given another run than the first.
  """
  now = {
    'fingerprint': task.fingerprint(),
    **build.facts(task),
    'better': task.better,
    'versions': {'jax': jax.__version__, 'orbax': ocp.__version__},
    'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}',
  }
  first, notes = processes.agreed(
    lambda: [config | now, _claim(Path(workdir), config, now)]
  )
  if changed := _differences(first, config | now):
    listed = '; '.join(
      f'{key} is {here!r} here and {there!r} there'
      for key, (there, here) in changed.items()
    )
    raise ValueError(
      f'process {jax.process_index()} was given another run than the first: '
      f'{listed}. All need the same command, data and versions.'
    )
  return notes


def _claim(
  workdir: Path, config: dict[str, Any], now: dict[str, Any]
) -> list[str]:
  """`claim` by one process; `now` is what run.json shall say."""
  if not (workdir / 'config.json').exists():
    if (workdir / CHECKPOINTS).exists():
      raise ValueError(
        f'workdir {workdir} has checkpoints but no config.json, so nobody '
        'knows whose they are; choose another folder'
      )
    workdir.mkdir(parents=True, exist_ok=True)
    # In this order: where there is a config.json there is a run.json.
    for name, what in ('run.json', now), ('config.json', config):
      log.replace(workdir / name, json.dumps(what, indent=2) + '\n')
    return []

  changed = _differences(_read(workdir / 'config.json'), config)
  forbidden = [key for key in changed if key not in MAY_CHANGE]
  if forbidden:
    listed = '; '.join(
      f'{key} was {changed[key][0]!r} and is {changed[key][1]!r}'
      for key in forbidden
    )
    raise ValueError(
      f'workdir {workdir} belongs to another configuration: {listed}. Choose '
      f'another folder. Only {" and ".join(MAY_CHANGE)} may change in a run.'
    )
  then = _read(workdir / 'run.json')
  changed = _differences(then, now)
  if 'fingerprint' in changed:
    raise ValueError(
      f'workdir {workdir} was trained on other data: the fingerprint of '
      f'{config["task"]["name"]} was {then["fingerprint"]} and is '
      f'{now["fingerprint"]}. Choose another folder, or restore the data.'
    )
  notes = [
    f'{key} was {old} when the run began and is {new}: what follows may '
    'differ in the last bits'
    for key, (old, new) in changed.items()
  ]
  for note in notes:
    _log.warning('%s: %s', workdir, note)
  return notes


class Store:
  """The checkpoints of a run, open for writing. Close it: saves run behind.

  Attributes:
    notes: what was wrong with the checkpoints found, for people to read.
  """

  def __init__(
    self, workdir: str | os.PathLike, *, keep: int = 2, better: str = 'lower'
  ):
    """Opens the checkpoints of a folder.

    Args:
      workdir: of the run.
      keep: how many of the newest to keep; the best is kept besides.
      better: 'lower' or 'higher', which headline is best.
    """
    self.notes = []
    self._workdir = Path(workdir).absolute()
    self._keep, self._better = keep, better
    folder = self._workdir / CHECKPOINTS
    entries = sorted(folder.iterdir()) if folder.exists() else []
    found = [entry.name for entry in entries if entry.is_dir()]
    self._manager = _manager(
      self._workdir,
      preservation_policy=self,  # orbax asks `should_preserve`
      cleanup_tmp_directories=True,
    )
    self._reader = _reader(self._workdir)
    complete = self._manager.all_steps()
    for name in found:
      if name not in map(str, complete):
        self._note(f'checkpoint {name} was never completed: it is left out')
    self._headlines = _headlines(self._reader, complete)

  def save(
    self, step: int, state: TrainState, headline: float | None = None
  ) -> None:
    """Begins to write a state; returns once the state may be used up.

    Args:
      step: the number of updates made.
      state: what to keep.
      headline: the score by which the best checkpoint is chosen.
    """
    finite = headline is not None and math.isfinite(headline)
    self._headlines[step] = headline if finite else None
    items = {name: _flat(part) for name, part in _parts(state).items()}
    about = {'headline': self._headlines[step], 'sums': _sums(items)}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        about=ocp.args.JsonSave(about),
        **{name: ocp.args.StandardSave(item) for name, item in items.items()},
      ),
    )

  def newest(self, shapes: TrainState) -> TrainState | None:
    """The newest good state, or None if there has never been one.

    Checkpoints that turn out damaged are moved to `damaged/`, and `notes` says
    so. If all of them are damaged they stay where they are.

    Args:
      shapes: shapes and shardings of the state, `Programs.shapes`.

    Raises:
      ValueError: there are checkpoints and none of them is good.
    """
    self._manager.wait_until_finished()
    damaged = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        parts = _restore(self._reader, step, _parts(shapes), processes.worst)
      except Damaged as error:
        damaged.append(step)
        self._note(f'checkpoint {step} is damaged: {error}')
        continue
      if damaged:
        processes.agreed(lambda: self._set_aside(damaged))
        self._manager.reload()
      return TrainState(**parts['variables'], **parts['training'])
    if damaged:
      raise _all_damaged(self._workdir, self.notes)
    return None

  def latest(self) -> int | None:
    """The step of the newest checkpoint; None if there is none."""
    self._manager.wait_until_finished()
    return max(self._manager.all_steps(), default=None)

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any = None
  ) -> list[bool]:
    """Which checkpoints stay: the newest `keep`, and the best."""
    steps = [info.step for info in checkpoints]
    best = _best_first(steps, self._headlines, self._better)[:1]
    stay = {*sorted(steps)[-self._keep :], *best}
    return [step in stay for step in steps]

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.close()
    self._reader.close()

  def _set_aside(self, damaged: list[int]) -> None:
    for step in damaged:
      aside = self._workdir / DAMAGED / str(step)
      while aside.exists():
        aside = aside.with_name(aside.name + '+')
      aside.parent.mkdir(exist_ok=True)
      os.rename(self._workdir / CHECKPOINTS / str(step), aside)

  def _note(self, text: str) -> None:
    self.notes.append(text)
    if processes.first():
      _log.warning('%s: %s', self._workdir, text)


def load(workdir: str | os.PathLike) -> Loaded:
  """A trained model from its folder: the best checkpoint that is good.

  Arrays come to one device, whatever mesh they were trained on; the data that
  they were trained on need not be there.

  Raises:
    ValueError: it is not the folder of a run, or it has no good checkpoint.
  """
  workdir = Path(workdir).absolute()
  if not (workdir / 'config.json').exists():
    raise ValueError(f'{workdir} is not the folder of a run: no config.json')
  config, run = _read(workdir / 'config.json'), _read(workdir / 'run.json')
  if not (workdir / CHECKPOINTS).exists():
    raise ValueError(f'{workdir} has no checkpoint yet')
  model = build.model(config, run)
  blank = build.blank(run, rows=1)
  variables = jax.eval_shape(model.init, jax.random.key(0), blank)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
    {'params': variables['params'], 'stats': variables.get('stats', {})},
  )
  notes = []
  manager = _reader(workdir)
  try:
    steps = manager.all_steps()
    order = _best_first(steps, _headlines(manager, steps), run['better'])
    for step in order:
      try:
        parts = _restore(manager, step, {'variables': shapes})
        return Loaded(model, parts['variables'], config)
      except Damaged as error:
        notes.append(f'checkpoint {step} is damaged: {error}')
        _log.warning('%s: %s', workdir, notes[-1])
  finally:
    manager.close()
  if not notes:
    raise ValueError(f'{workdir} has no checkpoint yet')
  raise _all_damaged(workdir, notes)


def _manager(workdir: Path, **options) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    workdir / CHECKPOINTS,
    options=ocp.CheckpointManagerOptions(**options),
    item_handlers={
      'about': ocp.JsonCheckpointHandler(),
      'variables': ocp.StandardCheckpointHandler(),
      'training': ocp.StandardCheckpointHandler(),
    },
  )


def _reader(workdir: Path) -> ocp.CheckpointManager:
  """With this each process reads on its own.

  With the other, those that could read their part would wait inside of orbax
  for one that could not.
  """
  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me)
  )
  return _manager(workdir, create=False, multiprocessing_options=alone)


def _parts(state: TrainState) -> dict[str, PyTree]:
  """A state as a checkpoint keeps it: what `load` reads, and the rest."""
  training = {
    'step': state.step,
    'opt_state': state.opt_state,
    'stopped_at': state.stopped_at,
  }
  return {'variables': state.variables(), 'training': training}


def _restore(
  manager: ocp.CheckpointManager,
  step: int,
  parts: dict[str, PyTree],
  worst: Callable[[str | None], str | None] = lambda error: error,
) -> dict[str, PyTree]:
  """The parts of a checkpoint, in the shapes given. Raises Damaged.

  `worst` turns what was wrong here into what was wrong anywhere.
  """
  flat = {name: _flat(shapes) for name, shapes in parts.items()}
  args = {
    name: ocp.args.StandardRestore(shapes) for name, shapes in flat.items()
  }
  wrong = cause = None
  try:
    found = manager.restore(
      step,
      args=ocp.args.Composite(about=ocp.args.JsonRestore(), **args),
    )
    arrays = {name: found[name] for name in parts}
  except Exception as error:  # orbax and tensorstore raise what they meet
    reason = str(error).partition('\n')[0][:200]
    wrong, cause = f'{type(error).__name__}: {reason}', error
  if wrong := worst(wrong):
    raise Damaged(wrong) from cause
  sums = _sums(arrays)
  for name, shapes in flat.items():
    for leaf in shapes:
      if sums[name][leaf] != found['about']['sums'][name].get(leaf):
        raise Damaged(f'the bits of {leaf} are not those that were written')
  fill = lambda shapes, leaves: jax.tree.unflatten(
    jax.tree.structure(shapes), [leaves[name] for name in _flat(shapes)]
  )
  return {name: fill(shapes, found[name]) for name, shapes in parts.items()}


def _headlines(
  manager: ocp.CheckpointManager, steps: Iterable[int]
) -> dict[int, float | None]:
  """Scores of checkpoints; None where there is none to be read."""
  scores = {}
  for step in steps:
    try:
      about = manager.restore(
        step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
      )['about']
      scores[step] = about['headline']
    except Exception:  # damaged: whoever restores it will say how
      scores[step] = None
  return scores


def _best_first(
  steps: Iterable[int], headlines: dict[int, float | None], better: str
) -> list[int]:
  """Steps by score, the newer of equals first; those without come last."""
  sign = {'lower': 1, 'higher': -1}[better]

  def rank(step):
    score = headlines.get(step)
    return (score is None, sign * (score or 0), -step)

  return sorted(steps, key=rank)


def _flat(tree: PyTree) -> dict[str, Any]:
  """Leaves by name, 'params.embed.table'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='.')
  return {name(path): leaf for path, leaf in leaves}


def _sums(items: PyTree) -> PyTree:
  """A sum over the bits of each array, the same on any mesh."""
  return jax.tree.map(int, jax.device_get(_sum_bits(items)))


@jax.jit
def _sum_bits(arrays):
  def sum_bits(a):
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
      return sum_bits(a.real) + 3 * sum_bits(a.imag)
    if a.dtype == bool:
      a = a.astype(jnp.uint8)
    word = f'uint{8 * min(a.dtype.itemsize, 4)}'
    bits = jax.lax.bitcast_convert_type(a, word)
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

  return jax.tree.map(sum_bits, arrays)


def _differences(
  old: Any, new: Any, path: str = ''
) -> dict[str, tuple[Any, Any]]:
  """'section.key' -> (old, new), wherever two configurations differ."""
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return {} if old == new else {path: (old, new)}
  found = {}
  for key in sorted({*old, *new}):
    below = f'{path}.{key}' if path else key
    found |= _differences(old.get(key), new.get(key), below)
  return found


def _read(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(f'{path} cannot be read: {error}') from error


def _all_damaged(workdir: Path, notes: list[str]) -> ValueError:
  return ValueError(
    f'no checkpoint in {workdir / CHECKPOINTS} can be used: '
    f'{"; ".join(notes)}. Nothing was changed. To train anew, choose another '
    'folder.'
  )
