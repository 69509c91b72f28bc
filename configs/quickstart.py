"""Five mechanisms on recall and on real text, at equal parameter counts.

  python -m experiments.ablate --config=configs/quickstart.py

Takes 5 to 6 minutes on two CPU cores; `:quick` (a few steps of everything, to
see that all works) about one. What to expect, as printed by the command above
(2026-11-23; jax 0.10.2, flax 0.12.8, Python 3.11; two cores of an AMD EPYC):

  mechanism       accuracy (mqar)   bits per byte (bytes)
  multi_head                0.998                   2.698
  sliding_window            0.548                   2.648
  gated_linear              0.999                   2.679
  delta_net                 1.000                   2.786
  s4d                       0.249                   2.824
  chance                    0.062
  xz -9                                             2.880
  5-gram                                            1.894
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
  """The ablation; `arg` is '' or 'quick'."""
  if arg not in ('', 'quick'):
    raise ValueError(f"the argument {arg!r} must be 'quick', or left out")
  quick = arg == 'quick'
  config = ConfigDict()
  config.name = 'quickstart-quick' if quick else 'quickstart'
  config.seeds = (0,)
  config.rates = (3e-3,)  # learning rates at their peak

  # What is compared, each with its fields; see `jaxattn.make`. The others get
  # as many parameters as the one that `match` names, by `model.hidden`.
  config.mechanisms = in_order(
    multi_head={'heads': 2},
    sliding_window={'heads': 2, 'window': 16},
    gated_linear={'heads': 2, 'conv_taps': 4, 'key_share': 1.0},
    delta_net={'heads': 2},
    s4d={},
  )
  config.match = 'multi_head'
  config.within = 0.05

  # What all runs share ...
  config.run = {
    'model': {'name': 'lm', 'width': 64, 'depth': 2, 'remat': False},
    'policy': {'dtype': 'float32', 'param_dtype': 'float32', 'dropout': 0.0},
    'optimizer': {
      'name': 'adamw',
      'schedule': {'name': 'warmup_cosine', 'warmup': 0.05},
      'weight_decay': 0.1,
      'clip': 1.0,
      'options': {},
    },
    'accumulate': 1,
    'mesh': {'data': -1, 'seq': 1, 'model': 1, 'axis_types': 'explicit'},
    'keep': 2,
  }

  # ... and what each task has of its own: any of the above, which it replaces;
  # its `rates`; and `mechanisms`, for fields that one has on this task only.
  config.tasks = in_order(
    mqar={
      'task': {'name': 'mqar', 'preset': 'quick', 'pairs': 4},
      'model': {'hidden': 128},
      'rates': (3e-3,),
      'mechanisms': {},
      'batch': 64,
      'steps': 400,
      'log_every': 20,
      'eval_every': 400,
      'eval_batches': 1000,  # at most: the whole test set
      'checkpoint_every': 100,
    },
    bytes={
      'task': {'name': 'bytes', 'preset': 'quick'},
      'model': {'hidden': 192},
      'rates': (3e-3,),
      'mechanisms': {'sliding_window': {'window': 32}},
      'batch': 32,
      'steps': 300,
      'log_every': 10,
      'eval_every': 300,
      'eval_batches': 1000,
      'checkpoint_every': 100,
    },
  )
  if quick:
    for task in config.tasks.values():
      task.update(batch=8, steps=20, log_every=10)
      task.update(eval_every=20, checkpoint_every=20)
      task.task.test_rows = 32
  return config


def in_order(**sections) -> ConfigDict:
  """Sections that tables and figures show in this order."""
  return ConfigDict(sections, sort_keys=False)
