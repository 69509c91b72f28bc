"""The one door between mechanisms and devices.

A mechanism hands its engine and its arrays to `stream` (or `run`), which lays
rows over `data` and time over `seq`, and calls the engine inside one fully
manual `shard_map`, which behaves the same in Auto and in Explicit mode. There a
device holds a part of the time axis: JAX says so in the type of each array, and
engines that mix over time are called by way of the functions below, which then
talk to the other devices, and else do not.

With a memory (decoding, and prefill in chunks) the time of a chunk is whole on
every device. The memory of what attends is in parts (`tree`), others are whole.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.core import softmax
from jaxattn.parallel import (
  blockwise,
  gather,
  place,
  stripe,
  tensor,
  tree,
)
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import strategy as strategies
from jaxattn.parallel.strategy import Call, Strategy, choose, remember, say
from pallas_kernels import flash
from pallas_kernels.dropout import Dropout
from pallas_kernels.masks import Mask

STRATEGIES, FAR = strategies.STRATEGIES, strategies.FAR


def run(engine: Callable, *arrays, weights=(), block=None, split=()):
  """`engine(*arrays, *weights)` for what does not mix over time.

  Args:
    engine: a pure function; all it returns is 'b t ...'.
    *arrays: pytrees whose leaves are all 'b t ...' (`None` is allowed).
    weights: pytrees that every device needs whole, best as they are stored.
    block: tokens to serve at a time, see `blockwise`, if the engine is a
      function of each token on its own; None serves all at once.
    split: an axis of each weight, if results are sums over those axes, so that
      devices along `model` may share them (`tensor`).
  """
  if block is not None:
    serve, count = engine, len(arrays)
    in_blocks = blockwise.over(lambda x, w: serve(*x, *w), block)
    engine = lambda *inputs: in_blocks(inputs[:count], inputs[count:])
  mesh = meshes.current()
  leaves = jax.tree.leaves(arrays)
  if mesh is None or not leaves:
    return engine(*arrays, *weights)
  where = place.tokens(*leaves[0].shape[:2], mesh)
  # A context is spread as well, where its own length divides.
  own = lambda x: place.tokens(*x.shape[:2], mesh) if len(where) > 1 else where
  specs = tuple(jax.tree.map(own, arrays))
  return _mapped(engine, arrays, weights, where, specs, split)


def rows(engine: Callable, *arrays, weights=()):
  """The same for what needs all of time: arrays and results lead with rows."""
  mesh = meshes.current()
  leaves = jax.tree.leaves(arrays)
  if mesh is None or not leaves:
    return engine(*arrays, *weights)
  return _mapped(engine, arrays, weights, place.batch(len(leaves[0]), mesh))


def stream(engine: Callable, *inputs, weights=()):
  """`o, memory = engine(*inputs, *weights)` for what mixes over time.

  Args:
    engine: a pure function, which calls other devices by way of this module, or
      of `prefix`.
    *inputs: pytrees whose leaves are all 'b t ...'; then `packing.Tokens`; then
      what the mechanism remembers, which leads with rows, or None.
    weights: pytrees that every device needs whole.

  Returns:
    o, of which all is 'b t ...', and the memory after it; None if there was
    none before.
  """
  *arrays, tokens, memory = inputs
  mesh = meshes.current()
  if mesh is None:
    o, after = engine(*inputs, *weights)
    return o, None if memory is None else after
  b, t = tokens.order.shape
  lead, parts = place.batch(b, mesh), mesh.shape[meshes.SEQ]
  if memory is not None:
    slots = place.slots(memory, mesh, b)
    specs = *jax.tree.map(lambda _: lead, (*arrays, tokens)), slots
    if place.deals(memory, mesh):
      engine = tree.given_part(engine, len(arrays) + 1, meshes.SEQ)
    o, after = _mapped(engine, inputs, weights, (lead, slots), specs)
    return place.over_time(o), after

  given = *arrays, tokens

  def forget(*inputs):
    o, _ = engine(*inputs[: len(given)], None, *inputs[len(given) :])
    return o

  if parts == 1 or t < parts:
    return place.over_time(_mapped(forget, given, weights, lead)), None
  if t % parts == 0:
    where = place.tokens(b, t, mesh)
    return _mapped(forget, given, weights, where), None
  # Filled up with padding, which engines skip.
  fill = -t % parts
  *arrays, tokens = jax.tree.map(
    lambda x: jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)),
    place.put(given, lead),
  )
  tokens = dataclasses.replace(tokens, valid=tokens.segments > 0)
  where = place.tokens(b, t + fill, mesh)
  o = _mapped(forget, (*arrays, tokens), weights, where)
  return jax.tree.map(lambda x: x[:, :t], place.put(o, lead)), None


def _mapped(engine, arrays, weights, where, specs=None, split=()):
  """With results laid `where`; and arrays too, or each by its specs.

  Weights come in parts, as they are stored, and are gathered inside: so their
  gradients are summed and divided in one go.
  """
  mesh = meshes.current()
  specs = specs or tuple(jax.tree.map(lambda _: where, arrays))
  stored = tuple(jax.tree.map(lambda w: place.weight(w.shape, mesh), weights))

  inside = lambda spec, axis: bool(spec) and meshes.MODEL in (spec[axis] or '')
  keep = None
  if split and all(map(inside, stored, split)):
    engine, keep = tensor.total(engine, meshes.MODEL), meshes.MODEL

  def on_one(*inputs):
    arrays, parts = inputs[: len(specs)], inputs[len(specs) :]
    whole = lambda part, spec: gather.weight(part, spec, results[0], keep)
    return engine(*arrays, *jax.tree.map(whole, parts, stored))

  results = jax.tree.leaves(where)
  arrays = jax.tree.map(place.put, arrays, specs)
  weights = jax.tree.map(place.put, tuple(weights), stored)
  return jax.shard_map(on_one, in_specs=(*specs, *stored), out_specs=where)(
    *arrays, *weights
  )


# ------------------------------------------------------------- where tokens lie


def layout(specs: Mapping[str, Any], asked: str | None = None) -> str:
  """How the tokens of a model lie over devices; one of `stripe.LAYOUTS`.

  If every layer takes tokens in any order, and none reads what is near alone,
  they lie so that all devices have the same work: zigzag, which computes fewer
  tiles than striped. Lengths do not matter: rows are filled up.

  Args:
    specs: the `Spec` of each mechanism of the model, by name.
    asked: a layout by name; None to have one chosen.

  Raises:
    ValueError: no such layout, or not for such a mechanism.
  """
  if asked not in (None, *stripe.LAYOUTS):
    raise ValueError(
      f'layout={asked!r} must be one of {", ".join(stripe.LAYOUTS)}, or None to'
      ' have one chosen'
    )
  parts = devices()
  fixed = sorted(n for n, own in specs.items() if own.layout == 'contiguous')
  if asked is None:
    near = any(own.near for own in specs.values())
    return 'contiguous' if parts == 1 or fixed or near else 'zigzag'
  if fixed and asked != 'contiguous':
    raise ValueError(
      f'layout={asked!r}: neighbours in time must be neighbours in memory for'
      f" {', '.join(fixed)}; take layout='contiguous', or leave it out"
    )
  return asked if parts > 1 else 'contiguous'


# ------------------------------------------------- inside: what mixes over time


def devices() -> int:
  """Over how many devices time may be spread here."""
  mesh = meshes.current()
  return 1 if mesh is None else mesh.shape[meshes.SEQ]


def parts(x: jax.Array) -> int:
  """Over how many devices the time axis of `x` is spread, here and now."""
  if meshes.SEQ not in jax.typeof(x).manual_axis_type.varying:
    return 1
  return lax.axis_size(meshes.SEQ)


def everywhere(tree):
  """All of time on every device: for engines that need every key."""
  devices = parts(jax.tree.leaves(tree)[0])
  if devices == 1:
    return tree
  size = (devices - 1) * place.size(tree)
  reason = 'any token may be read by any device'
  say('what is read', devices, Strategy('gather', reason, 1, size, size))
  return gather.all_of_time(tree, meshes.SEQ)


def attention(
  q,
  k,
  v,
  *,
  engine: Callable = softmax.attention,
  strategy: str | None = None,
  mask: Mask,
  query_order=None,
  key_order=None,
  query_segments=None,
  key_segments=None,
  dropout: Dropout | None = None,
  **rule,
):
  """An engine of attention, over however many devices hold the time axis.

  Args:
    q, k, v: 'b t h d', 'b s k d', 'b s k e': one device's part.
    engine: `softmax.attention`, or another with its arguments.
    strategy: one of STRATEGIES; None leaves it to `choose`. Where keys alone
      are in parts there is no choice, see `tree`.
    mask, query_order, ...: as of the engine. Where orders and segments are left
      out, tokens stand in their order over the devices.
    dropout: rows are numbered over all devices, so it is the same on any mesh.
    **rule: further arguments of the engine.

  Raises:
    NotImplementedError: the strategy asked for cannot serve the call.
    ValueError: a bias does not have the columns of all devices.
  """
  dense = query_order is None and key_order is None
  over, devices = None, tensor.size(meshes.MODEL)
  shared = devices if k.shape[2] % devices == 0 else 1
  if parts(k) > 1:
    (*some, h, d), (s, heads) = q.shape, k.shape[1:3]
    sizes = *some, h // shared, d, s, heads // shared, v.shape[3]
    bias = rule.get('bias')
    if getattr(bias, 'ndim', 0) == 4 and bias.shape[3] != s * parts(k):
      raise ValueError(
        f'a bias must have a column for each of the {s * parts(k)} keys of all'
        f' {parts(k)} devices, not {bias.shape[3]}'
      )
    # All engines but some of `flash` have a backward pass of their own.
    named = flash.BACKENDS.get(rule.get('implementation'))
    backward = named is None or named.backward is not None
    tagged = bool(rule.get('query_tags') or rule.get('key_tags'))
    how = {'dense': dense, 'tagged': tagged, 'backward': backward}
    call = Call(parts(k), *sizes, q.dtype.itemsize, mask, **how)
    # Keys alone are in parts where they are those of a memory.
    over = (choose(call, strategy) if parts(q) > 1 else remember(call)).over
  if shared > 1:
    over = tensor.over(meshes.MODEL, shared, over)
  if dropout is not None and dropout.batch is None:
    dropout = _numbered(dropout, len(q), q)
  query_order = _order(query_order, q)
  key_order = _order(key_order, k)
  return engine(
    q,
    k,
    v,
    mask=mask,
    query_order=query_order,
    key_order=key_order,
    query_segments=query_segments,
    key_segments=key_segments,
    over=over,
    **({} if dropout is None else {'dropout': dropout}),
    **rule,
  )


def _numbered(dropout: Dropout, rows: int, x) -> Dropout:
  """With the numbers of this device's rows."""
  at = 0
  if meshes.DATA in jax.typeof(x).manual_axis_type.varying:
    at = lax.axis_index(meshes.DATA) * rows
  return dataclasses.replace(dropout, batch=at + jnp.arange(rows))


def _order(order, x):
  """Given, or where tokens stand if they lie in order over the devices."""
  if order is not None or parts(x) == 1:
    return order
  return lax.axis_index(meshes.SEQ) * x.shape[1] + jnp.arange(x.shape[1])
