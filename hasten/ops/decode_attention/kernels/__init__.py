"""Triton kernels of decode attention."""
