"""Optimisers and schedules by name: whatever optax has, under its own names.

{'name': 'adamw', 'weight_decay': 0.1, 'clip': 1.0, 'options': {'b2': 0.95},
 'schedule': {'name': 'warmup_cosine', 'peak': 3e-3, 'warmup': 0.05}}
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
import optax.contrib

from jaxattn.registry import did_you_mean
from jaxattn.typing import PyTree

# The weights that multiply activations (`Linear`, `Embed`, `ShortConv`). Decay
# is for these: a decayed gain or bias only loses scale, and a decayed rate or
# step size of a recurrence forgets how far back it is to look. Names tell them
# apart and shapes do not: stacked layers make a matrix of every vector.
MATRICES = ('kernel', 'table')

# Its line search calls the loss itself, which a training step cannot offer.
UNFIT = ('lbfgs',)


def make(
  steps: int,
  name: str = 'adamw',
  schedule: Mapping[str, Any] | None = None,
  weight_decay: float = 0.0,
  clip: float | None = 1.0,
  options: Mapping[str, Any] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """An optimiser, and the learning rate that it follows.

  Args:
    steps: length of the run, which most schedules need.
    name: an optimiser of optax that takes a learning rate; those of
      `optax.contrib` as 'contrib.muon'. One that multiplies weights, as muon
      does, needs an 'auto' mesh where weights are split over devices.
    schedule: see `schedule_of`.
    weight_decay: decay of matrices; 0 for an optimiser that has none.
    clip: largest global norm of the gradient; None or 0 does not clip.
    options: further arguments of the optimiser.

  Raises:
    ValueError: an unknown name or option, with the nearest known one; a weight
      decay asked of an optimiser without.
  """
  known = _optimizers()
  if name not in known:
    raise ValueError(f'no optimizer {name!r}.{did_you_mean(name, known)}')
  optimizer, options = known[name], dict(options or {})
  takes = list(inspect.signature(optimizer).parameters)[1:]
  for option in options:
    if option not in takes:
      raise ValueError(
        f'optimizer {name!r} has no option {option!r}.'
        f'{did_you_mean(option, takes)}'
      )
  masks = {'mask', 'weight_decay_mask'}.intersection(takes)
  decays = {'weight_decay', 'weight_decay_rate'}.intersection(takes)
  if masks and decays:
    options = {masks.pop(): matrices, decays.pop(): weight_decay} | options
  elif weight_decay:
    raise ValueError(
      f'optimizer {name!r} has no masked weight decay, so weight_decay='
      f'{weight_decay} cannot be honoured: set it to 0, or use adamw or lion'
    )
  if clip is not None and clip < 0:
    raise ValueError(f'clip={clip} must be positive, or 0 for no clipping')
  rate = schedule_of(steps, **(schedule or {}))
  try:
    update = optimizer(rate, **options)
  except TypeError as error:  # an option that optax wants and nobody gave
    raise ValueError(f'optimizer {name!r}: {error}') from error
  if clip:
    update = optax.chain(optax.clip_by_global_norm(clip), update)
  return update, rate


def matrices(params: PyTree) -> PyTree:
  """True where weight decay applies: at kernels and tables."""
  is_matrix = lambda path, _: path[-1].key in MATRICES
  return jax.tree_util.tree_map_with_path(is_matrix, params)


def schedule_of(
  steps: int, name: str = 'constant', **fields: Any
) -> optax.Schedule:
  """A learning rate as a function of the step.

  Args:
    steps: length of the run.
    name: 'constant', 'linear', 'cosine' or 'warmup_cosine', which share the
      fields of `_shaped`; or any schedule of optax, with optax's arguments.
    **fields: of that schedule.

  Raises:
    ValueError: an unknown name or field, with the nearest known one.
  """
  known = {**_optax_schedules(), **SHAPES}
  if name not in known:
    raise ValueError(f'no schedule {name!r}.{did_you_mean(name, known)}')
  signature = inspect.signature(_shaped if name in SHAPES else known[name])
  takes = [p for p in signature.parameters if p not in ('steps', 'fall')]
  for field in fields:
    if field not in takes:
      raise ValueError(
        f'schedule {name!r} has no field {field!r}.{did_you_mean(field, takes)}'
      )
  if name in SHAPES:
    fall, defaults = SHAPES[name]
    return _shaped(steps, fall, **{**defaults, **fields})
  try:
    return known[name](**fields)
  except TypeError as error:  # a field that optax wants and nobody gave
    raise ValueError(f'schedule {name!r}: {error}') from error


def _shaped(
  steps: int,
  fall: Callable,
  peak: float = 3e-3,
  warmup: float = 0.0,
  end: float = 0.0,
) -> optax.Schedule:
  """Rises from 0 to `peak`, then falls to `end`.

  `warmup` is a share of the run; `end` is a share of the peak.
  """
  if peak <= 0 or not 0 <= warmup < 1 or end < 0:
    raise ValueError(
      f'peak={peak} must be positive, warmup={warmup} a share of the run in '
      f'[0, 1), end={end} a share of the peak, 0 or more'
    )
  rise = math.ceil(warmup * steps)
  after = fall(peak, max(steps - rise, 1), end)
  # The first step counts: an update at rate 0 would be wasted.
  up = optax.linear_schedule(peak / max(rise, 1), peak, max(rise - 1, 1))
  return optax.join_schedules([up, after], [rise]) if rise else after


SHAPES = {
  'constant': (lambda peak, steps, end: optax.constant_schedule(peak), {}),
  'linear': (
    lambda peak, steps, end: optax.linear_schedule(peak, peak * end, steps),
    {},
  ),
  'cosine': (optax.cosine_decay_schedule, {}),
  'warmup_cosine': (optax.cosine_decay_schedule, {'warmup': 0.05}),
}


def _optimizers() -> dict[str, Callable]:
  """What optax calls an optimiser: a function of a learning rate."""
  found = {}
  for prefix, place in (('', optax), ('contrib.', optax.contrib)):
    for name, value in inspect.getmembers(place, inspect.isfunction):
      first = next(iter(inspect.signature(value).parameters), None)
      private = name.startswith(('_', 'scale_by_'))
      if first == 'learning_rate' and not private and name not in UNFIT:
        found[prefix + name] = value
  return found


def _optax_schedules() -> dict[str, Callable]:
  """Schedules of plain numbers: without those made of other schedules."""
  found = inspect.getmembers(optax.schedules, inspect.isfunction)
  made_of_others = ('inject_', 'join_')
  return {n: f for n, f in found if not n.startswith(made_of_others)}
