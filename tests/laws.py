"""The laws of the contract, as functions that raise AssertionError.

Each takes a `Subject`: a mechanism, one set of its fields, inputs and weights.
`test_mechanisms.py` runs every law that a Spec claims on every mechanism, and
`test_mutants.py` runs each on mixers that are broken on purpose, which it must
reject.

Shapes are few and splits are data, so that each law compiles a program or two;
laws share those that a subject keeps. What depends on the class alone, and not
on its fields, is found out once for each class.
"""

import functools
import inspect
import itertools
import tracemalloc
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import registry
from jaxattn.nn import Policy
from jaxattn.packing import Packing
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import place
from jaxattn.state import nbytes
from jaxattn.typing import PyTree

WIDTH = 12
BATCH = 2
LENGTH = 13  # prime, longer than twice any window in the examples
PADS = 5
PACKED = LENGTH + PADS  # of all rows with a packing, so that one program serves
# Two orders of summation of the same float32 numbers: at most this far apart,
# relative to the RMS of the exact result.
ROUNDING = 1e-5
# Programs that run once: most of the time is the compiler's.
QUICK = {'xla_backend_optimization_level': 0}
# A choice that is closer than this may go either way in float32.
MARGIN = 1e-3


class Subject:
  """A mixer under test, with weights that are away from their initial zeros."""

  def __init__(self, cls, module, fields, spec=None):
    self.module = module
    self.spec = spec or module.SPEC
    self.fields = dict(fields)
    self.traced = 0  # how often `value_and_grads` was
    self.mixer = cls(width=WIDTH, **fields)
    init = jax.jit(self.mixer.init)
    for seed in range(7, 27):
      keys = jax.random.split(jax.random.key(seed), 4)
      self.x = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
      self.cotangent = jax.random.normal(keys[1], self.x.shape)
      self.variables = self._variables(init(keys[2], self.x), keys[3])
      if np.min(self.margin(self.x)) > MARGIN:
        return
    raise ValueError(f'{fields}: no inputs whose choices are clear by {MARGIN}')

  def _variables(self, variables, key):
    leaves, tree = jax.tree.flatten(variables['params'])
    noise = jax.random.split(key, len(leaves))
    params = jax.tree.unflatten(
      tree,
      [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, noise)
      ],
    )
    return {**variables, 'params': params}

  def __call__(self, variables, x, packing=None, **kw):
    return self.mixer.apply(variables, x, packing, **kw)

  def y(self, variables, x, packing=None):
    return self(variables, x, packing).y

  @functools.cached_property
  def value_and_grads(self):
    """(variables, x, packing, cotangent) -> y and gradients, one program.

    Gradients are by the parameters, {'params': ..}, and by x.
    """

    def loss(params, x, rest, packing, cotangent):
      self.traced += 1
      y = self.y({**rest, **params}, x, packing)
      return jnp.sum(y * cotangent), y

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)

    @jax.jit
    def both(variables, x, packing, cotangent):
      params, rest = trained(variables)
      grads, y = grad(params, x, rest, packing, cotangent)
      return y, grads

    return both

  @functools.cached_property
  def dense(self):
    """y and gradients of the dense rows: what most laws compare with."""
    return self.value_and_grads(self.variables, self.x, None, self.cotangent)

  @functools.cached_property
  def longer(self):
    """x and cotangent of PACKED tokens: after the last, the first again."""
    again = lambda a: np.concatenate([a, a[:, : PACKED - LENGTH]], axis=1)
    return again(self.x), again(self.cotangent)

  @functools.cached_property
  def influence(self):
    """(variables, x, packing) -> y, and how strongly it reacts, one program.

    Of one row: how strongly output t reacts to input s is number (t, s).
    """

    @jax.jit
    def both(variables, x, packing):
      y, back = jax.vjp(lambda x: self.y(variables, x, packing), x)
      at = jnp.eye(LENGTH)[:, None, :, None] * self.cotangent[:1]
      (grads,) = jax.vmap(back)(at.astype(y.dtype))
      return y, jnp.max(jnp.abs(grads[:, 0]), axis=-1)

    return both

  @functools.cached_property
  def naive(self):
    """(params, x, cotangent) -> y and gradients of the mechanism's formula.

    A program for each type of its inputs, which all is computed in.
    """
    formula = self.reference()

    def loss(params, x, cotangent):
      y = formula(params, x)
      return jnp.sum((y * cotangent).astype(jnp.float32)), y

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)

    @jax.jit
    def both(params, x, cotangent):
      grads, y = grad(params, x, cotangent)
      return y, grads

    return both

  def reference(self):
    """The mechanism's own formula with the mixer's fields, as f(params, x)."""
    return self.formula(self.module.reference)

  def formula(self, of):
    """A function of the mechanism's file, given fields and position."""
    fields = self.mixer_fields()
    if 'stats' in self.variables:
      fields['stats'] = self.variables['stats']
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
      given = place(mine, order, fields.get('heads'), x.shape[2], **own)
      # In the dtype of x, so that the formula can be had in bfloat16, too.
      for name, what in given.items():
        if callable(what):
          kw[name] = lambda a, what=what: what(a).astype(a.dtype)
        else:
          kw[name] = jnp.asarray(what).astype(x.dtype)
      return of(params, x, **fields, **kw)

    return formula

  def margin(self, x):
    """Where a mechanism chooses (top-k): how clear each token's choice is."""
    if not hasattr(self.module, 'margin'):
      return np.full(x.shape[:2], np.inf)
    return np.asarray(self._margin(self.variables['params'], x))

  @functools.cached_property
  def _margin(self):
    return jax.jit(self.formula(self.module.margin))

  def mixer_fields(self):
    skip = ('width', 'policy', 'parent', 'name')
    return {
      name: getattr(self.mixer, name)
      for name in type(self.mixer).__dataclass_fields__
      if name not in skip
    }


def trained(variables: PyTree) -> tuple[PyTree, PyTree]:
  """What gradients are taken by, {'params': ..}, and the other collections."""
  rest = {**variables}
  return {'params': rest.pop('params')}, rest


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
  Some gradients are two numbers, whose rounding errors may both be small by
  luck: so the naive error is the largest of three draws, for gradients are
  linear in the cotangent and multiples of it round differently.
  """
  inputs = (subject.variables['params'], subject.x, subject.cotangent)
  draws = [
    (scale, subject.naive(*inputs[:2], scale * inputs[2]))
    for scale in (1.0, 0.7, 1.3)
  ]
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), inputs)
    exact = jax.tree.map(np.asarray, subject.naive(*wide))
  y, (variables, x) = subject.dense
  fast = (y, (variables['params'], x))

  scaled = lambda scale: (exact[0], jax.tree.map(lambda g: scale * g, exact[1]))
  naive_errors = jax.tree.map(
    lambda *errors: max(errors),
    *(jax.tree.map(apart, naive, scaled(scale)) for scale, naive in draws),
  )
  leaves = zip(
    jax.tree_util.tree_leaves_with_path(exact),
    jax.tree.leaves(naive_errors),
    jax.tree.leaves(fast),
    strict=True,
  )
  for (path, exact), naive, fast in leaves:
    name = jax.tree_util.keystr(path)
    assert rms(exact) > 1e-6, f'{name} is zero: nothing is compared'
    error = apart(fast, exact)
    bound = 2 * naive + 8 * float(jnp.finfo(jnp.float32).eps)
    assert error <= bound, f'{name}: error {error:.2e}, allowed {bound:.2e}'


# ------------------------------------------------------------------- causality


def causality(subject: Subject) -> None:
  """No output depends on a later input; every output depends on its own.

  A Fourier transform rounds what is later into what is earlier: its dense rows
  are allowed 1e-6, beside its direct form, which packed rows take.
  """
  _sees_no_future(subject, None, subject.spec.fft)
  if subject.spec.fft:
    _sees_no_future(subject, Packing.dense(1, LENGTH), False)


def _sees_no_future(subject: Subject, packing, rounds: bool) -> None:
  x = subject.x[:1]
  run = lambda x: map(
    np.asarray, subject.influence(subject.variables, x, packing)
  )
  before, matrix = run(x)
  allowed = 1e-6 * np.max(matrix) if rounds else 0.0
  future = np.max(np.triu(matrix, 1))
  assert future <= allowed, f'an output reacts to a later input by {future:.1e}'
  assert np.all(np.diag(matrix) > allowed), 'an output ignores its own input'

  for at in (0, LENGTH // 2, LENGTH - 1):
    after, _ = run(x.at[:, at].add(1.0))
    if rounds:
      assert apart(after[:, :at], before[:, :at]) <= 1e-6, 'the past moves'
    else:
      assert_same(after[:, :at], before[:, :at], f'past of token {at}')
    assert np.any(after[:, at] != before[:, at]), f'token {at} changes nothing'


# ---------------------------------------------------------------- segmentation


def segmentation(subject: Subject) -> None:
  """Cutting a stream anywhere, and handing on the state, changes nothing."""
  _cut_by_data(subject)
  final = _uncut(subject)
  _cut_by_shape(subject, final)
  _step_by_step(subject, final)


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

  params, rest = trained(subject.variables)

  def loss(params, x, starts):
    y, state = cut({**rest, **params}, x, starts)
    return jnp.sum(y * subject.cotangent), (y, state)

  program = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

  rng = np.random.default_rng(3)
  whole = np.full((chunks + 1, BATCH), LENGTH)
  whole[0] = 0
  _, (_, final) = program(params, subject.x, whole)
  y, grads = subject.dense
  cuts = [
    np.sort(rng.integers(0, LENGTH + 1, whole.shape), 0) for _ in range(5)
  ]
  cuts.append(np.array([[0, 0], [1, 12], [1, 12], [2, 13], [13, 13]]))
  for starts in [whole, *cuts]:
    starts[0], starts[-1] = 0, LENGTH
    got_grads, (got, state) = program(params, subject.x, starts)
    where = f' with rows cut at {starts[1:-1].T.tolist()}'
    assert_close(got, y, 'y' + where)
    assert_close(got_grads, grads, 'gradient' + where, 10 * ROUNDING)
    assert_close(state, final, 'final state' + where)


def _uncut(subject: Subject) -> PyTree:
  """A call without a state may still ask for the one that it ends in."""
  call = functools.partial(subject.__call__, return_state=True)
  y, state = jax.jit(call)(subject.variables, subject.x)
  assert_close(y, subject.dense[0], 'y of a call that returns a state')
  return state


def _cut_by_shape(subject: Subject, final: PyTree) -> None:
  """Exact shapes, packing=None, and the rows reordered at each cut as beams.

  Chunks of no token stand at both ends, and one of a single token. That all of
  it may follow the first is in `_uncut`, whose call begins with such a state.
  """
  cuts = 0, 0, 5, LENGTH - 1, LENGTH, LENGTH
  swap = jnp.arange(BATCH)[::-1]

  @jax.jit
  def split(variables, x):
    state, parts = subject.mixer.init_state(BATCH, LENGTH), []
    for begin, end in itertools.pairwise(cuts):
      x, state, parts = jax.tree.map(lambda a: a[swap], (x, state, parts))
      y, state = subject(
        variables, x[:, begin:end], state=state, return_state=True
      )
      parts.append(y)
    return jax.tree.map(lambda a: a[swap], (parts, state))

  parts, state = split(subject.variables, subject.x)
  assert [part.shape[1] for part in parts] == list(np.diff(cuts))
  assert len(parts) % 2 == 1  # with the last swap rows are where they were
  y, _ = subject.dense
  assert_close(np.concatenate(parts, axis=1), y, 'y with rows swapped at cuts')
  assert_close(state, final, 'final state with rows swapped at cuts')


def _step_by_step(subject: Subject, final: PyTree) -> None:
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
    state, y = jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1), state

  got, state = steps(subject.variables, subject.x)
  assert_close(got, y, 'y step by step')
  # So a step may also follow what a longer chunk leaves.
  assert_close(state, final, 'final state step by step')


def state_bytes(subject: Subject) -> None:
  """The memory has the size that the Spec's formula gives."""
  for length in (LENGTH, 4 * LENGTH):
    state = jax.eval_shape(lambda n=length: subject.mixer.init_state(BATCH, n))
    measured = nbytes(state.memory)
    formula = BATCH * subject.spec.state_bytes(subject.mixer, WIDTH, length)
    assert measured == formula, f'{measured} bytes, the Spec says {formula}'


# --------------------------------------------------------------------- padding

# Where the real tokens of the two rows stand among the pads.
PLACES = {
  'right': [range(LENGTH), range(LENGTH)],
  'left': [range(PADS, PACKED)] * 2,
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
      wide = np.full((BATCH, PACKED, *values.shape[2:]), fill)
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

  nothing = Packing(*np.zeros((2, BATCH, PACKED), np.int32))
  y, grads = subject.value_and_grads(
    subject.variables,
    np.full((BATCH, PACKED, WIDTH), np.nan, np.float32),
    nothing,
    np.ones((BATCH, PACKED, WIDTH), np.float32),
  )
  for leaf in jax.tree.leaves((y, grads)):
    assert not np.any(leaf), 'rows of pads alone give something'


# --------------------------------------------------------------------- packing


def packing(subject: Subject) -> None:
  """Documents that share a row do not see each other, gradients included."""
  cuts = [(0, 4, 9, PACKED), (0, 1, 12, PACKED)]
  segments = np.zeros((BATCH, PACKED), np.int32)
  for row, ends in enumerate(cuts):
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
      segments[row, begin:end] = i + 1
  together = Packing.from_segments(segments)
  x, cotangent = subject.longer
  y, (grad_variables, grad_x) = subject.value_and_grads(
    subject.variables, x, together, cotangent
  )

  # Each document alone: the i-th of both rows, padded on the right.
  total = jax.tree.map(np.zeros_like, grad_variables)
  for i in range(3):
    begin = np.array([[ends[i]] for ends in cuts])
    length = np.array([[ends[i + 1] - ends[i]] for ends in cuts])
    alone = Packing.from_lengths(length[:, 0], PACKED)
    at = np.minimum(begin + np.arange(PACKED), PACKED - 1)[..., None]
    take = lambda a, at=at: np.take_along_axis(np.asarray(a), at, axis=1)
    own = (np.arange(PACKED) < length)[..., None]
    want, (got_variables, want_x) = subject.value_and_grads(
      subject.variables,
      take(x),
      alone,
      np.where(own, take(cotangent), 0),
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
  alone, _ = subject.influence(subject.variables, subject.x[:1], None)
  assert_close(alone, y[:1], 'a row alone')


# ---------------------------------------------------------------------- layout


def layout(subject: Subject) -> None:
  """Tokens may lie in any order, if their packing lies in the same."""
  segments = np.array([[1] * 8 + [2] * 3 + [0] * 7, [0] * 6 + [3] * 12])
  segments = segments.astype(np.int32)
  order = np.asarray(Packing.from_segments(segments).order)
  x, cotangent = subject.longer
  want, (want_variables, want_x) = subject.value_and_grads(
    subject.variables, x, Packing(order, segments), cotangent
  )
  rng = np.random.default_rng(5)
  places = np.stack([rng.permutation(PACKED) for _ in range(BATCH)])
  take = lambda a: np.asarray(a)[np.arange(BATCH)[:, None], places]
  got, (got_variables, got_x) = subject.value_and_grads(
    subject.variables,
    take(x),
    Packing(take(order), take(segments)),
    take(cotangent),
  )
  assert_close(got, take(want), 'y of shuffled tokens')
  assert_close(got_x, take(want_x), 'gradient of x, shuffled', 10 * ROUNDING)
  assert_close(got_variables, want_variables, 'gradient', 10 * ROUNDING)


# -------------------------------------------------------------------- bfloat16


DRAWS = 6  # of inputs: a parameter may have two numbers, and luck averages out


def bfloat16(subject: Subject) -> None:
  """As exact as the formula computed in bfloat16 throughout, within a factor 2.

  Errors are means over a few draws of the inputs. Tokens whose choice (top-k)
  rounding may turn over are left out.
  """
  half = jnp.dtype('bfloat16')
  mixer = type(subject.mixer)(
    width=WIDTH, policy=Policy(dtype='bfloat16'), **subject.fields
  )
  params, rest = trained(subject.variables)

  @jax.jit
  def fast(params, x, cotangent):
    def loss(params, x):
      y = mixer.apply({**rest, 'params': params}, x).y
      return jnp.sum((y * cotangent).astype(jnp.float32)), y

    grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, grads

  params = params['params']
  short = jax.tree.map(lambda a: a.astype(half), params)
  errors = []
  for keys in jax.random.split(jax.random.key(17), (DRAWS, 2)):
    x, cotangent = (jax.random.normal(k, subject.x.shape, half) for k in keys)
    clear = subject.margin(x.astype(jnp.float32)) > 0.1
    assert np.mean(clear) > 0.2, 'too few tokens are left'
    cotangent = jnp.where(clear[..., None], cotangent, 0)
    got, rough = fast(params, x, cotangent), subject.naive(short, x, cotangent)
    with jax.enable_x64(True):
      wide = jax.tree.map(
        lambda a: np.asarray(a, np.float64), (params, x, cotangent)
      )
      exact = jax.tree.map(np.asarray, subject.naive(*wide))
    pair = lambda a, b, z: np.array([apart(a, z), apart(b, z)])
    used = [
      (np.where(cotangent != 0, y, 0), grads)
      for y, grads in (got, rough, exact)
    ]
    errors.append(jax.tree.map(pair, *used))
  assert got[0].dtype == half, f'y is {got[0].dtype}'
  dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
  assert dtypes(got[1][0]) == dtypes(params), 'gradients change their dtype'
  means = jax.tree.map(lambda *draws: np.mean(draws, axis=0), *errors)
  for path, (error, bound) in jax.tree_util.tree_leaves_with_path(means):
    name = jax.tree_util.keystr(path)
    bound = 2 * bound + float(jnp.finfo(half).eps)
    assert error <= bound, f'{name}: error {error:.2e}, allowed {bound:.2e}'


# --------------------------------------------------------------------- lengths

LENGTHS = (0, 1, 2, 3, 15, 17, 63)  # about chunks of 16 and 64
LONGEST = 65  # a chunk of 64 and one more


def lengths(subject: Subject) -> None:
  """A short input gives what the beginning of a long one gives."""
  x = jax.random.normal(jax.random.key(11), (BATCH, LONGEST, WIDTH))
  cotangent = np.array(jax.random.normal(jax.random.key(12), x.shape))
  cotangent[:, 17:] = 0
  whole, (params, grad_x) = subject.value_and_grads(
    subject.variables, x, None, cotangent
  )

  @functools.partial(jax.jit, compiler_options=QUICK)
  def short(variables, x):
    """All of them in one program, in which each is a part of its own."""
    return [subject.y(variables, x[:, :length]) for length in LENGTHS]

  for length, got in zip(LENGTHS, short(subject.variables, x)):
    assert got.shape == (BATCH, length, WIDTH)
    assert_close(got, whole[:, :length], f'y of {length} tokens')

  # Gradients of 17 tokens are had of a row with a pad, see PACKED.
  _, (got_params, got_x) = subject.value_and_grads(
    subject.variables,
    x[:, :PACKED],
    Packing.from_lengths(np.full(BATCH, 17), PACKED),
    cotangent[:, :PACKED],
  )
  assert_close(got_params, params, 'gradient of 17 tokens', 10 * ROUNDING)
  assert_close(got_x[:, :17], grad_x[:, :17], 'gradient of x', 10 * ROUNDING)


# --------------------------------------------------------------------- initial


def initial(subject: Subject) -> None:
  """A new layer of default fields keeps the scale, and all of it learns."""
  scale, grads = _as_new(type(subject.mixer))
  assert 0.2 <= scale <= 5, (
    f'the output has {scale:.2g} times the RMS of the input'
  )
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path)
    assert np.all(np.isfinite(grad)), f'the gradient of {name} is not finite'
    assert rms(grad) > 1e-6, f'{name} gets no gradient'


@functools.cache
def _as_new(cls) -> tuple[float, PyTree]:
  """RMS of the output over that of the input, and gradients."""
  mixer = cls(width=64)
  x = jax.random.normal(jax.random.key(3), (2, 32, 64))
  cotangent = jax.random.normal(jax.random.key(4), x.shape)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(key, x):
    params, rest = trained(mixer.init(key, x))

    def loss(params):
      y = mixer.apply({**rest, **params}, x).y
      return jnp.sum(y * cotangent), y

    grads, y = jax.grad(loss, has_aux=True)(params)
    return y, grads

  y, grads = both(jax.random.key(5), x)
  return rms(y) / rms(x), grads


# --------------------------------------------------------------------- tracing


def tracing(subject: Subject) -> None:
  """Traced once for a shape; at the size of a 7B model nothing is t x s."""
  traced = []  # not by the first, where another law has come to this shape
  for cut in (4, 9):
    packing = Packing.from_segments([[1] * cut + [2] * (PACKED - cut)] * BATCH)
    x, cotangent = subject.longer
    subject.value_and_grads(subject.variables, cut * x, packing, cotangent)
    traced.append(subject.traced)
  assert traced[0] == traced[1] > 0, 'other values trace anew'

  peak = _peak(type(subject.mixer))
  # A mask of t x s bits would be 2^27 bytes.
  assert peak < 2**26, f'tracing takes {peak / 2**20:.0f} MiB on the host'


@functools.cache
def _peak(cls) -> int:
  """Bytes on the host that tracing takes at the size of a 7B model."""
  mixer = cls(width=4096)
  x = jax.ShapeDtypeStruct((1, 2**15, 4096), jnp.float32)

  def loss(params, rest, x):
    return jnp.sum(mixer.apply({**rest, **params}, x).y)

  tracemalloc.start()
  try:
    params, rest = trained(jax.eval_shape(mixer.init, jax.random.key(0), x))
    jax.eval_shape(jax.grad(loss), params, rest, x)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  return peak


# -------------------------------------------------------------------- sharding


def sharding(subject: Subject) -> None:
  """Time over devices changes nothing: outputs, gradients, packed rows.

  Needs eight devices; two hold halves of the batch, four a quarter of time. One
  length does not divide.
  """
  rows = np.array([[1] * 7 + [2] * 6, [0, 0] + [1] * 9 + [0, 2]], np.int32)
  whole = np.ones_like(rows)
  for mode, segments, length in (
    ('explicit', rows, LENGTH - 1),
    ('explicit', rows, LENGTH),
    ('auto', whole, LENGTH - 1),
  ):
    # On one device, tokens beyond the length are pads: so one program serves.
    kept = np.where(np.arange(LENGTH) < length, segments, 0)
    y, (grad_variables, grad_x) = subject.value_and_grads(
      subject.variables,
      subject.x,
      Packing.from_segments(kept),
      subject.cotangent,
    )
    want = y[:, :length], (grad_variables, grad_x[:, :length])
    x, cotangent = subject.x[:, :length], subject.cotangent[:, :length]
    packing = Packing.from_segments(segments[:, :length])
    mesh = meshes.make(data=2, seq=4, axis_types=mode)
    where = jax.NamedSharding(mesh, place.tokens(BATCH, length, mesh))
    put = lambda a, where=where: jax.device_put(a, where)
    with jax.set_mesh(mesh):
      got = subject.value_and_grads(
        subject.variables,
        put(x),
        None if segments is whole else jax.tree.map(put, packing),
        put(cotangent),
      )
    assert not got[0].sharding.is_fully_replicated, f'{mode}: y is whole'
    assert_close(got[0], want[0], f'{mode}: y')
    assert_close(got[1], want[1], f'{mode}: gradient', 10 * ROUNDING)
