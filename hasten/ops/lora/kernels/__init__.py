"""GPU implementations of `ops.lora`: cuBLAS matmuls and the Triton kernels between them."""
