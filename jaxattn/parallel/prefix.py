"""Recurrences over devices: the state that enters a device's part of time.

Sun et al. 2025, "LASP-2: Rethinking Sequence Parallelism for Linear Attention
and Its Hybrid", https://arxiv.org/abs/2502.07563; the associative form is that
of Blelloch 1990, "Prefix Sums and Their Applications".

However long a part of a sequence is, all that it does to a state S is

    S -> A S + B        A is what becomes of the past, B what is written anew

so devices need not wait for each other's tokens. Each finds its own pair from
its own tokens; an all-gather brings it those of all; it applies those before
its own, in their order, and so has the state that enters; from there the engine
runs as on one device. What is sent has the size of states, not of a sequence.

A pad is the identity. A segment that begins makes A = 0: the past is forgotten.
What A is, and how a pair is found, is the engine's affair:

    gated recurrence    a diagonal, exp of the sum of all log-decays. B is one
                        matrix product (`recurrence.effect`).
    state space         the same in complex numbers (`ssm.effect`).
    delta rule          the product of all (I - beta k k^T): a matrix a head
                        (`delta.effect`).
    largest exponent    of Performer's keys: S -> max(S, B).
    short convolution   S is the last few tokens: S moves up by as many as the
                        part has, and B stands in their place.

Each function here is the one of its name in `core`, over however many devices
hold the time axis, which has to be contiguous: each holds what comes before the
tokens of the next. Results are those of one device; the state that is returned
is the one after the device's own tokens.

Nor are errors larger. An output is the engine's, from the state that enters:
what a part makes of nothing, and what it makes of the state, are never rounded
to the tokens' type apart, and added up. So the delta rule goes through its
tokens twice, which takes more time; to keep what each token reads of the state
would cost memory.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.core import conv, features, recurrence, ssm
from jaxattn.core import delta as rule
from jaxattn.parallel import halo, place, sequence, ulysses
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel.strategy import Strategy, say


def gated(q, k, v, log_decay=None, *, state=None, valid=None, starts=None):
  """`recurrence.gated`, with its arguments, results and errors."""
  run, places = recurrence.gated, {'valid': valid, 'starts': starts}
  if sequence.parts(k) == 1:
    return run(q, k, v, log_decay, state=state, **places)
  tokens, effect = _read_twice(recurrence.effect, places, k, v, log_decay)
  state = enter(_before(state, effect[1]), effect, _fade)
  o, state = run(q, *tokens, state=state, **places)
  return o.astype(v.dtype), state


def scan(u, log_a, b_bar, c, *, state=None, valid=None, starts=None):
  """`ssm.scan`, with its arguments and results."""
  places = {'valid': valid, 'starts': starts}
  bank = _varying((log_a, b_bar, c), u)
  if sequence.parts(u) == 1:
    return ssm.scan(u, *bank, state=state, **places)
  (wide, *driven), effect = _read_twice(ssm.effect, places, u, *bank[:2])
  state = enter(_before(state, effect[1]), effect, _fade)
  y, state = ssm.scan(wide, *driven, bank[2], state=state, **places)
  return y.astype(u.dtype), state


def dense(u, log_a, b_bar, c):
  """`ssm.dense` of a row from its beginning; a device transforms its own part.

  What it makes of the state is added in what is wide, and rounded once.
  """
  bank = _varying((log_a, b_bar, c), u)
  if sequence.parts(u) == 1:
    return ssm.dense(u, *bank)
  (wide, *driven), effect = _read_twice(ssm.effect, {}, u, *bank[:2])
  state = enter(_before(None, effect[1]), effect, _fade)
  return ssm.dense(wide, *driven, bank[2], state=state).astype(u.dtype)


def delta(
  q, k, v, beta, log_decay=None, *, state=None, valid=None, starts=None
):
  """`delta.delta`, with its arguments and results."""
  places = {'valid': valid, 'starts': starts}
  if sequence.parts(k) == 1:
    return rule.delta(q, k, v, beta, log_decay, state=state, **places)
  tokens, effect = _read_twice(rule.effect, places, k, v, beta, log_decay)

  def then(state, effect):
    kept, written = jnp.split(effect, [k.shape[-1]], axis=-1)
    return _product(kept, state) + written

  state = _before(state, effect[1])
  state = enter(state, jnp.concatenate(effect, axis=-1), then)  # sent once
  o, state = rule.delta(q, *tokens, state=state, **places)
  return o.astype(v.dtype), state


def keys_in_range(log_k, *, peak=None, valid=None, starts=None):
  """`features.keys_in_range`, with its arguments and results."""
  places = {'valid': valid, 'starts': starts}
  if sequence.parts(log_k) > 1:
    *_, top = features.keys_in_range(log_k, **places)
    begun = _begun(top[:, :1], **places)
    nothing = jnp.full_like(top, features.LOWEST)
    peak = nothing if peak is None else _before(peak, top)

    def then(peak, effect):
      begun, top = effect
      return jnp.where(begun, top, jnp.maximum(peak, top))

    peak = enter(peak, (begun, top), then)
  return features.keys_in_range(log_k, peak=peak, **places)


def short(x, kernel, *, tail=None, valid=None, starts=None):
  """`conv.short`, with its arguments, results and errors."""
  places = {'valid': valid, 'starts': starts}
  kernel = _varying(kernel, x)
  if sequence.parts(x) == 1 or kernel.shape[0] == 1:
    return conv.short(x, kernel, tail=tail, **places)
  outs, x = (x.dtype, (x if tail is None else tail).dtype), _wide(x)
  tail = _tail(x, kernel, tail, **places)
  y, tail = conv.short(x, kernel, tail=tail, **places)
  return y.astype(outs[0]), tail.astype(outs[1])


def _tail(x, kernel, tail, valid, starts):
  """The last tokens before this part, 'b w-1 m'."""
  t, size = x.shape[1], kernel.shape[0] - 1
  if tail is None and valid is None and starts is None and t >= size:
    return _last(x, size)  # the neighbour has them all
  _, own = conv.short(x, kernel, valid=valid, starts=starts)
  count = t if valid is None else jnp.sum(valid, axis=1, keepdims=True)
  # All that came before a segment moves out when it begins.
  moves = jnp.where(_begun(x[:, :1, 0], valid, starts), size, count)
  moves = jnp.minimum(moves, size)

  def then(tail, effect):
    moves, own = effect
    tail = jnp.pad(tail, [(0, 0), (0, size), (0, 0)])
    at = moves + jnp.arange(size)
    return jnp.take_along_axis(tail, at[..., None], axis=1) + own

  return enter(_before(tail, own), (moves, own), then)


def fft(x, kernel):
  """`conv.fft`, with its arguments and results.

  Where filters end within the neighbour's part, its last tokens are sent;
  where they reach further, channels are exchanged for time.
  """
  size = kernel.shape[0] - 1
  if sequence.parts(x) == 1 or size > x.shape[1]:
    return by_channel(lambda x, h: conv.fft(x, h.T), x, kernel.T)
  kernel, wide = _varying(kernel, x), _wide(x)
  y = conv.fft(jnp.concatenate([_last(wide, size), wide], axis=1), kernel)
  return y[:, size:].astype(x.dtype)


def _last(x, size):
  """The last tokens of the part before, 'b size m', and zeros at the first."""
  last = x[:, x.shape[1] - size :]
  sent, reason = place.size(last), 'no tap reaches beyond the neighbour'
  strategy = Strategy('halo', reason, int(size > 0), sent, sent)
  say('a convolution', sequence.parts(x), strategy)
  return halo.extend(last, meshes.SEQ, size)[:, :size]


def by_channel(engine, x, *weights):
  """`engine(x, *weights)` for what mixes over time, but no channels.

  Devices exchange channels for time: each has all tokens of some channels, and
  afterwards its own tokens again. Channels that do not divide are filled up
  with zeros. What is sent grows with a device's part of time.

  Args:
    engine: a pure function of 'b t m' and weights that returns 'b t m', whose
      t is all of time.
    x: 'b t m', one device's part.
    *weights: 'm ...' of all channels.
  """
  parts, weights = sequence.parts(x), _varying(weights, x)
  if parts == 1:
    return engine(x, *weights)
  group, m = ulysses.Group(meshes.SEQ, parts), x.shape[-1]

  def filled(x, axis):
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, -m % parts)
    return jnp.pad(x, fill)

  weights = [group.my_heads(filled(w, 0)) for w in weights]
  x = filled(x, 2)
  y = engine(group.heads_for_time(x), *weights)
  sent, held = (
    n * (parts - 1) // parts for n in (place.size((x, y)), place.size(x))
  )
  reason = 'an FFT, or a sum as long, reads all of time: so tokens are sent'
  strategy = Strategy('channels', reason, 2, sent, held)
  say('a long convolution', parts, strategy)
  return group.time_for_heads(y)[..., :m]


def enter(state, effect, then):
  """The state that enters a device's part of time.

  Args:
    state: what came before the tokens of all devices.
    effect: what this device's do to a state, a pytree of fixed shapes.
    then: (state, effect) -> the state after them.
  """
  devices = lax.axis_size(meshes.SEQ)
  size = (devices - 1) * place.size(effect)
  reason = 'what tokens do to a state is sent, and no tokens'
  say('a recurrence', devices, Strategy('prefix', reason, 1, size, size))

  @jax.checkpoint  # so that what all others sent is not kept
  def fold(state, effect):
    effects = jax.tree.map(_of_all, effect)
    here = lax.axis_index(meshes.SEQ)

    def step(state, of):
      i, effect = of
      return jnp.where(i < here, then(state, effect), state), None

    numbers = jnp.arange(lax.axis_size(meshes.SEQ))
    return lax.scan(step, state, (numbers, effects))[0]

  return fold(state, effect)


def _of_all(x):
  """What every device has, 'n ...'.

  Complex numbers go as pairs: the gradient adds what comes back from all, and
  not every compiler has a reduce_scatter of complex sums.
  """
  gather = lambda x: lax.all_gather(x, meshes.SEQ)
  if jnp.iscomplexobj(x):
    return lax.complex(gather(x.real), gather(x.imag))
  return gather(x)


def _read_twice(effect, places, *tokens):
  """The same tokens for an engine to read, and their effect.

  The gradients of both are added up before they are rounded, so what is read is
  wide. What is kept are the tokens as they came: the rest is computed again.
  """

  @jax.checkpoint
  def both(*tokens):
    tokens = _wide(tokens)
    return tokens, effect(*tokens, **places)

  return both(*tokens)


def _wide(tree):
  """As wide as gradients are to be added up."""
  return jax.tree.map(
    lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree
  )


def _varying(weights, x):
  """Weights that vary over the mesh as `x` does, and are wide.

  Their gradients are then summed over devices once, and not wherever they are
  used, which may be in a loop or for every token; and rounded once, after that.
  """

  def own(w):
    axes = jax.typeof(x).manual_axis_type.varying
    axes -= jax.typeof(w).manual_axis_type.varying
    return lax.pcast(w, tuple(sorted(axes)), to='varying') if axes else w

  return jax.tree.map(own, _wide(weights))


def _before(state, like):
  """A state that is given, or none, laid out over the mesh as `like`."""
  zeros = jnp.zeros_like(like)
  return zeros if state is None else zeros + state.astype(zeros.dtype)


def _fade(state, effect):
  """S -> A S + B for a diagonal A."""
  kept, written = effect
  return kept * state + written


def _product(x, y):
  """x y in full precision: errors made here compound from device to device."""
  return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _begun(like, valid, starts):
  """Whether a segment begins in this part: 'b 1', as `like` is."""
  if starts is None:
    return jnp.zeros_like(like, bool)
  starts = starts if valid is None else starts & valid
  return jnp.any(starts, axis=1, keepdims=True)
