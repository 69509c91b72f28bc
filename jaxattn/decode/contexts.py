"""A long context as windows, each read by itself, and all at the same time.

Ratner et al. 2023, "Parallel Context Windows for Large Language Models",
https://arxiv.org/abs/2212.10947.

  state = contexts.read(model, params, windows, room=200)
  generate(model, params, questions, state=state, max_new=100)

A token of a window sees those before it in the same window; what comes after
the windows sees all of them. Positions begin anew in each window, and what
comes after stands behind the longest: so no token stands where a model that was
trained on a window's length has never seen one.

Windows are rows of a batch. They lie over all the devices between which time is
spread, and each device reads its own without a word to the others (weights that
are stored in parts are gathered before). Their keys stay where they were made,
as parts of one memory, to which the question attends as it does to any that is
in parts (`parallel.tree`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.decode.generate import check_ids, read_chunks, states_of
from jaxattn.packing import Clock, Packing
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import place, sequence
from jaxattn.state import FullKV, Seen, State
from jaxattn.typing import Array, PyTree


def read(
  model: nn.Module,
  params: PyTree,
  contexts: Sequence[Sequence[Any]] | np.ndarray | Array,
  *,
  room: int,
  prefix: Sequence[int] | np.ndarray | Array = (),
  anew: bool = True,
  chunk: int = 128,
) -> PyTree:
  """The state of rows that have read their windows, for `generate` to go on.

  Args:
    model: a causal model such as `LM`, all of whose layers keep every key, and
      attend to keys wherever they stand.
    params: what `model.init` returned.
    contexts: for each row its windows, each of them ids; rows may have several
      numbers of windows, and windows several lengths. Or an int array 'b n t'.
    room: for how many more tokens the state has room: the longest prompt and
      `max_new`.
    prefix: ids with which every window begins. All are given the same keys by
      them, which what comes after sees once: a sink that windows share (Zhang
      et al. 2024, https://arxiv.org/abs/2412.16545).
    anew: positions begin anew in each window; else they go on from one to the
      next.
    chunk: tokens of a window that are read at a time.

  Raises:
    ValueError: ids outside of the vocabulary; a layer whose memory is not of
      every key; numbers out of range.
  """
  if room < 1 or chunk < 1:
    raise ValueError(f'room={room} and chunk={chunk} must be at least 1')
  _check_model(model)
  start = np.asarray(prefix).reshape(-1)
  check_ids('prefix', start, model.vocab)
  ids, lengths = _windows(contexts, model.vocab)
  b, n, _ = ids.shape
  fill = -n % sequence.devices()  # windows of nothing: all devices have as many
  ids = np.pad(ids, ((0, 0), (0, fill), (0, 0)))
  lengths = np.pad(lengths, ((0, 0), (0, fill)))
  lead = np.broadcast_to(start.astype(np.int32), (b, n + fill, start.size))
  ids = np.concatenate([lead, ids], axis=2)

  at = np.arange(ids.shape[2])
  own, first = at >= start.size, np.arange(n + fill)[:, None] == 0
  before = 0 if anew else np.cumsum(lengths, axis=1) - lengths
  order = at + np.where(own, np.expand_dims(before, -1), 0)
  valid = at < start.size + lengths[..., None]
  order = np.where(valid, order, 0)
  lasts = np.broadcast_to(own | first, valid.shape)
  end = start.size + (lengths.max(axis=1) if anew else lengths.sum(axis=1))
  rest = ((0, 0), (0, 0), (0, -ids.shape[2] % chunk))
  arrays = (np.pad(x, rest) for x in (ids, order, valid.astype(np.int32)))
  return _read(
    *(model, params, *arrays, lasts, end.astype(np.int32)),
    chunk=chunk,
    room=room,
  )


@functools.partial(jax.jit, static_argnames=('model', 'chunk', 'room'))
def _read(model, params, ids, order, segments, lasts, end, *, chunk, room):
  """See `read`.

  Args:
    model, params, chunk, room: as there.
    ids, order, segments: 'b n t', with t whole chunks.
    lasts: 'b n s', which of the tokens of a window are seen from behind it.
    end: 'b', the order of what comes after.
  """
  mesh, devices = meshes.current(), sequence.devices()
  (b, n, _), s = ids.shape, lasts.shape[2]
  more = -(-room // devices)

  def windows(params, ids, order, segments, lasts):
    """What a device's windows leave to be seen, by layers."""
    b = len(ids)
    flat = lambda x: x.reshape(-1, x.shape[2])
    ids, order, segments = map(flat, (ids, order, segments))
    state, _ = read_chunks(
      *(model, params, ids, Packing(order, segments)),
      model.init_state(len(ids), s),
      chunk=chunk,
    )

    def join(x):
      """'l r s ...' of windows as 'l b s ...' of rows, and room behind."""
      x = x.reshape(len(x), b, -1, *x.shape[3:])
      return jnp.pad(x, [(0, 0)] * 2 + [(0, more)] + [(0, 0)] * (x.ndim - 3))

    def seen(state):
      kept = state.memory
      segments = jnp.where(flat(lasts), kept.segments, 0)
      kept = kept.keys, kept.values, kept.order, segments, kept.positions
      return Seen(*jax.tree.map(join, kept))

    return _for_each(State, seen, state)

  arrays = ids, order, segments, lasts
  if mesh is not None:
    rows = *(place.batch(b, mesh) or (None,)), meshes.SEQ
    params = jax.tree.map(place.whole, params)
    arrays = place.put(arrays, jax.P(*rows))
    # Not time but windows lie over `seq` in there. Types that told so would
    # make engines believe that it is time; unchecked, they do not tell.
    windows = jax.shard_map(
      windows,
      in_specs=(jax.P(), *[jax.P(*rows)] * 4),
      out_specs=jax.P(None, *rows),
      check_vma=False,
    )

  def state(seen):
    full = lambda x: jnp.broadcast_to(x, (len(seen.keys), b))
    clock = Clock(full(end), full(jnp.int32(1)))
    return State(clock, FullKV(*seen, full(jnp.int32(n * s)), devices))

  states = _for_each(Seen, state, windows(params, *arrays))
  return place.state(states, b, stacked=True)


def _for_each(kind, fn, tree):
  """Of a tree of `kind`s, that of what `fn` makes of each."""
  return jax.tree.map(fn, tree, is_leaf=lambda x: isinstance(x, kind))


def _check_model(model) -> None:
  for state in states_of(jax.eval_shape(lambda: model.init_state(1, 1))):
    memory = state.memory
    if not isinstance(memory, FullKV):
      does = f'keeps a {type(memory).__name__}'
    elif memory.stripes is None:
      does = 'chooses keys by where they stand'
    else:
      continue
    raise ValueError(
      'where windows are read by themselves each layer must keep every key, and'
      ' read it wherever it stands, as multi_head, grouped_query, gated,'
      f' mixture_of_heads and sigmoid do; one of this model {does}'
    )


def _windows(contexts, vocab) -> tuple[np.ndarray, np.ndarray]:
  """Windows as an int32 array 'b n t', padded on the right; lengths 'b n'."""
  if hasattr(contexts, 'ndim') and contexts.ndim != 3:
    raise ValueError(
      f'contexts must be rows of windows of ids, (batch, windows, time), not'
      f' {contexts.shape}'
    )
  rows = [[np.asarray(window) for window in row] for row in contexts]
  if not any(window.size for row in rows for window in row):
    raise ValueError('contexts hold no ids: generate without a state')
  for i, row in enumerate(rows):
    for j, window in enumerate(row):
      if window.ndim != 1:
        raise ValueError(f'contexts[{i}][{j}] must be ids, not {window}')
      check_ids(f'contexts[{i}][{j}]', window, vocab)
  lengths = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for i, row in enumerate(rows):
    lengths[i, : len(row)] = [len(window) for window in row]
  ids = np.zeros((*lengths.shape, lengths.max()), np.int32)
  for i, row in enumerate(rows):
    for j, window in enumerate(row):
      ids[i, j, : len(window)] = window
  return ids, lengths
