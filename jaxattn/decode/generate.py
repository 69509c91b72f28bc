"""Generation from any causal model: prompts in chunks, then token by token.

Both phases use the one calling convention that all models share: a chunk of
tokens and a state go in, logits and the next state come out.

- Prefill cuts the prompts into chunks of one size. A row whose prompt has ended
  is padded on the right, and pads leave its state alone, so rows of any lengths
  stand side by side. Each row's logits are picked at its own last token.
- A step is a chunk of one token without packing: each row continues from its
  own clock. Rows that have ended take part until all have: what they write
  reaches neither the result nor another row, and where nothing can be a pad
  every engine takes its short way.

Where time is spread over devices (`seq` of the mesh), keys and values of layers
that attend lie in parts, see `parallel.tree`; what is generated is the same.

Each phase is one program for each (rows, longest prompt rounded up to whole
chunks, chunk, max_new); other prompts, keys, temperatures, k, p and end tokens
are data.
"""

import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.decode import sample
from jaxattn.packing import Packing
from jaxattn.parallel import place
from jaxattn.state import FullKV, State
from jaxattn.typing import Array, Float, PerRow, PerToken, PyTree


class Generated(NamedTuple):
  """New tokens, without the prompts.

  Attributes:
    tokens: 'b t' with t = max_new, int32, `pad` after a row's end.
    lengths: 'b', how many tokens of each row are new, its end token included.
    logprobs: 'b t', float32, log-probability of each token by the model itself,
      before temperature, top_k and top_p; 0 after a row's end.
  """

  tokens: PerToken
  lengths: PerRow
  logprobs: Float[Array, 'b t']


def generate(
  model: nn.Module,
  params: PyTree,
  prompts: Sequence[Any] | np.ndarray | Array,
  *,
  max_new: int,
  lengths: Sequence[int] | np.ndarray | Array | None = None,
  state: PyTree = None,
  key: Array | None = None,
  temperature: float = 1.0,
  greedy: bool = False,
  top_k: int | None = None,
  top_p: float | None = None,
  end: int | Sequence[int] | None = None,
  chunk: int = 128,
  pad: int = 0,
) -> Generated:
  """Continues prompts by up to `max_new` tokens each.

  Args:
    model: a causal model such as `LM`: `apply` on ids 'b t' with a state, and
      `init_state`.
    params: what `model.init` returned.
    prompts: rows of token ids, of any lengths; or one int array 'b t'.
    max_new: how many tokens to add at most.
    lengths: 'b', how many ids of each row of an array are prompt; all by
      default.
    state: what rows have read before their prompts, such as `contexts.read`
      returns; with room for the longest prompt and `max_new`. It stays as it
      is, for other prompts.
    key: a random key. Row r draws token i with the key folded with r and then
      with i, so its draws do not depend on the other rows.
    temperature: divides the logits; 0 takes the best token.
    greedy: the same as temperature=0.
    top_k: draw from the k best tokens only.
    top_p: draw from the fewest best tokens that have this much mass only.
    end: a token id, or several, after which a row stops.
    chunk: tokens that prefill reads at a time. A new state has room for the
      longest prompt rounded up to whole chunks, and `max_new`.
    pad: what stands after a row's end; any integer.

  Returns:
    Generated(tokens, lengths, logprobs).

  Raises:
    ValueError: no prompts, or an empty one; ids outside of the vocabulary;
      sampling without a key; numbers out of range; a state of other rows, or
      without enough room.
  """
  vocab = model.vocab
  ids, lengths = _rows(prompts, lengths, vocab)
  rules = _rules(temperature, greedy, top_k, top_p)
  end = _end(end, vocab)
  if max_new < 0:
    raise ValueError(f'max_new={max_new} must not be negative')
  if chunk < 1:
    raise ValueError(f'chunk={chunk} must be at least 1')
  if rules.temperature is not None and key is None:
    raise ValueError(
      f'temperature={temperature} draws at random: give '
      'key=jax.random.key(seed), or temperature=0 for the best tokens'
    )
  if not isinstance(params, Mapping) or 'params' not in params:
    raise ValueError(
      "params must be what model.init returned, {'params': ...}, not "
      f'{list(params) if isinstance(params, Mapping) else type(params)}'
    )
  if state is not None:
    _check_state(state, len(ids), ids.shape[1] + max_new)
  if max_new == 0:
    return _nothing(len(ids), 0, pad)
  room = -ids.shape[1] % chunk
  ids = np.pad(ids, ((0, 0), (0, room)))
  capacity = ids.shape[1] + max_new
  state, logits = _prefill(
    *(model, params, ids, lengths, state), chunk=chunk, capacity=capacity
  )
  if rules.temperature is None:
    key = None
  generated, _ = _continue(
    model, params, state, logits, rules, key, end, pad, max_new=max_new
  )
  return generated


@functools.partial(jax.jit, static_argnames=('model', 'chunk', 'capacity'))
def _prefill(model, params, ids, lengths, state, *, chunk, capacity):
  """`read_chunks` of prompts, from a state or from the start of a stream."""
  batch, length = ids.shape
  if state is None:
    state = model.init_state(batch, capacity)
  state = place.state(state, batch, stacked=True)
  clock = jax.tree.map(lambda x: place.whole(x[0]), states_of(state)[0].clock)
  packing = Packing.from_lengths(lengths, length, start=clock.order)
  segments = packing.segments * jnp.maximum(clock.segment, 1)[:, None]
  packing = Packing(packing.order, segments)
  return read_chunks(model, params, ids, packing, state, chunk=chunk)


def read_chunks(model, params, ids, packing, state, *, chunk):
  """The state after `ids` 'b t', and the logits 'b v' of each row's last token.

  Rows may end in padding, and t is a multiple of `chunk`.
  """
  batch, length = ids.shape
  lengths = jnp.sum(packing.segments > 0, axis=1)

  def step(carry, inputs):
    state, last = carry
    ids, packing, start = inputs
    logits, state = model.apply(
      params, ids, packing, state=state, return_state=True
    )
    left = lengths - start
    # By a sum, for a device may hold some of the chunk's tokens alone.
    last_one = (jnp.arange(chunk) == left[:, None] - 1)[..., None]
    logits = place.whole(jnp.sum(jnp.where(last_one, logits, 0), axis=1))
    # Of the chunks in which a row has tokens, its last one writes last.
    last = jnp.where((left > 0)[:, None], logits.astype(last.dtype), last)
    return (state, last), None

  carry = state, jnp.zeros((batch, model.vocab), jnp.float32)
  cut = lambda x: jnp.moveaxis(x.reshape(batch, -1, chunk), 1, 0)
  starts = jnp.arange(0, length, chunk, dtype=jnp.int32)
  chunks = *jax.tree.map(cut, (ids, packing)), starts
  return jax.lax.scan(step, carry, chunks)[0]


@functools.partial(
  jax.jit, static_argnames=('model', 'max_new'), donate_argnames='state'
)
def _continue(model, params, state, logits, rules, key, end, pad, *, max_new):
  """What is generated after `logits`, and the last state.

  Nobody reads that state, but as a result it can be written into the donated
  one: generation then holds one state, not two.
  """
  batch = logits.shape[0]
  rows = jnp.arange(batch)
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  if key is not None:
    key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)

  def take(i, logits, made, going):
    """Chooses token number i, and notes it in the rows that have not ended."""
    keys = None if key is None else fold(key, i)
    token = sample.choose(logits, rules, keys)
    logprob = jax.nn.log_softmax(logits)[rows, token]
    note = lambda array, new: array.at[:, i].set(
      jnp.where(going, new, array[:, i])
    )
    made = Generated(
      note(made.tokens, token),
      made.lengths + going,
      note(made.logprobs, logprob),
    )
    ended = jnp.any(token[:, None] == end, axis=1)
    return i + 1, token, made, going & ~ended

  def more(carry):
    _, (i, _, _, going) = carry
    return (i < max_new) & jnp.any(going)

  def step(carry):
    state, (i, token, made, going) = carry
    logits, state = model.apply(
      params, token[:, None], state=state, return_state=True
    )
    logits = place.whole(logits[:, 0]).astype(jnp.float32)
    return state, take(i, logits, made, going)

  made = _nothing(batch, max_new, pad)
  first = take(jnp.int32(0), logits, made, jnp.ones(batch, bool))
  state, (_, _, made, _) = jax.lax.while_loop(more, step, (state, first))
  return made, state


def _nothing(batch, length, pad) -> Generated:
  """No tokens yet."""
  return Generated(
    jnp.full((batch, length), pad, jnp.int32),
    jnp.zeros(batch, jnp.int32),
    jnp.zeros((batch, length), jnp.float32),
  )


def states_of(tree: PyTree) -> list[State]:
  """Those of all layers, whose arrays lead with like layers."""
  is_state = lambda x: isinstance(x, State)
  return [x for x in jax.tree.leaves(tree, is_leaf=is_state) if is_state(x)]


def _check_state(state, rows, tokens) -> None:
  for own in states_of(state):
    count = own.clock.order.shape[1]
    if count != rows:
      raise ValueError(f'the state is of {count} rows, and prompts are {rows}')
    if isinstance(own.memory, FullKV):
      room = own.memory.keys.shape[2] - int(own.memory.used.max())
      if room < tokens:
        raise ValueError(
          f'the state has room for {room} tokens, but the longest prompt and'
          f' max_new are {tokens}: make it with more room'
        )


def _rows(prompts, lengths, vocab) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as an int32 array, padded on the right, and their lengths."""
  if hasattr(prompts, 'ndim'):
    ids = np.asarray(prompts)
    if ids.ndim != 2:
      raise ValueError(
        f'prompts must be rows of ids, (batch, time), not {ids.shape}'
      )
    rows = list(ids)
    if lengths is not None:
      lengths = np.asarray(lengths)
      if lengths.shape != ids.shape[:1]:
        raise ValueError(
          f'lengths {lengths.shape} must be one number for each of the '
          f'{len(ids)} prompts'
        )
      for row, length in enumerate(lengths):
        if not 0 <= length <= ids.shape[1]:
          raise ValueError(
            f'lengths[{row}]={length}, but the prompts have {ids.shape[1]} ids'
          )
      rows = [row[:length] for row, length in zip(ids, lengths)]
  elif lengths is not None:
    raise ValueError(
      'lengths belong to prompts in one array; a list has its own'
    )
  else:
    rows = [np.asarray(row) for row in prompts]
  if not rows:
    raise ValueError('there are no prompts')
  for i, row in enumerate(rows):
    if row.ndim != 1:
      raise ValueError(f'prompts[{i}] must be a row of ids, not {row}')
    if row.size == 0:
      raise ValueError(
        f'prompts[{i}] is empty: a model continues tokens, so begin with a '
        'start token'
      )
    check_ids(f'prompts[{i}]', row, vocab)
  ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for i, row in enumerate(rows):
    ids[i, : len(row)] = row
  return ids, np.array([len(row) for row in rows], np.int32)


def _rules(temperature, greedy, top_k, top_p) -> sample.Rules:
  if not 0 <= temperature < math.inf:
    raise ValueError(
      f'temperature={temperature} must be a number of at least 0'
    )
  if top_k is not None and (
    not isinstance(top_k, numbers.Integral) or top_k < 1
  ):
    raise ValueError(f'top_k={top_k} must be an integer of at least 1')
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f'top_p={top_p} must be in (0, 1]')
  if greedy or temperature == 0:
    return sample.Rules()
  return sample.Rules(float(temperature), top_k, top_p)


def _end(end, vocab) -> np.ndarray:
  """End tokens as an array, of length 0 if there are none."""
  end = np.asarray([] if end is None else end).reshape(-1)
  check_ids('end', end, vocab)
  return end.astype(np.int32)


def check_ids(name, ids, vocab) -> None:
  if ids.size and not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f'{name} has ids of type {ids.dtype}, not integers')
  wrong = ids[(ids < 0) | (ids >= vocab)]
  if wrong.size:
    raise ValueError(
      f'{name} holds the id {wrong[0]}, but the vocabulary is 0 to {vocab - 1}'
    )
