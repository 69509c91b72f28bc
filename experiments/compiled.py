"""Where compiled programs stay."""

from pathlib import Path

import jax


def keep() -> None:
  """Compiled programs outlive the process, unless the user said where.

  Those for several CPU devices do not, wherever that is. Once written down they
  forget in which order their collectives run: devices then wait for each other
  for ever (jaxlib 0.12), or take what was meant for another (0.10.2).
  """
  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    jax.config.update('jax_enable_compilation_cache', False)
  elif not jax.config.jax_compilation_cache_dir:
    kept = Path.home() / '.cache' / 'jaxattn' / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(kept))
