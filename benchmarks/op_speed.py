"""Each op at the 8B step's shapes: time, bytes it must move, and the fraction of the copy bandwidth that it reaches."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

from hasten.ops import ScoreRule, glu, linear_cross_entropy, norm, qk_rope
from hasten.ops.nf4 import NF4Weight, dequantize_nf4

TOKENS, WIDTH, MLP, HEADS, KV, D, WORDS = 8192, 4096, 14336, 32, 8, 128, 128256


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, reads and writes counted."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.float16)
    target = torch.empty_like(source)
    seconds = do_bench(lambda: target.copy_(source), return_mode="median") / 1e3
    return 2 * source.numel() * 2 / seconds


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def device_ms(function: Callable[[], Any], repeats: int = 20) -> float:
    """Milliseconds that one call keeps the device busy. Small ops wait for the host longer than they run."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in recorded.key_averages()) / 1e3 / repeats


def _both_ways(function: Callable[..., Any], inputs: list[torch.Tensor]) -> tuple[float, float]:
    """(forward ms, backward ms) on the device."""
    inputs = [x.requires_grad_() for x in inputs]
    out = function(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(o) for o in outs]
    return device_ms(lambda: function(*inputs)), device_ms(
        lambda: torch.autograd.grad(outs, inputs, grads, retain_graph=True)
    )


def measure() -> list[dict[str, Any]]:
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = [{"op": "copy", "TB/s": bandwidth / 1e12}]

    def add(op: str, milliseconds: float, moved: int) -> None:
        rows.append(
            {"op": op, "ms": milliseconds, "GB": moved / 1e9, "of copy": moved / bandwidth / (milliseconds / 1e3)}
        )

    x, w = _draw(TOKENS, WIDTH), _draw(WIDTH)
    size = x.numel() * 2
    for kind, fp32 in (("rms", False), ("layer", True)):
        forward, backward = _both_ways(lambda x: norm(x, w, 1e-5, kind, fp32_weight=fp32), [x.clone()])  # noqa: B023
        add(f"{kind} norm fwd", forward, 2 * size)
        add(f"{kind} norm bwd", backward, 3 * size)
    q, k = _draw(4, TOKENS // 4, HEADS, D), _draw(4, TOKENS // 4, KV, D)
    table = torch.randn(1, TOKENS // 4, D // 2, device="cuda").repeat(1, 1, 2).bfloat16()
    forward, backward = _both_ways(lambda q, k: qk_rope(q, k, (table, table)), [q, k])
    moved = 2 * 2 * (q.numel() + k.numel())
    add("rope fwd", forward, moved)
    add("rope bwd", backward, moved)
    gate, up = _draw(TOKENS, MLP), _draw(TOKENS, MLP)
    forward, backward = _both_ways(lambda g, u: glu(g, u, "silu"), [gate, up])
    add("swiglu fwd", forward, 3 * gate.numel() * 2)
    add("swiglu bwd", backward, 5 * gate.numel() * 2)
    hidden, head, labels = (
        _draw(TOKENS, WIDTH),
        _draw(WORDS, WIDTH) * 0.02,
        torch.randint(0, WORDS, (TOKENS,), device="cuda"),
    )
    for chunk in (1024, 2048, 4096):
        hidden.requires_grad_()
        rule = ScoreRule(chunk=chunk)
        total = do_bench(
            lambda: torch.autograd.grad(linear_cross_entropy(hidden, head, labels, rule).loss.sum(), hidden),  # noqa: B023
            return_mode="median",
        )
        rows.append(
            {
                "op": f"fused head fwd+bwd, chunk {chunk}",
                "ms": total,
                "TFLOP/s": 4 * TOKENS * WIDTH * WORDS / total / 1e9,
            }
        )
    rows.append(_nf4(add))
    return rows


def _nf4(add: Callable[[str, float, int], None]) -> dict[str, Any]:
    import bitsandbytes.functional as bnb

    weight = _draw(MLP, WIDTH)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = NF4Weight(
        packed, state.code, (MLP, WIDTH), state.absmax, state.state2.code, state.state2.absmax, state.offset
    )
    moved = weight.numel() * 2 + weight.numel() // 2
    add("nf4 dequantise", do_bench(lambda: dequantize_nf4(ours, torch.bfloat16), return_mode="median"), moved)
    theirs = do_bench(lambda: bnb.dequantize_4bit(packed, state), return_mode="median")
    return {"op": "nf4 dequantise, bitsandbytes", "ms": theirs}
