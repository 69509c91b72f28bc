"""The library as a whole, beside what it is measured against; see `bench`."""

import functools
import importlib.metadata
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

from jaxattn import registry
from jaxattn.analysis.table import markdown
from jaxattn.models.lm import LM
from jaxattn.tasks.batch import nats
from pallas_kernels import flash, masks
from pallas_kernels.blocks import Blocks
from pallas_kernels.masks import Causal, Everything, Sinks, Window

Contender = Callable[[], Any]


def take_turns(
  contenders: Mapping[str, Contender], turns: int, said: str
) -> dict[str, list[float]]:
  """Seconds of each contender in each turn, the first call left out."""
  for call in contenders.values():
    jax.block_until_ready(call())
  seconds: dict[str, list[float]] = {name: [] for name in contenders}
  for _ in track(range(turns), said, console=Console(stderr=True)):
    for name, call in contenders.items():
      began = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - began)
  return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
  """The median of over / under, turn by turn."""
  return statistics.median(a / b for a, b in zip(over, under))


# -------------------------------------------------------------------------- lm

VOCAB, WIDTH, DEPTH, HEADS, HIDDEN, ROWS, LENGTH = 256, 128, 4, 4, 384, 8, 256


class PlainBlock(nn.Module):
  """A layer as one writes it with flax alone."""

  @nn.compact
  def __call__(self, x):
    y = nn.RMSNorm()(x)
    mask = nn.make_causal_mask(y[..., 0])
    x = x + nn.MultiHeadDotProductAttention(HEADS, use_bias=False)(y, mask=mask)
    y = nn.RMSNorm()(x)
    dense = lambda to: nn.Dense(to, use_bias=False)
    return x + dense(WIDTH)(nn.silu(dense(HIDDEN)(y)) * dense(HIDDEN)(y))


class Plain(nn.Module):
  """The language model as one writes it with flax alone."""

  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(VOCAB, WIDTH)
    x = embed(ids)
    for _ in range(DEPTH):
      x = PlainBlock()(x)
    return embed.attend(nn.RMSNorm()(x))


def training(model: nn.Module, logits: Callable) -> Contender:
  """Steps of training `model`, each from where the one before ended."""
  rng = np.random.default_rng(0)
  ids = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH + 1)))
  params = jax.jit(model.init)(jax.random.key(0), ids[:, :-1])
  optimizer = optax.adamw(1e-3)

  def step(params, state):
    loss = lambda p: nats(
      logits(model.apply(p, ids[:, :-1])), ids[:, 1:]
    ).mean()
    grads = jax.grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  now = [params, optimizer.init(params)]

  def call():
    now[:] = step(*now)
    return now[0]

  return call


def lm(args) -> list[str]:
  """Step rates of the two models."""
  fields = {'multi_head': {'heads': HEADS, 'position': 'none'}}
  ours = LM(VOCAB, WIDTH, DEPTH, mechanisms=fields, hidden=HIDDEN)
  sizes = [
    sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))
    for shapes in (
      jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), int))
      for model in (ours, Plain())
    )
  ]
  if sizes[0] != sizes[1]:
    raise AssertionError(f'the models differ: {sizes} parameters')
  seconds = take_turns(
    {
      'jaxattn': training(ours, lambda out: out.logits),
      'flax': training(Plain(), lambda out: out),
    },
    args.turns or 40,
    'lm',
  )
  rate = {name: 1 / statistics.median(took) for name, took in seconds.items()}
  rows = [
    [name, f'{rate[name]:.2f}', f'{ratio(seconds["flax"], took):.2f}']
    for name, took in seconds.items()
  ]
  return [
    '# A softmax language model, trained',
    f'{sizes[0]:,} parameters: width {WIDTH}, {DEPTH} layers, {HEADS} heads, '
    f'no positions; {ROWS} rows of {LENGTH} tokens, AdamW, float32. The same '
    'model through `jaxattn.models.lm.LM` and written plainly with '
    '`flax.linen.MultiHeadDotProductAttention`.',
    markdown(['model', 'steps/s', 'step rate over plain flax'], rows),
  ]


# --------------------------------------------------------------------- softmax


def torch_attention(q, k, v, w) -> Contender:
  """Forward and backward of torch's attention on the same numbers."""
  import torch

  to = lambda x: torch.from_numpy(np.array(jnp.swapaxes(x, 1, 2)))
  q, k, v = (to(x).requires_grad_() for x in (q, k, v))
  w = to(w)

  def call():
    o = torch.nn.functional.scaled_dot_product_attention(
      q, k, v, is_causal=True
    )
    return [g.numpy() for g in torch.autograd.grad(torch.sum(o * w), (q, k, v))]

  return call


def attention(args) -> list[str]:
  """Blockwise causal attention beside dense forms, and torch's."""
  t, h, d = args.length, args.heads, 64
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, w = (jax.random.normal(key, (1, t, h, d)) for key in keys)
  causal = functools.partial(flash.attention, mask=Causal())
  forms = {
    'xla': functools.partial(causal, implementation='xla'),
    'plain': functools.partial(causal, implementation='plain'),
    'dense': functools.partial(
      causal, implementation='plain', blocks=Blocks(2**30, 2**30)
    ),
    'jax.nn.dot_product_attention': functools.partial(
      jax.nn.dot_product_attention, is_causal=True
    ),
  }

  def compiled_for(form, t, gradient):
    x = jax.ShapeDtypeStruct((1, t, h, d), jnp.float32)
    loss = lambda q, k, v, w: jnp.sum(form(q, k, v) * w)
    program = jax.value_and_grad(loss, (0, 1, 2)) if gradient else form
    return jax.jit(program).lower(*[x] * (4 if gradient else 3)).compile()

  programs = {}
  for name, form in forms.items():
    program = compiled_for(form, t, True)
    programs[name] = lambda program=program: program(q, k, v, w)
  if importlib.util.find_spec('torch'):
    version = importlib.metadata.version('torch')
    programs[f'torch {version} SDPA'] = torch_attention(q, k, v, w)
  seconds = take_turns(programs, args.turns or 7, 'softmax')
  rows = [
    [
      f'`{name}`',
      f'{1e3 * statistics.median(took):.0f}',
      f'{ratio(took, seconds["xla"]):.2f}',
    ]
    for name, took in seconds.items()
  ]
  memory = []
  for t in (args.length, 2 * args.length):
    for gradient in (False, True):
      size = {
        name: compiled_for(form, t, gradient)
        .memory_analysis()
        .temp_size_in_bytes
        for name, form in forms.items()
      }
      memory += [
        [
          f'{t:,}',
          'with gradients' if gradient else 'forward',
          f'`{name}`',
          f'{size[name] / 2**20:,.1f}',
          f'{size[name] / size["xla"]:.1f}',
        ]
        for name in forms
      ]
  return [
    f'# Causal softmax attention at {args.length:,} tokens',
    f'{h} head{"s" * (h > 1)} of width {d}, float32. Time of forward and '
    'backward:',
    markdown(['form', 'ms', 'time over xla'], rows),
    'Temporary memory, as the compiler plans it:',
    markdown(['tokens', 'pass', 'form', 'MiB', 'over xla'], memory),
  ]


# ----------------------------------------------------------------------- masks


def mask_costs(args) -> list[str]:
  """Whether masks cost what their tiles cost, that are not empty."""
  t, d, side = args.length, 64, 512
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, w = (jax.random.normal(key, (1, t, args.heads, d)) for key in keys)
  documents = np.arange(t) * 8 // t + 1
  cases = {
    'causal': (Causal(), None),
    'all pairs': (Everything(), None),
    f'causal, window {t // 16}': (Causal() & Window(t // 16), None),
    f'causal, prefix {t // 4}': (Causal() | Sinks(t // 4), None),
    'causal, 8 documents': (Causal(), documents),
  }
  programs, tiles = {}, {}
  for name, (mask, segments) in cases.items():
    attend = functools.partial(
      flash.attention,
      mask=mask,
      query_segments=segments,
      key_segments=segments,
      implementation='xla',
      blocks=Blocks(side, side),
    )
    loss = lambda q, k, v, attend=attend: jnp.sum(attend(q, k, v) * w)
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
    programs[name] = lambda program=program: program(q, k, v)
    at = masks.Tokens(masks.Side(np.arange(t).reshape(-1, side)), None)
    if segments is not None:
      at = at._replace(segments=segments.reshape(-1, side))
    query, key = (
      jax.tree.map(lambda x, axis=axis: jnp.expand_dims(x, axis), extent)
      for axis, extent in ((1, masks.extent(at)), (0, masks.extent(at)))
    )
    empty, _ = masks.judge(mask, query, key)
    tiles[name] = int(jnp.sum(~jnp.broadcast_to(empty, (t // side,) * 2)))
  seconds = take_turns(programs, args.turns or 7, 'masks')
  first = next(iter(cases))
  rows = []
  for name, took in seconds.items():
    time = ratio(took, seconds[first])
    work = tiles[name] / tiles[first]
    cells = [f'{1e3 * statistics.median(took):.0f}', f'{time:.2f}']
    rows.append([name, str(tiles[name]), *cells, f'{time / work:.2f}'])
  return [
    f'# What a mask costs at {t:,} tokens',
    f'Tiles of {side} by {side}, `xla`, {args.heads} head'
    f'{"s" * (args.heads > 1)} of width {d}, float32, forward and backward. '
    'The last column is time over causal divided by tiles over causal: 1 where '
    'a mask costs what its tiles cost.',
    markdown(
      ['mask', 'tiles not empty', 'ms', 'time over causal', 'time per tile'],
      rows,
    ),
  ]


# ---------------------------------------------------------------------- growth

LENGTHS = (4096, 8192, 16384, 32768)
BATCH = 4  # rows: already the shortest length is beyond the caches of a core


def linear_time() -> list[str]:
  """Mechanisms whose state does not grow: their time is linear, or t log t."""

  def fixed(name):
    spec, mixer = registry.spec(name), registry.make(name, width=64)
    return spec.state_bytes(mixer, 64, 8192) == spec.state_bytes(
      mixer, 64, 4096
    )

  return [
    name for name in registry.names() if fixed(name) or registry.spec(name).fft
  ]


def growing(name: str, length: int) -> Contender:
  """Forward and backward of one mechanism at a length."""
  fields = {'taps': max(LENGTHS)} if name == 'base_conv' else {}
  mixer = registry.make(name, width=64, **fields)
  x = jax.random.normal(jax.random.key(0), (BATCH, length, 64))
  variables = jax.jit(mixer.init)(jax.random.key(1), x[:, :64])

  @jax.jit
  def both(variables, x):
    rest = {**variables}
    params = rest.pop('params')
    loss = lambda params, x: jnp.sum(
      jnp.sin(mixer.apply({**rest, 'params': params}, x).y)
    )
    return jax.grad(loss, (0, 1))(params, x)

  return lambda: both(variables, x)


def growth(args) -> list[str]:
  """The exponent of time in length; for FFT forms, time over n log n."""
  rows = []
  for name in args.mechanism or linear_time():
    calls = {str(n): growing(name, n) for n in LENGTHS}
    seconds = take_turns(calls, args.turns or 7, name)
    took = [statistics.median(seconds[str(n)]) for n in LENGTHS]
    slope = np.polyfit(np.log(LENGTHS), np.log(took), 1)[0]
    rise = '-'
    if registry.spec(name).fft:
      per = [s / (n * math.log(n)) for s, n in zip(took, LENGTHS)]
      worst = max(b / min(per[: i + 1]) for i, b in enumerate(per))
      rise = f'{worst - 1:.0%}'
    cells = [f'{1e3 * s:.0f}' for s in took]
    rows.append([f'`{name}`', *cells, f'{slope:.2f}', rise])
  head = [
    'mechanism',
    *(f'ms at {n:,}' for n in LENGTHS),
    'exponent',
    'rise of time / (n log n)',
  ]
  return [
    '# Time against length',
    f'{BATCH} rows of width 64, default fields, float32, forward and backward. '
    'The exponent is the slope of log time over log length. A Fourier '
    'transform takes n log n: for those the last column says by how much time '
    '/ (n log n) is above that of any shorter length; what else they do takes '
    'n, so it may fall.',
    markdown(head, rows),
  ]
