"""The laws of the contract, as functions that raise AssertionError.

Each takes a `Subject`: a mechanism, one set of its fields, inputs and weights.
`test_mechanisms.py` runs every law that a Spec claims on every mechanism, and
`test_mutants.py` runs each on mixers that are broken on purpose, which it must
reject.

Shapes are few and splits are data, so that each law compiles a program or two.
"""

import functools
import inspect
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import registry
from jaxattn.packing import Packing
from jaxattn.state import nbytes
from jaxattn.typing import PyTree

WIDTH = 12
BATCH = 2
LENGTH = 13  # prime, longer than twice any window in the examples
# Two orders of summation of the same float32 numbers: at most this far apart,
# relative to the RMS of the exact result.
ROUNDING = 1e-5


class Subject:
  """A mixer under test, with weights that are away from their initial zeros."""

  def __init__(self, cls, module, fields, spec=None):
    self.module = module
    self.spec = spec or module.SPEC
    self.fields = dict(fields)
    self.mixer = cls(width=WIDTH, **fields)
    keys = jax.random.split(jax.random.key(7), 4)
    self.x = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
    self.cotangent = jax.random.normal(keys[1], self.x.shape)
    self.variables = self._variables(keys[2:])

  def _variables(self, keys):
    variables = jax.jit(self.mixer.init)(keys[0], self.x)
    leaves, tree = jax.tree.flatten(variables)
    noise = jax.random.split(keys[1], len(leaves))
    return jax.tree.unflatten(
      tree,
      [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, noise)
      ],
    )

  def __call__(self, variables, x, packing=None, **kw):
    return self.mixer.apply(variables, x, packing, **kw)

  def y(self, variables, x, packing=None):
    return self(variables, x, packing).y

  @functools.cached_property
  def value_and_grads(self):
    """(variables, x, packing, cotangent) -> y and gradients, one program."""

    def loss(variables, x, packing, cotangent):
      y = self.y(variables, x, packing)
      return jnp.sum(y * cotangent), y

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)

    @jax.jit
    def both(variables, x, packing, cotangent):
      grads, y = grad(variables, x, packing, cotangent)
      return y, grads

    return both

  @functools.cached_property
  def dense(self):
    """y and gradients of the dense rows: what most laws compare with."""
    return self.value_and_grads(self.variables, self.x, None, self.cotangent)

  def reference(self):
    """The mechanism's own formula with the mixer's fields, as f(params, x)."""
    fields = self.mixer_fields()
    encoding = fields.pop('position', 'none')
    name = registry.position_name(encoding)
    own = dict(encoding) if isinstance(encoding, Mapping) else {}
    own.pop('name', None)
    place = registry.position_module(name).reference
    if 'causal' in inspect.signature(place).parameters:
      own['causal'] = self.mixer.causal
    known = inspect.signature(place).parameters
    own = {field: value for field, value in own.items() if field in known}

    def formula(params, x, **kw):
      order = np.arange(x.shape[1])
      mine = params.get('position', {})
      kw |= place(mine, order, fields.get('heads'), x.shape[2], **own)
      return self.module.reference(params, x, **fields, **kw)

    return formula

  def mixer_fields(self):
    skip = ('width', 'policy', 'parent', 'name')
    return {
      name: getattr(self.mixer, name)
      for name in type(self.mixer).__dataclass_fields__
      if name not in skip
    }


def rms(tree) -> float:
  return float(np.sqrt(np.mean(np.square(np.asarray(tree, np.float64)))))


def apart(got, want) -> float:
  """Largest difference, relative to the RMS of what is wanted."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  if got.shape != want.shape:
    return np.inf
  if not got.size:
    return 0.0
  return float(np.max(np.abs(got - want)) / max(rms(want), 1e-30))


def _real(tree: PyTree) -> PyTree:
  """Complex leaves as pairs of numbers, so that all can be compared."""

  def pair(a):
    a = np.asarray(a)
    return np.stack([a.real, a.imag]) if np.iscomplexobj(a) else a

  return jax.tree.map(pair, tree)


def assert_close(got: PyTree, want: PyTree, what: str, tolerance=ROUNDING):
  got, want = _real(got), _real(want)
  paths = jax.tree_util.tree_leaves_with_path(want)
  leaves = jax.tree.leaves(got)
  assert len(leaves) == len(paths), f'{what}: another structure'
  for (path, right), left in zip(paths, leaves):
    name = what + jax.tree_util.keystr(path)
    assert np.all(np.isfinite(left)), f'{name}: not finite'
    error = apart(left, right)
    assert error <= tolerance, (
      f'{name}: {error:.2e} apart, over {tolerance:.0e}'
    )


def assert_same(got, want, what: str):
  assert np.array_equal(np.asarray(got), np.asarray(want)), f'{what}: differs'


# ------------------------------------------------------------------- reference


def reference(subject: Subject) -> None:
  """Values and gradients are those of the formula in float64.

  err(fast, exact) <= 2 err(naive, exact) + eps, where naive is the formula in
  float32 and err is the largest difference over the RMS of the exact result.
  """
  formula = subject.reference()

  def both(params, x, cotangent):
    loss = lambda params, x: jnp.sum(formula(params, x) * cotangent)
    grads = jax.grad(loss, argnums=(0, 1))(params, x)
    return formula(params, x), grads

  inputs = (subject.variables['params'], subject.x, subject.cotangent)
  naive = jax.jit(both)(*inputs)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), inputs)
    exact = jax.tree.map(np.asarray, jax.jit(both)(*wide))
  y, (variables, x) = subject.dense
  fast = (y, (variables['params'], x))

  leaves = zip(
    jax.tree_util.tree_leaves_with_path(exact),
    jax.tree.leaves(naive),
    jax.tree.leaves(fast),
    strict=True,
  )
  for (path, exact), naive, fast in leaves:
    name = jax.tree_util.keystr(path)
    assert rms(exact) > 1e-6, f'{name} is zero: nothing is compared'
    error = apart(fast, exact)
    bound = 2 * apart(naive, exact) + 8 * float(jnp.finfo(jnp.float32).eps)
    assert error <= bound, f'{name}: error {error:.2e}, allowed {bound:.2e}'


# ------------------------------------------------------------------- causality


def causality(subject: Subject) -> None:
  """No output depends on a later input; every output depends on its own."""
  variables, x = subject.variables, subject.x[:1]

  @jax.jit
  def influence(x):
    """How strongly output t reacts to input s: (t, s)."""
    y, back = jax.vjp(lambda x: subject.y(variables, x), x)
    at = jnp.eye(LENGTH)[:, None, :, None] * subject.cotangent[:1]
    (grads,) = jax.vmap(back)(at.astype(y.dtype))
    return jnp.max(jnp.abs(grads[:, 0]), axis=-1)

  matrix = np.asarray(influence(x))
  allowed = 1e-6 * np.max(matrix) if subject.spec.fft else 0.0
  future = np.max(np.triu(matrix, 1))
  assert future <= allowed, f'an output reacts to a later input by {future:.1e}'
  assert np.all(np.diag(matrix) > allowed), 'an output ignores its own input'

  y = jax.jit(subject.y)
  before = np.asarray(y(variables, x, None))
  for at in (0, LENGTH // 2, LENGTH - 1):
    after = np.asarray(y(variables, x.at[:, at].add(1.0), None))
    if subject.spec.fft:
      assert apart(after[:, :at], before[:, :at]) <= 1e-6, 'the past moves'
    else:
      assert_same(after[:, :at], before[:, :at], f'past of token {at}')
    assert np.any(after[:, at] != before[:, at]), f'token {at} changes nothing'


# ---------------------------------------------------------------- segmentation


def segmentation(subject: Subject) -> None:
  """Cutting a stream anywhere, and handing on the state, changes nothing."""
  _cut_by_data(subject)
  _cut_by_shape(subject)
  _step_by_step(subject)


def _cut_by_data(subject: Subject, chunks: int = 4) -> None:
  """Random cuts with one program: each chunk is padded to the whole length.

  Rows are cut at different places, empty chunks included, and gradients flow
  through the states.
  """
  mixer, order = subject.mixer, jnp.arange(LENGTH)

  def cut(variables, x, starts):
    """starts: (chunks + 1, b), where each row's chunks begin and end."""

    def chunk(state, ends):
      begin, end = ends
      place = begin[:, None] + order[None]
      valid = (place < end[:, None]) & (place < LENGTH)
      take = jnp.where(valid, place, 0)
      piece = jnp.take_along_axis(x, take[..., None], axis=1)
      packing = Packing(jnp.where(valid, place, 0), valid.astype(jnp.int32))
      y, state = subject(
        variables, piece, packing, state=state, return_state=True
      )
      back = jnp.where(valid, place, LENGTH)
      put = lambda row, at: jnp.zeros_like(row).at[at].set(row, mode='drop')
      return state, jax.vmap(put)(y, back)

    state = mixer.init_state(BATCH, LENGTH)
    state, parts = jax.lax.scan(chunk, state, (starts[:-1], starts[1:]))
    return jnp.sum(parts, axis=0), state

  def loss(variables, x, starts):
    y, state = cut(variables, x, starts)
    return jnp.sum(y * subject.cotangent), (y, state)

  program = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

  rng = np.random.default_rng(3)
  whole = np.full((chunks + 1, BATCH), LENGTH)
  whole[0] = 0
  _, (_, final) = program(subject.variables, subject.x, whole)
  y, grads = subject.dense
  cuts = [
    np.sort(rng.integers(0, LENGTH + 1, whole.shape), 0) for _ in range(5)
  ]
  cuts.append(np.array([[0, 0], [1, 12], [1, 12], [2, 13], [13, 13]]))
  for starts in [whole, *cuts]:
    starts[0], starts[-1] = 0, LENGTH
    got_grads, (got, state) = program(subject.variables, subject.x, starts)
    where = f' with rows cut at {starts[1:-1].T.tolist()}'
    assert_close(got, y, 'y' + where)
    assert_close(got_grads, grads, 'gradient' + where, 10 * ROUNDING)
    assert_close(state, final, 'final state' + where)


def _cut_by_shape(subject: Subject) -> None:
  """Exact shapes, packing=None, and the rows reordered at the cut as beams."""
  y, _ = subject.dense
  swap = jnp.arange(BATCH)[::-1]

  @functools.partial(jax.jit, static_argnums=2)
  def split(variables, x, at):
    state = subject.mixer.init_state(BATCH, LENGTH)
    first, state = subject(variables, x[:, :at], state=state, return_state=True)
    state = jax.tree.map(lambda a: a[swap], state)
    second, state = subject(
      variables, x[swap, at:], state=state, return_state=True
    )
    return first, second[swap], state

  for at in (0, 5, LENGTH - 1, LENGTH):
    first, second, _ = split(subject.variables, subject.x, at)
    assert first.shape[1] == at
    got = np.concatenate([first, second], axis=1)
    assert_close(got, y, f'y with rows swapped at {at}')

  # Without a state a call may still ask for the one that it ends in.
  whole, state = jax.jit(
    functools.partial(subject.__call__, return_state=True)
  )(subject.variables, subject.x)
  assert_close(whole, y, 'y of a call that returns a state')
  _, _, final = split(subject.variables, subject.x, LENGTH)
  swapped = jax.tree.map(lambda a: a[swap], final)
  assert_close(state, swapped, 'state of a call without one')


def _step_by_step(subject: Subject) -> None:
  """One token at a time: decoding."""
  y, _ = subject.dense

  @jax.jit
  def steps(variables, x):
    def step(state, token):
      y, state = subject(
        variables, token[:, None], state=state, return_state=True
      )
      return state, y[:, 0]

    state = subject.mixer.init_state(BATCH, LENGTH)
    _, y = jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1)

  assert_close(steps(subject.variables, subject.x), y, 'y step by step')


def state_bytes(subject: Subject) -> None:
  """The memory has the size that the Spec's formula gives."""
  for length in (LENGTH, 4 * LENGTH):
    state = jax.eval_shape(lambda n=length: subject.mixer.init_state(BATCH, n))
    measured = nbytes(state.memory)
    formula = BATCH * subject.spec.state_bytes(subject.mixer, WIDTH, length)
    assert measured == formula, f'{measured} bytes, the Spec says {formula}'


# --------------------------------------------------------------------- padding

PADS = 5
# Where the real tokens of the two rows stand among the pads.
PLACES = {
  'right': [range(LENGTH), range(LENGTH)],
  'left': [range(PADS, LENGTH + PADS)] * 2,
  'both': [range(2, LENGTH + 2), range(4, LENGTH + 4)],
  'inside': [
    [i + (i > 2) + 3 * (i > 7) for i in range(LENGTH)],
    [i + PADS * (i > 0) for i in range(LENGTH)],
  ],
}


def padding(subject: Subject) -> None:
  """Pads are invisible wherever they stand, even if they hold NaN."""
  want, (grad_variables, grad_x) = subject.dense
  rows = np.arange(BATCH)[:, None]
  for name, places in PLACES.items():
    at = np.array([list(row) for row in places])

    def spread(values, fill, at=at):
      wide = np.full((BATCH, LENGTH + PADS, *values.shape[2:]), fill)
      wide[rows, at] = values
      return wide.astype(values.dtype)

    order = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), at.shape)
    packing = Packing(spread(order, 0), spread(np.ones_like(order), 0))
    y, (got_variables, got_x) = subject.value_and_grads(
      subject.variables,
      spread(np.asarray(subject.x), np.nan),
      packing,
      spread(np.asarray(subject.cotangent), 1.0),
    )
    pads = np.asarray(packing.segments) == 0
    assert not np.any(np.asarray(y)[pads]), f'{name}: y is not 0 at pads'
    assert not np.any(np.asarray(got_x)[pads]), f'{name}: pads get gradients'
    assert_close(np.asarray(y)[rows, at], want, f'{name} pads: y')
    assert_close(
      np.asarray(got_x)[rows, at],
      grad_x,
      f'{name} pads: gradient of x',
      10 * ROUNDING,
    )
    assert_close(
      got_variables, grad_variables, f'{name} pads: gradient', 10 * ROUNDING
    )

  nothing = Packing(*np.zeros((2, BATCH, LENGTH + PADS), np.int32))
  y, grads = subject.value_and_grads(
    subject.variables,
    np.full((BATCH, LENGTH + PADS, WIDTH), np.nan, np.float32),
    nothing,
    np.ones((BATCH, LENGTH + PADS, WIDTH), np.float32),
  )
  for leaf in jax.tree.leaves((y, grads)):
    assert not np.any(leaf), 'rows of pads alone give something'


# --------------------------------------------------------------------- packing


def packing(subject: Subject) -> None:
  """Documents that share a row do not see each other, gradients included."""
  cuts = [(0, 4, 9, LENGTH), (0, 1, 12, LENGTH)]
  segments = np.zeros((BATCH, LENGTH), np.int32)
  for row, ends in enumerate(cuts):
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
      segments[row, begin:end] = i + 1
  together = Packing.from_segments(segments)
  y, (grad_variables, grad_x) = subject.value_and_grads(
    subject.variables, subject.x, together, subject.cotangent
  )

  # Each document alone: the i-th of both rows, padded on the right.
  total = jax.tree.map(np.zeros_like, grad_variables)
  for i in range(3):
    begin = np.array([[ends[i]] for ends in cuts])
    length = np.array([[ends[i + 1] - ends[i]] for ends in cuts])
    alone = Packing.from_lengths(length[:, 0], LENGTH)
    at = np.minimum(begin + np.arange(LENGTH), LENGTH - 1)[..., None]
    take = lambda a, at=at: np.take_along_axis(np.asarray(a), at, axis=1)
    own = (np.arange(LENGTH) < length)[..., None]
    want, (got_variables, want_x) = subject.value_and_grads(
      subject.variables,
      take(subject.x),
      alone,
      np.where(own, take(subject.cotangent), 0),
    )
    assert_close(
      np.where(own, take(y), 0), np.where(own, want, 0), f'document {i}: y'
    )
    assert_close(
      np.where(own, take(grad_x), 0),
      np.where(own, want_x, 0),
      f'document {i}: gradient of x',
      10 * ROUNDING,
    )
    total = jax.tree.map(np.add, total, got_variables)
  assert_close(grad_variables, total, 'gradient', 10 * ROUNDING)


# ----------------------------------------------------------------------- batch


def batch(subject: Subject) -> None:
  """Rows do not see each other: not in values, not in gradients."""
  y, _ = subject.dense
  other = subject.x.at[1:].multiply(-3.0)
  only_first = subject.cotangent.at[1:].set(0.0)
  got, (_, grad_x) = subject.value_and_grads(
    subject.variables, other, None, only_first
  )
  assert_same(got[0], y[0], 'first row, beside another second row')
  assert not np.any(np.asarray(grad_x)[1:]), 'another row gets a gradient'
  alone = jax.jit(subject.y)(subject.variables, subject.x[:1], None)
  assert_close(alone, y[:1], 'a row alone')
