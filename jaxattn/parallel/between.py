"""An engine between two movements: of what it reads, and of what it answers.

A key that several devices read gets a gradient from each. JAX would round each
of these to what the key is, and add them up in that: of bfloat16 the error
grows with the devices. So a strategy that brings keys says here how, and their
gradients go home as wide as their sums are, and are rounded there.
"""

import functools
from collections.abc import Callable

import jax

from pallas_kernels.problem import (
  Engine,
  accumulator,
  alike,
  floats,
  with_floats,
)


def engine(
  inner: Engine,
  bring: Callable[..., tuple],
  give: Callable[[tuple], tuple] = lambda results: results,
  *,
  keep: bool = False,
  shared: bool = True,
) -> Engine:
  """`give(inner(*bring(*inputs)))`, and the gradient of that.

  Args:
    inner: if it has no backward pass of its own JAX differentiates it all.
    bring: of q, k, v, extras, query and key the same, moved here; linear in
      those that have gradients.
    give: linear, of the results.
    keep: what was brought is kept for the backward pass, else brought again.
    shared: a key may be brought to several devices; else its gradient is
      rounded before it goes home.
  """
  if inner.backward is None:
    attend = lambda rule, *inputs: give(inner.attend(rule, *bring(*inputs)))
    if not keep:
      attend = jax.checkpoint(attend, static_argnums=0)
    return Engine(attend)

  def moved(inputs):
    """What makes values wide and brings them, and the values."""

    def move(values):
      given = with_floats(inputs[:4], _wide(values, shared))
      return floats(bring(*given, *inputs[4:])[:4])

    return move, floats(inputs[:4])

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def run(rule, *inputs):
    return give(inner.forward(rule, *bring(*inputs)))

  def forward(rule, *inputs):
    brought = bring(*inputs)
    results = inner.forward(rule, *brought)
    back = (
      jax.linear_transpose(give, results),
      jax.linear_transpose(*moved(inputs)),
    )
    return give(results), (brought if keep else inputs, results, back)

  def backward(rule, residuals, gradients):
    inputs, results, (taken, home) = residuals
    brought = inputs if keep else bring(*inputs)
    (gradients,) = taken(gradients)
    found = inner.backward(rule, *brought, *results, *gradients)
    as_sent = _wide(floats(brought[:4]), shared)
    found = jax.tree.map(lambda dx, x: dx.astype(x.dtype), found, as_sent)
    return *home(found)[0], None, None

  run.defvjp(forward, backward)

  def attend(rule, q, k, v, extras, query, key):
    inputs = alike((q, k, v, extras), (query, key))
    return run(rule, *inputs, query, key)

  return Engine(attend)


def _wide(values, shared):
  """As their gradients are to go home. A query is read by one device alone."""
  wide = lambda x: x.astype(accumulator(x))
  q, k, v, extras = values
  if shared:
    k, v = wide(k), wide(v)
  return q, k, v, jax.tree.map(wide, extras)
