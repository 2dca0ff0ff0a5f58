"""What this card gives at best, measured: a large bf16 product, a large copy, causal attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def milliseconds(function: Callable[[], Any], warm_ms: int = 25, measure_ms: int = 100) -> float:
    """Median time of a call, by device events, with the L2 cache flushed before each."""
    from triton.testing import do_bench

    median = do_bench(function, warmup=warm_ms, rep=measure_ms, return_mode="median")
    assert isinstance(median, float)
    return median


def copy_rate() -> float:
    """Bytes a second of a large device-to-device copy, reads and writes counted."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.float16)
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / (milliseconds(lambda: target.copy_(source)) / 1e3)


def matmul_rate(size: int = 8192) -> float:
    """FLOP a second of a square bf16 product of random numbers."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: left @ right) / 1e3)


def attention_rates(batch: int = 4, heads: int = 32, length: int = 2048, width: int = 128) -> dict[str, Any]:
    """FLOP a second of causal attention, forward and backward, on the fastest backend for each; only visible pairs count."""
    q, k, v = (
        torch.randn(batch, heads, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    forward_flops = 2 * batch * heads * length**2 * width
    rates = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
            upstream = torch.randn_like(out)
            forward = milliseconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
            backward = milliseconds(
                lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)  # noqa: B023
            )
        rates[name] = (forward_flops / forward * 1e3, 2.5 * forward_flops / backward * 1e3)
    return {
        "attention_forward": max(f for f, _ in rates.values()),
        "attention_backward": max(b for _, b in rates.values()),
        "attention_by_backend": {name: {"forward": f, "backward": b} for name, (f, b) in rates.items()},
    }


def measure() -> dict[str, Any]:
    """FLOP/s and bytes/s: "matmul", "copy", "attention_forward", "attention_backward", and each attention backend's."""
    found: dict[str, Any] = {"matmul": matmul_rate(), "copy": copy_rate()}
    torch.cuda.empty_cache()
    found.update(attention_rates())
    torch.cuda.empty_cache()
    return found
