"""One training step, as one compiled program.

    loss = sum_i w_i loss_i / sum_i w_i          over the whole batch

loss_i is what the task's `losses` says of position i. What mechanisms sow into
the collection `losses`, as pairs (sum, count), is added to what is minimised,
each pair as its mean; it is not part of the loss that is reported.

The batch comes in `accumulate` slices, one after the other through the same
program, and the gradients add up: since the weights are summed before any slice
is run, slices of unequal weight still make the gradient of the loss above.

A step whose loss, gradient or update is not finite changes nothing. It leaves
its number in `stopped_at`, and from then on no step does anything, so whoever
looks at the state some steps later still finds the last good one.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattn import registry
from jaxattn.packing import Packing
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import place, sequence, stripe
from jaxattn.tasks.batch import Batch, weighed
from jaxattn.train import build
from jaxattn.typing import Array, PyTree

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
  """All that a run remembers from one step to the next.

  Attributes:
    step: number of updates made.
    params: the weights.
    stats: what is updated without gradients ({} if nothing is).
    opt_state: the optimiser's.
    stopped_at: the first step that was not finite; -1 while there is none.
  """

  step: Array
  params: PyTree
  stats: PyTree
  opt_state: PyTree
  stopped_at: Array

  def variables(self) -> dict[str, PyTree]:
    """What the model is applied with."""
    return {'params': self.params, 'stats': self.stats}


class Programs(NamedTuple):
  """The compiled programs of a run; call them under its mesh.

  Attributes:
    init: () -> TrainState.
    train: (state, batch) -> (state, metrics). The state given is used up.
    evaluate: (variables, batch) -> {metric: (sum, count)}.
    shapes: TrainState of shapes with shardings, what a checkpoint restores to.
  """

  init: Callable[[], TrainState]
  train: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
  evaluate: Callable[[PyTree, Batch], dict[str, tuple]]
  shapes: TrainState


@dataclass(frozen=True)
class Feed:
  """A task's batches on the mesh, in slices: every leaf is 'a b t'.

  Each process makes only the rows that its devices hold. A row is made whole,
  for a task is a function of rows, but goes to devices in parts: where `seq`
  spans processes, each places its own part of time alone. A row whose length
  does not divide among them is filled up with padding, of weight 0: so every
  device holds its part and no more, and what is computed stays the same.

  Attributes:
    task: where rows come from.
    batch: rows of a training step.
    accumulate: slices of a batch.
    mesh: its `data` axis splits the rows of each slice, and its `seq` axis
      time.
    layout: of training tokens over `seq`, see `parallel.stripe`; test batches
      lie as they are, for metrics may tell places apart.

  Raises:
    ValueError: the rows do not divide.
  """

  task: Any
  batch: int
  accumulate: int
  mesh: jax.sharding.Mesh
  layout: str = 'contiguous'

  def __post_init__(self):
    parts = self.mesh.shape[meshes.DATA]
    if self.batch % (self.accumulate * parts):
      raise ValueError(
        f'batch={self.batch} rows do not divide into accumulate='
        f'{self.accumulate} slices over data={parts} devices; a multiple of '
        f'{self.accumulate * parts} would'
      )

  @classmethod
  def of(cls, config, task, model, mesh) -> 'Feed':
    """That of a complete configuration; its layout is asked for, or chosen."""
    specs = {name: registry.spec(name) for name in model.layers()}
    with jax.set_mesh(mesh):
      layout = sequence.layout(specs, config['layout'])
    feed = cls(task, config['batch'], config['accumulate'], mesh, layout)
    if feed.length > task.length:
      log.info(
        'rows of %d tokens are filled up to %d, for seq=%d devices to share',
        *(task.length, feed.length, mesh.shape[meshes.SEQ]),
      )
    return feed

  @property
  def length(self) -> int:
    """Tokens of a row, with those that fill it up."""
    parts = self.mesh.shape[meshes.SEQ]
    return stripe.filled(self.task.length, parts, self.layout)

  @property
  def rows(self) -> int:
    """Rows of a slice."""
    return self.batch // self.accumulate

  def train(self, step: int) -> Batch:
    """The batch of a training step."""
    index = self._mine()
    batch = self.task.batch('train', step, index.ravel())
    batch = self._filled(batch, self.layout)
    if self.layout != 'contiguous':
      batch = stripe.lay(batch, self.mesh.shape[meshes.SEQ], self.layout)
    return self._spread(batch, index)

  def test(self, number: int) -> Batch:
    """Batch `number` of the test set, read from its first row on.

    What exceeds the test set is filled up with rows of weight 0.
    """
    index = self._mine() + number * self.batch
    last = self.task.test_rows - 1
    batch = self.task.batch('test', 0, np.minimum(index, last).ravel())
    exists = (index <= last).reshape(-1, *(1,) * (batch.weights.ndim - 1))
    weights = np.where(exists, batch.weights, np.zeros_like(batch.weights))
    batch = Batch(batch.inputs, batch.targets, weights, batch.packing)
    return self._spread(self._filled(batch, 'contiguous'), index)

  def tests(self, most: int) -> int:
    """Number of test batches, at most `most`."""
    return min(most, -(-self.task.test_rows // self.batch))

  def blank(self) -> tuple[Array, Packing | None]:
    """Inputs of a slice, all zero, and a packing where a layout wants one."""
    inputs = build.blank(build.facts(self.task), self.rows)
    if self.layout == 'contiguous':
      return inputs, None
    return inputs, Packing.dense(*inputs.shape[:2])

  def packing(self, batch: Batch, layout: str) -> Packing | None:
    """Where the tokens of a task's rows stand, if that needs to be said."""
    near, packing = layout == 'contiguous', batch.packing
    if packing is None:
      if near and self.length == self.task.length:
        return None
      packing = Packing.dense(*batch.weights.shape)
      packing = dataclasses.replace(packing, whole=True)
    return dataclasses.replace(packing, whole=packing.whole and near)

  def _filled(self, batch: Batch, layout: str) -> Batch:
    """Rows with padding behind them, so that time divides."""
    batch = dataclasses.replace(batch, packing=self.packing(batch, layout))
    fill = self.length - self.task.length
    if not fill:
      return batch
    behind = lambda x: [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)
    return jax.tree.map(lambda x: np.pad(x, behind(x)), batch)

  def _mine(self) -> np.ndarray:
    """'a b': numbers of the rows that this process makes."""
    shape = (self.accumulate, self.rows)
    places = self._sharding().addressable_devices_indices_map(shape)
    columns = np.arange(self.rows)
    mine = np.unique(np.concatenate([columns[c] for _, c in places.values()]))
    return np.arange(self.accumulate)[:, None] * self.rows + mine

  def _spread(self, batch: Batch, index: np.ndarray) -> Batch:
    """Places rows, of which `index` tells the numbers, 'a b'."""
    mine = index[0] % self.rows  # places in a slice, ascending

    def spread(rows):
      rows = np.asarray(rows)
      rows = rows.reshape(*index.shape, *rows.shape[1:])
      shape = (self.accumulate, self.rows, *rows.shape[2:])
      spec = jax.P(None, *place.tokens(*shape[1:3], self.mesh))

      def part(where):
        slices, columns, *rest = where
        columns = np.searchsorted(mine, np.arange(self.rows)[columns])
        return rows[slices, :, *rest][:, columns]

      return jax.make_array_from_callback(
        shape, jax.NamedSharding(self.mesh, spec), part
      )

    return jax.tree.map(spread, batch)

  def _sharding(self) -> jax.NamedSharding:
    return jax.NamedSharding(self.mesh, jax.P(None, meshes.DATA))


def auxiliary(losses: PyTree) -> list[Array]:
  """The losses that layers have sown as pairs (sum, count), as means."""
  pair = lambda x: isinstance(x, tuple) and not isinstance(x[0], tuple)
  pairs = jax.tree.leaves(losses, is_leaf=pair)
  return [jnp.sum(sum / jnp.maximum(count, 1)) for sum, count in pairs]


def programs(
  model: nn.Module,
  feed: Feed,
  optimizer: optax.GradientTransformation,
  rate: optax.Schedule,
  *,
  seed: int = 0,
) -> Programs:
  """Makes the programs of a run. Nothing is computed yet.

  Randomness is a pure function of (seed, step, slice), so a run that resumes
  draws what it would have drawn.

  Args:
    model: what `jaxattn.models` has.
    feed: the batches; its mesh must be the current one (`jax.set_mesh`).
    optimizer, rate: what `optimizer.make` makes.
    seed: of the weights and of dropout.
  """
  task, mesh = feed.task, feed.mesh

  def keys():
    return jax.random.split(jax.random.key(seed))

  def init() -> TrainState:
    blank = feed.blank()
    # Explicit shardings are types: initialise on what training will see. And
    # what cannot serve that layout says so now.
    inputs, packing = place.put(blank, place.tokens(*blank[0].shape[:2], mesh))
    variables = model.init(keys()[0], inputs, packing)
    params = variables['params']
    return TrainState(
      step=jnp.int32(0),
      params=params,
      stats=variables.get('stats', {}),
      opt_state=optimizer.init(params),
      stopped_at=jnp.int32(-1),
    )

  def loss(params, stats, batch, key, count):
    (losses, _), changed = model.apply(
      {'params': params, 'stats': stats},
      batch.inputs,
      batch.packing,
      deterministic=False,
      judge=(task.losses, batch),
      rngs={'dropout': key},
      mutable=['stats', 'losses'],
    )
    total, _ = weighed(losses, batch.weights)
    value = total / count
    for part in auxiliary(changed.get('losses', {})):
      value += part / feed.accumulate
    return value, (total, changed.get('stats', {}))

  def gradients(state, batch):
    """Gradients of the loss over all slices, its sum and count, the stats."""
    count = batch.weights.sum()
    shared = jnp.where(count > 0, count, 1)
    key = jax.random.fold_in(keys()[1], state.step)

    def one(carry, inputs):
      grads, total, stats = carry
      i, part = inputs
      new, (here, stats) = jax.grad(loss, has_aux=True)(
        state.params, stats, part, jax.random.fold_in(key, i), shared
      )
      add = lambda sum, g: sum + g.astype(sum.dtype)
      return (jax.tree.map(add, grads, new), total + here, stats), None

    exact = lambda w: jnp.promote_types(w.dtype, jnp.float32)
    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, exact(w)), state.params)
    slices = jnp.arange(feed.accumulate)
    start = (zeros, jnp.zeros_like(count), state.stats)
    (grads, total, stats), _ = jax.lax.scan(one, start, (slices, batch))
    grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, state.params)
    return grads, (total, count), stats

  def train(state, batch):
    grads, (total, count), stats = gradients(state, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    grad_norm = optax.tree.norm(grads)
    finite = (
      jnp.isfinite(total)
      & jnp.isfinite(grad_norm)
      & jnp.isfinite(optax.tree.norm(updates))
    )
    running = state.stopped_at < 0
    moved = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      stats=stats,
      opt_state=opt_state,
      stopped_at=state.stopped_at,
    )
    stays = TrainState(
      step=state.step,
      params=state.params,
      stats=state.stats,
      opt_state=state.opt_state,
      stopped_at=jnp.where(running, state.step, state.stopped_at),
    )
    choose = lambda new, old: jnp.where(running & finite, new, old)
    metrics = {
      'loss': (total, count),
      'grad_norm': grad_norm,
      'learning_rate': jnp.asarray(rate(state.step), jnp.float32),
    }
    state = jax.tree.map(choose, moved, stays)
    return state, metrics | {'stopped_at': state.stopped_at}

  def evaluate(variables, batch):
    def one(part):
      outputs, _ = model.apply(variables, part.inputs, part.packing)
      return task.metrics(outputs, part)

    return jax.tree.map(lambda a: a.sum(0), jax.lax.map(one, batch))

  shapes = jax.eval_shape(init)
  lies = lambda spec: jax.NamedSharding(mesh, spec)
  shardings = jax.tree.map(lies, place.weights(shapes, mesh))
  whole = lies(jax.P())
  shapes = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )
  return Programs(
    init=jax.jit(init, out_shardings=shardings),
    # Without out_shardings the second call would compile again: its state
    # would lie where the compiler left it, not where `init` had put it.
    train=jax.jit(train, donate_argnums=0, out_shardings=(shardings, whole)),
    evaluate=jax.jit(evaluate, out_shardings=whole),
    shapes=shapes,
  )
