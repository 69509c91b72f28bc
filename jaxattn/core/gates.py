"""Initial values for gates made of a step and a rate, a = exp(-rate * step).

Selective state spaces and their kin (Gu, Dao 2023, Mamba,
https://arxiv.org/abs/2312.00752) take step = softplus(x W + c). Initially each
head then remembers about 1 / (rate * step) tokens, spread over orders of
magnitude; a head that begins elsewhere rarely finds its way there.
"""

import jax
import jax.numpy as jnp


def steps(low, high):
  """Initialiser of c: softplus(c) is log-uniform between `low` and `high`."""

  def init(key, shape, dtype=jnp.float32):
    step = jnp.exp(
      jax.random.uniform(key, shape, dtype, jnp.log(low), jnp.log(high))
    )
    return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus

  return init


def log_rates(low, high):
  """Initialiser of log rates; the rates are uniform from `low` to `high`."""

  def init(key, shape, dtype=jnp.float32):
    return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

  return init
