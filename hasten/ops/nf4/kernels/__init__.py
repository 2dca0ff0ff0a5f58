"""Triton kernels over NF4 weights."""
