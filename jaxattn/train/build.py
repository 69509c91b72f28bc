"""From a configuration to objects: the one place where names become things.

A run is one nested dict of plain values. `DEFAULTS` shows all of it; a caller
gives what differs, and `complete` fills in the rest.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from jaxattn.models.lm import LM
from jaxattn.nn import Policy
from jaxattn.registry import did_you_mean
from jaxattn.tasks import registry as tasks

DEFAULTS = {
  'seed': 0,
  'steps': 1000,
  'batch': 64,
  'task': {'name': 'mqar', 'preset': 'quick'},  # and the task's own fields
  'model': {'name': 'lm'},  # and the model's own fields
  'policy': {
    'dtype': 'float32',
    'param_dtype': 'float32',
    'dropout': 0.0,
    'implementation': None,
  },
  'optimizer': {
    'name': 'adamw',
    'schedule': {'name': 'warmup_cosine', 'peak': 3e-3},  # and its own fields
    'weight_decay': 0.1,
    'clip': 1.0,
    'options': {},
  },
  'accumulate': 1,
  'mesh': {'data': -1, 'seq': 1, 'model': 1, 'axis_types': 'explicit'},
  'log_every': 50,
  'eval_every': 500,
  'eval_batches': 4,
  'checkpoint_every': 500,
  'keep': 2,
}

# Sections whose keys depend on what they name: they are checked where that is
# built, and once they name something no default of something else gets in.
OPEN = ('task', 'model', 'optimizer.schedule', 'optimizer.options')

COUNTS = (
  'steps',
  'batch',
  'accumulate',
  'log_every',
  'eval_every',
  'eval_batches',
  'checkpoint_every',
  'keep',
)

MODELS = {'lm': LM}


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """A configuration with every default filled in, as JSON would give it back.

  Raises:
    ValueError: an unknown section or key (did you mean), or a value of the
      wrong kind.
  """
  try:
    config = json.loads(json.dumps(config))
  except TypeError as error:
    raise ValueError(f'a configuration holds plain values: {error}') from error
  config = _fill(DEFAULTS, config)
  for key in COUNTS:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(f'{key}={value!r} must be an integer of at least 1')
  return config


def build(config: Mapping[str, Any]) -> tuple[Any, nn.Module]:
  """The task and the model of a configuration.

  Raises:
    ValueError: anything in it that cannot work, with the reason.
  """
  config = complete(config)
  task = tasks.make(**config['task'])
  return task, model(config, task.vocab)


def model(config: Mapping[str, Any], vocab: int) -> nn.Module:
  """The model of a configuration, for a vocabulary of `vocab` ids."""
  config = complete(config)
  fields = dict(config['model'])
  name = fields.pop('name')
  if name not in MODELS:
    raise ValueError(f'no model {name!r}.{did_you_mean(name, MODELS)}')
  # `vocab` comes from the task, `policy` has a section of its own; `parent` and
  # `name` are Linen's.
  taken = ('vocab', 'policy', 'parent', 'name')
  known = {f.name for f in dataclasses.fields(MODELS[name])}.difference(taken)
  for field in fields:
    if field not in known:
      raise ValueError(
        f'model {name!r} has no field {field!r}.{did_you_mean(field, known)}'
      )
  policy = Policy(**config['policy'])
  return MODELS[name](vocab, policy=policy, **fields)


def _fill(defaults: Any, given: Any, path: str = '') -> Any:
  """`given` over `defaults`, section by section."""
  if not isinstance(defaults, dict):
    return given
  if not isinstance(given, dict):
    raise ValueError(f'{path} is a section, not {given!r}')
  named = path in OPEN and 'name' in given
  filled = {} if named else copy.deepcopy(defaults)
  for key, value in given.items():
    below = f'{path}.{key}' if path else key
    if path in OPEN:
      filled[key] = value
    elif key in defaults:
      filled[key] = _fill(defaults[key], value, below)
    else:
      where = f'section {path!r}' if path else 'the configuration'
      raise ValueError(f'{where} has no {key!r}.{did_you_mean(key, defaults)}')
  return filled
