"""Where arrays live: weights over all devices (FSDP), batches over `data`."""

import itertools
import math

import jax
from jax.sharding import AxisType

from jaxattn.parallel import mesh as meshes

STACKED = 'layers_'  # how models name weights that lead with the layer


def weight(shape: tuple[int, ...], mesh, smallest: int = 2**12) -> jax.P:
  """Where a weight is stored: its longest divisible axis over all devices.

  Over all axes of the mesh together, or over those that divide an axis and have
  the most devices. Vectors and small matrices stay whole: splitting them saves
  nothing and costs a gather. Stored so, weights are gathered where they are
  used (`whole`). Parts along `model` are the largest, so that what a device
  needs of them lies together.
  """
  if len(shape) < 2 or math.prod(shape) < smallest:
    return jax.P()
  size = lambda names: math.prod(mesh.shape[name] for name in names)
  used = [x for x in (meshes.MODEL, *meshes.AXES[:2]) if mesh.shape[x] > 1]
  ways = (
    x for n in range(len(used)) for x in itertools.combinations(used, n + 1)
  )
  for names in sorted(ways, key=size, reverse=True):
    axes = [i for i, n in enumerate(shape) if n % size(names) == 0]
    if axes:
      longest = max(axes, key=lambda i: (shape[i], i))
      return jax.P(
        *(names if i == longest else None for i in range(len(shape)))
      )
  return jax.P()


def weights(tree, mesh):
  """Where each leaf of a tree of weights is stored; see `weight`.

  Serves an optimiser's state as well: its moments lie where their weights do.
  Stacked layers are cut inside a layer: `scan` takes layer by layer.
  """

  def place(path, leaf):
    keys = [getattr(entry, 'key', '') for entry in path]
    if leaf.ndim and any(str(key).startswith(STACKED) for key in keys):
      inner = weight(leaf.shape[1:], mesh)
      return jax.P(None, *inner) if inner else inner
    return weight(leaf.shape, mesh)

  return jax.tree_util.tree_map_with_path(place, tree)


def batch(rows: int, mesh) -> jax.P:
  """Rows over `data`, or whole where they do not divide."""
  return jax.P(meshes.DATA) if rows % mesh.shape[meshes.DATA] == 0 else jax.P()


def tokens(rows: int, length: int, mesh) -> jax.P:
  """Rows over `data` and time over `seq`, each whole where it does not divide.

  One token, a step of decoding, stays whole.
  """
  parts = mesh.shape[meshes.SEQ]
  if parts == 1 or length < parts or length % parts:
    return batch(rows, mesh)
  return jax.P(*(batch(rows, mesh) or (None,)), meshes.SEQ)


def put(tree, spec: jax.P):
  """Places arrays, where placement is part of the type.

  In Auto mode, and without a mesh, the compiler places them.
  """
  mesh = meshes.current()
  if mesh is None or AxisType.Explicit not in mesh.axis_types:
    return tree
  return jax.tree.map(lambda a: jax.reshard(a, spec), tree)


def rows(tree, count: int):
  """Places arrays that lead with a batch of `count` rows, as layers want."""
  mesh = meshes.current()
  return tree if mesh is None else put(tree, batch(count, mesh))


def over_time(tree):
  """Places arrays 'b t ...', rows over `data` and time over `seq`: `tokens`."""
  mesh = meshes.current()
  leaves = jax.tree.leaves(tree)
  if mesh is None or not leaves:
    return tree
  return put(tree, tokens(*leaves[0].shape[:2], mesh))


def slots(tree, mesh, rows: int, stacked: bool = False):
  """Where each leaf of a state or of a memory lies, in a tree like it.

  Rows lie over `data`. Slots lie over `seq` in a memory whose slots are dealt
  to as many `stripes` as there are devices; else they are whole on each, as all
  other memories are.

  Args:
    tree: whose leaves lead with rows.
    mesh: to lie on.
    rows: how many.
    stacked: leaves lead with layers, and then with rows.
  """
  axes = ((None,) if stacked else ()) + tuple(batch(rows, mesh) or (None,))

  def memory(x):
    dealt = deals(x, mesh)
    return jax.tree.map(
      lambda leaf: jax.P(
        *axes, *([meshes.SEQ] if dealt and leaf.ndim > len(axes) else [])
      ),
      x,
    )

  return jax.tree.map(memory, tree, is_leaf=lambda x: hasattr(x, 'stripes'))


def deals(memory, mesh) -> bool:
  """Whether each device along `seq` holds one of the stripes of a memory."""
  stripes = getattr(memory, 'stripes', None)
  return stripes is not None and 1 < stripes == mesh.shape[meshes.SEQ]


def state(tree, rows: int, stacked: bool = False):
  """Places a state as layers want and leave it: see `slots`.

  In Auto mode too: the compiler might keep a carry of zeros whole.
  """
  mesh = meshes.current()
  if mesh is None:
    return tree
  lay = jax.reshard if AxisType.Explicit in mesh.axis_types else _pin
  return jax.tree.map(lay, tree, slots(tree, mesh, rows, stacked))


def _pin(x, spec):
  if isinstance(x, jax.core.Tracer):
    return jax.lax.with_sharding_constraint(x, spec)
  return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))


def whole(w: jax.Array) -> jax.Array:
  """A weight as its user needs it, gathered where it was stored in parts."""
  return put(w, jax.P())


def size(tree) -> int:
  """Bytes of its arrays."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def amount(size: int) -> str:
  """Bytes for people."""
  for unit, one in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
    if abs(size) >= one:
      return f'{size / one:,.2f} {unit}'
  return f'{size} bytes'
