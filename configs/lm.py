"""One language model: any mechanism or pattern of them, on any task.

  python -m experiments.train --workdir=runs/gla \\
      --config=configs/lm.py:gated_linear,size=small

Seen with seed 0 on two CPU cores, jax 0.10.2, Python 3.11.7 and its library, on
2026-11-23: 3 minutes 12 seconds, 3.2 steps a second, 1.99 bits per byte
(uniform: 8), accuracy 0.634.

After the colon stands the structure, in any order, divided by commas:

  a mechanism, or a pattern   gated_linear, or '3:1 sliding_window multi_head'
  size=tiny|small|base|large  width, depth, batch and steps
  task=bytes|mqar|...         what is learnt; bytes of Python's own library
  preset=quick|cpu|paper|...  of the task; by default what fits the size
  quick                       twenty steps of a tiny model, as a trial

Every scalar can then be set by name, such as --config.batch=16 or
--config.model.mechanisms.gated_linear.heads=8.
"""

import dataclasses
import types
import typing

from ml_collections import config_dict

from jaxattn import registry
from jaxattn.mixer import Mixer
from jaxattn.models import pattern
from jaxattn.models.lm import LM
from jaxattn.nn import Policy
from jaxattn.registry import did_you_mean
from jaxattn.tasks import registry as tasks

LINEN = ('parent', 'name')  # fields that every Linen module has

SIZES = {
  'tiny': {
    'width': 32,
    'depth': 2,
    'batch': 16,
    'steps': 200,
    'peak': 3e-3,
    'preset': 'quick',
  },
  'small': {
    'width': 128,
    'depth': 4,
    'batch': 16,
    'steps': 600,
    'peak': 3e-3,
    'preset': 'cpu',
  },
  'base': {
    'width': 512,
    'depth': 8,
    'batch': 64,
    'steps': 10_000,
    'peak': 1e-3,
    'preset': 'paper',
  },
  'large': {
    'width': 1024,
    'depth': 24,
    'batch': 128,
    'steps': 50_000,
    'peak': 5e-4,
    'preset': 'paper',
  },
}


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  """The configuration of a run; see the top of this file for `arg`."""
  choice = _parse(arg or '')
  size = SIZES[choice['size']]
  task = _task(choice['task'], choice['preset'] or size['preset'])
  rows = task.get('step_rows')  # a placeholder where the preset has none
  steps = 20 if choice['quick'] else size['steps']
  mixer = choice['mixer']
  layers = set(pattern.layers(mixer, size['depth']))
  own = {'width', 'depth', 'mixer', 'mechanisms', 'vocab', *LINEN, 'policy'}
  return config_dict.ConfigDict(
    {
      'seed': 0,
      'steps': steps,
      # A finite training set tells what batches it is made for.
      'batch': rows if isinstance(rows, int) else size['batch'],
      'task': task,
      'model': {
        'name': 'lm',
        'width': size['width'],
        'depth': size['depth'],
        'mixer': mixer,
        'mechanisms': {name: _mechanism(name) for name in sorted(layers)},
        **_fields(LM, without=own),
      },
      'policy': {
        'dtype': 'bfloat16'
        if choice['size'] in ('base', 'large')
        else 'float32',
        **_fields(Policy, without={'dtype', 'kernel_init'}),
      },
      'optimizer': {
        'name': 'adamw',
        'schedule': {
          'name': 'warmup_cosine',
          'peak': size['peak'],
          'warmup': 0.05,
          'end': 0.0,
        },
        'weight_decay': 0.1,
        'clip': 1.0,
        'options': {},
      },
      'accumulate': 1,
      'mesh': {'data': -1, 'seq': 1, 'model': 1, 'axis_types': 'explicit'},
      'layout': config_dict.placeholder(str),
      'log_every': max(steps // 40, 1),
      'eval_every': max(steps // 10, 1),
      'eval_batches': 8,
      'checkpoint_every': max(steps // 10, 1),
      'keep': 2,
    }
  )


def _parse(arg: str) -> dict[str, typing.Any]:
  """'gated_linear,size=small' in parts; ValueError for what is not known."""
  choice = {'task': 'bytes', 'preset': None}
  for word in filter(None, (word.strip() for word in arg.split(','))):
    key, equals, value = word.partition('=')
    if word == 'quick':
      choice['quick'] = True
    elif not equals and 'mixer' not in choice:
      choice['mixer'] = word
    elif not equals:
      raise ValueError(
        f'{arg!r} names two mechanisms, {choice["mixer"]!r} and {word!r}; a '
        "pattern has blanks between them: 'sliding_window multi_head'"
      )
    elif key in ('size', 'task', 'preset'):
      choice[key] = value
    else:
      raise ValueError(
        f'{word!r} is not known: write size=, task=, preset=, quick or the '
        'name of a mechanism; scalars are set by --config.section.key=value'
      )
  quick = choice.setdefault('quick', False)
  choice.setdefault('mixer', 'multi_head')
  choice.setdefault('size', 'tiny' if quick else 'small')
  if choice['size'] not in SIZES:
    raise ValueError(
      f'no size {choice["size"]!r}.{did_you_mean(choice["size"], SIZES)}'
    )
  return choice


def _mechanism(name: str) -> dict[str, typing.Any]:
  shared = {field.name for field in dataclasses.fields(Mixer)}
  return _fields(type(registry.make(name)), without=shared)


def _task(name: str, preset: str) -> dict[str, typing.Any]:
  """All fields of a task, as a preset sets them."""
  module = tasks.find(name)
  if preset not in module.PRESETS:
    raise ValueError(
      f'{name} has no preset {preset!r}.{did_you_mean(preset, module.PRESETS)}'
    )
  fields = dict(module.PRESETS[preset])
  title = name.rpartition('.')[2].replace('_', '')
  cls = next(c for n, c in vars(module).items() if n.lower() == title)
  others = _fields(cls, without=fields)
  return {'name': name, 'preset': preset, **fields, **others}


def _fields(cls: type, without: typing.Iterable[str]) -> dict[str, typing.Any]:
  """The fields of a dataclass, with their defaults.

  A default of None says nothing about the type that a flag has to parse: such
  a field becomes a placeholder of the type that its annotation names.
  """
  hints = typing.get_type_hints(cls)
  found = {}
  for field in dataclasses.fields(cls):
    default = field.default
    if field.name in without or default is dataclasses.MISSING:
      continue
    if default is None and isinstance(hints[field.name], types.UnionType):
      default = config_dict.placeholder(typing.get_args(hints[field.name])[0])
    found[field.name] = default
  return found
