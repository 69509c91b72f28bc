"""Where compiled programs stay."""

from pathlib import Path

import jax


def keep() -> None:
  """Compiled programs outlive the process, unless the user said where."""
  if not jax.config.jax_compilation_cache_dir:
    kept = Path.home() / '.cache' / 'jaxattn' / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(kept))
