"""One long sequence over many devices: a model to train, and models to plan.

Train the small one, here with 8 simulated devices:

  python -m experiments.pod.local --processes=1 --devices=8 -- \\
      --config=configs/long_context.py:ring --workdir=runs/long

or plan a large one for chips that are not there:

  python -m experiments.plan --config=configs/long_context.py:size=7b \\
      --topology=v5e:16x16 --length=1048576

After the colon stands, in any order and divided by commas:

  ring | striped | zigzag | ulysses | hybrid | gather
              how devices work together (`striped` and `zigzag` are rings of
              tokens in that layout, `hybrid` is Ulysses within a ring); left
              out, both are chosen
  linear      three layers of gated linear attention to one of softmax
  size=small|3b|7b|13b|30b
              `small` reads bytes of Python's own library, 1,024 at a time; the
              others have the shapes of LLaMA (Touvron et al. 2023,
              https://arxiv.org/abs/2302.13971; 3b that of Llama 3.2), with a
              key head for each query head, one table for embedding and logits,
              and length 1,048,576
  quick       twenty steps of a tiny model, as a trial: a minute on two cores,
              in which the loss in training falls from 5.99 to 4.51
"""

from ml_collections import config_dict

from jaxattn.registry import did_you_mean

# name -> (policy.strategy, layout)
WAYS = {
  'chosen': (None, None),
  'ring': ('ring', 'contiguous'),
  'striped': ('ring', 'striped'),
  'zigzag': ('ring', 'zigzag'),
  'ulysses': ('ulysses', None),
  'hybrid': ('hybrid', None),
  'gather': ('gather', None),
}
# width, depth, heads, hidden
SIZES = {
  'quick': (64, 4, 8, 128),
  'small': (128, 4, 8, 352),
  '3b': (3072, 28, 24, 8192),
  '7b': (4096, 32, 32, 11008),
  '13b': (5120, 40, 40, 13824),
  '30b': (6656, 60, 52, 17920),
}


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  """The configuration of a run; see the top of this file for `arg`."""
  words = [word.strip() for word in (arg or '').split(',') if word.strip()]
  way, size, linear = 'chosen', 'small', False
  for word in words:
    if word in WAYS:
      way = word
    elif word == 'linear':
      linear = True
    elif word == 'quick':
      size = word
    elif word.removeprefix('size=') in SIZES:
      size = word.removeprefix('size=')
    else:
      known = [*WAYS, 'linear', 'quick', *(f'size={name}' for name in SIZES)]
      raise ValueError(
        f'{word!r} is not known.{did_you_mean(word, known)} Known are'
        f' {", ".join(known)}'
      )
  strategy, layout = WAYS[way]
  width, depth, heads, hidden = SIZES[size]
  trained = size in ('quick', 'small')
  steps = {'quick': 20, 'small': 400}.get(size, 10_000)
  config = config_dict.ConfigDict(
    {
      'seed': 0,
      'steps': steps,
      'batch': 4 if trained else 1,
      'task': {'name': 'bytes', 'preset': 'quick', 'length': 1024}
      if trained
      else {'name': 'mqar', 'preset': 'quick', 'vocab': 32000},
      'model': {
        'name': 'lm',
        'width': width,
        'depth': depth,
        'hidden': hidden,
        'mixer': '3:1 gated_linear multi_head' if linear else 'multi_head',
        'mechanisms': {
          'multi_head': {'heads': heads, 'position': 'rope'},
        },
        'remat': True,
        # Of the 32, 128, or 4,096 tokens that a device may have.
        'block': {'quick': 8, 'small': 32}.get(size, 2048),
      },
      'policy': {
        'dtype': 'float32',
        'param_dtype': 'float32',
        'dropout': 0.0,
        'implementation': config_dict.placeholder(str),
        'strategy': strategy or config_dict.placeholder(str),
      },
      'optimizer': {
        'name': 'adamw',
        'schedule': {
          'name': 'warmup_cosine',
          'peak': 5e-4 if size == 'quick' else 1e-3,
          'warmup': 0.5 if size == 'quick' else 0.05,
        },
        'weight_decay': 0.1,
        'clip': 1.0,
        'options': {'b2': 0.95},
      },
      'accumulate': 1,
      'mesh': {'data': 1, 'seq': -1, 'model': 1, 'axis_types': 'explicit'},
      'layout': layout or config_dict.placeholder(str),
      'log_every': max(steps // 20, 1),
      'eval_every': max(steps // 4, 1),
      'eval_batches': 8,
      'checkpoint_every': max(steps // 4, 1),
      'keep': 2,
    }
  )
  if linear:
    config.model.mechanisms.gated_linear = {'heads': heads // 4}
  if not trained:
    config.task.length = 2**20
  elif size == 'quick':
    config.task.length = 256
    config.task.test_rows = 32
  return config
