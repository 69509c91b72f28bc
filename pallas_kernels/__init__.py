"""Kernels for attention on CPU, TPU and GPU; they import jax alone."""
