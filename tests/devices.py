"""A test's program in a process of its own, which simulates several devices.

A process chooses once how many devices it has; that of the tests has one.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*args: str, devices: int = 8) -> str:
  """What `python *args` printed, with `devices` CPU devices.

  Flags of XLA are those of this process; the compilation cache is not for
  programs of several devices, see `experiments.compiled`.
  """
  flags = f'--xla_force_host_platform_device_count={devices}'
  ran = subprocess.run(
    [sys.executable, *args],
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flags}',
      'JAX_ENABLE_COMPILATION_CACHE': 'false',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert ran.returncode == 0, ran.stderr
  return ran.stdout
