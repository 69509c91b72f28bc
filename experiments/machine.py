"""What numbers depend on besides the code: versions and devices."""

import importlib.util
import os
import platform
from importlib import metadata

import jax


def versions() -> dict[str, str]:
  """Of the packages that compute, where installed, and of Python."""
  packages = [
    package
    for package in ('jax', 'flax', 'optax')
    if importlib.util.find_spec(package)
  ]
  return {
    **{package: metadata.version(package) for package in packages},
    'python': platform.python_version(),
  }


def device() -> str:
  """What computes, in a few words."""
  devices = jax.devices()
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':
    kind = f'CPU ({platform.machine()}, {os.cpu_count()} cores)'
  return f'{len(devices)} x {kind}' if len(devices) > 1 else kind
