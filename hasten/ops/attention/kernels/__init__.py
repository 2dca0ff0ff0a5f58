"""Triton kernels of `ops.attention`: forward, backward, and the tile helpers of both."""
