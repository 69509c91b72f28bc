"""Rotary position embedding (RoPE).

Su, Lu, Pan, Murtadha, Wen, Liu 2021, "RoFormer: Enhanced Transformer with
Rotary Position Embedding", https://arxiv.org/abs/2104.09864.

Channel j of the first half is paired with channel j of the second, and the
pair is turned by the angle position * base^(-2j / width). A rotation of both
the query and the key leaves in their inner product the difference of the two
angles only, hence the difference of the two positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def rotate(
  x: jax.Array,
  positions: ArrayLike,
  *,
  base: float = 10000.0,
  width: int | None = None,
) -> jax.Array:
  """Turns `x` by its positions.

  Args:
    x: queries or keys, `b t h d`.
    positions: `b t`, of any integer or floating dtype; `t` serves every row.
    base: the slowest pair turns by one radian in about `base` positions.
    width: rotate the first `width` channels and leave the others; default d.

  Returns:
    `b t h d` in the dtype of x. Angles are computed in float32, or in float64
    under jax_enable_x64.

  Raises:
    ValueError: `width` is odd, not positive, or wider than d.
  """
  d = x.shape[-1]
  width = d if width is None else width
  if width % 2 or not 0 < width <= d:
    raise ValueError(
      f'rotary width {width} must be even and lie between 2 and the width of'
      f' the heads, {d}'
    )
  dtype = jnp.result_type(float)
  rates = base ** (-np.arange(0, width, 2) / width)
  angles = jnp.asarray(positions, dtype)[..., None, None] * rates.astype(dtype)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x[..., :width].astype(dtype), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x.dtype)
  return jnp.concatenate([turned, x[..., width:]], axis=-1)
