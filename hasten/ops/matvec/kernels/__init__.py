"""Triton kernels of linears of one token."""
