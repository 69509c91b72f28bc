"""A test's program in a process of its own, which simulates several devices.

A process chooses once how many devices it has; that of the tests has one.
"""

import gc
import os
import pathlib
import subprocess
import sys

# What JAX keeps of programs are many objects, which live as long as they do: to
# look through them after every 700 new ones takes 8% of a test's time. All
# programs of tests import this file, and so does `conftest.py`.
gc.set_threshold(200_000, 10, 10)

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What is compiled is the same from run to run, if it takes so many seconds.
CACHE, KEPT = str(ROOT / '.jax_cache'), 0.05


def run(*args: str, devices: int = 8) -> str:
  """What `python *args` printed, with `devices` CPU devices.

  Flags of XLA are those of this process, and so is the compilation cache, which
  is not for programs of several devices: see `experiments.compiled`.
  """
  flags = f'--xla_force_host_platform_device_count={devices}'
  ran = subprocess.run(
    [sys.executable, *args],
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flags}',
      'JAX_ENABLE_COMPILATION_CACHE': str(devices == 1).lower(),
      'JAX_COMPILATION_CACHE_DIR': CACHE,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': str(KEPT),
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert ran.returncode == 0, ran.stderr
  return ran.stdout
