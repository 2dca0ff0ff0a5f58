"""Each op at the 8B step's shapes: time on the device, the bytes it must move and the operations it must do.

A row: {"op", "ms", "bytes", "flops"}; how near that is to the card's ceilings is for benchmarks/tables.py to say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.ceilings import milliseconds
from benchmarks.nf4_speed import quantized
from hasten.ops import NormConfig, ScoreConfig, glu, linear_cross_entropy, norm, qk_rope
from hasten.ops.adamw import AdamWConfig, adamw_
from hasten.ops.attention import attention
from hasten.ops.lora import LoraLinear, lora_linears, lora_mlp
from hasten.ops.nf4 import dequantize_nf4
from hasten.weights.plain import DenseWeight

BATCH, TOKENS, WIDTH, MLP, HEADS, KV, D, WORDS, RANK = 4, 8192, 4096, 14336, 32, 8, 128, 128256, 16


@dataclass(frozen=True)
class Case:
    """One op and what its forward and its backward must do at least, each as (bytes, FLOP).

    make: -> (function, its inputs, all of which get gradients).
    """

    name: str
    make: Callable[[], tuple[Callable[..., Any], list[torch.Tensor]]]
    forward: tuple[float, float]
    backward: tuple[float, float]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def adapted(out: int, width: int) -> LoraLinear:
    a, b = torch.randn(RANK, width, device="cuda") * 0.01, torch.randn(out, RANK, device="cuda") * 0.01
    return LoraLinear(DenseWeight(draw(out, width) * 0.02), None, a.requires_grad_(), b.requires_grad_(), 1.0)


def _trained(linears: Sequence[LoraLinear]) -> list[torch.Tensor]:
    return [t for one in linears for t in (one.a, one.b) if t is not None]


def _norm(kind: Any, fp32: bool) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    weight, rule = draw(WIDTH), NormConfig(1e-5, kind, fp32_weight=fp32)
    return lambda x: norm(x, weight, rule), [draw(TOKENS, WIDTH)]


def _rope() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    table = torch.randn(1, TOKENS // BATCH, D // 2, device="cuda").repeat(1, 1, 2).bfloat16()
    queries, keys = (draw(BATCH, TOKENS // BATCH, heads, D) for heads in (HEADS, KV))
    return lambda q, k: qk_rope(q, k, (table, table)), [queries, keys]


def _lora_qkv() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    linears = [adapted(out, WIDTH) for out in (HEADS * D, KV * D, KV * D)]
    return lambda x, *_: lora_linears(x, linears), [draw(TOKENS, WIDTH), *_trained(linears)]


def _attention(window: int | None) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    heads = [draw(BATCH, TOKENS // BATCH, count, D) for count in (HEADS, KV, KV)]
    return lambda q, k, v: attention(q, k, v, D**-0.5, window), heads


def _lora_mlp() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    linears = (adapted(MLP, WIDTH), adapted(MLP, WIDTH), adapted(WIDTH, MLP))
    return lambda x, *_: lora_mlp(x, linears, "silu"), [draw(TOKENS, WIDTH), *_trained(linears)]


def _head(chunk: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    weight, labels = draw(WORDS, WIDTH) * 0.02, torch.randint(0, WORDS, (TOKENS,), device="cuda")
    rule = ScoreConfig(chunk=chunk)
    return lambda hidden: linear_cross_entropy(hidden, weight, labels, rule).loss.sum(), [draw(TOKENS, WIDTH)]


STREAM, ROTATED, WIDE = 2.0 * TOKENS * WIDTH, 2.0 * TOKENS * (HEADS + KV) * D, 2.0 * TOKENS * MLP
QKV, FFN = WIDTH * (HEADS + 2 * KV) * D, 3 * WIDTH * MLP
LINE = 2 * TOKENS * RANK
QKV_LORA, FFN_LORA = LINE * (3 * WIDTH + (HEADS + 2 * KV) * D), LINE * 3 * (WIDTH + MLP)
HEAD = 2.0 * WORDS * WIDTH
SEEN = 2.0 * TOKENS * (2 * HEADS + 2 * KV) * D
PAIRS = {None: TOKENS * (TOKENS // BATCH) / 2, 512: TOKENS * 512 - BATCH * 512**2 / 2}

CASES = [
    # elementwise: FLOP per bf16 element, counted once each: multiply, add, exponential, reciprocal
    Case("RMSNorm", lambda: _norm("rms", False), (2 * STREAM, 2.0 * STREAM), (3 * STREAM, 4.5 * STREAM)),
    Case("LayerNorm", lambda: _norm("layer", True), (2 * STREAM, 3.0 * STREAM), (3 * STREAM, 6.0 * STREAM)),
    Case("rotation of q and k", _rope, (2 * ROTATED, 1.5 * ROTATED), (2 * ROTATED, 1.5 * ROTATED)),
    Case(
        "gated activation",
        lambda: (lambda gate, up: glu(gate, up, "silu"), [draw(TOKENS, MLP), draw(TOKENS, MLP)]),
        (3 * WIDE, 2.5 * WIDE),
        (5 * WIDE, 5.0 * WIDE),
    ),
    *(
        Case(
            f"attention, {'causal' if window is None else f'window of {window}'}",
            lambda window=window: _attention(window),
            (SEEN, 4 * HEADS * D * pairs),
            (2 * SEEN, 10 * HEADS * D * pairs),
        )
        for window, pairs in PAIRS.items()
    ),
    # products: weights, inputs and outputs once; a backward makes the input's gradient and LoRA's
    Case(
        "q, k, v with LoRA",
        _lora_qkv,
        (2.0 * QKV + 2 * STREAM, 2.0 * TOKENS * QKV + QKV_LORA),
        (2.0 * QKV + 3 * STREAM, 2.0 * TOKENS * QKV + 2 * QKV_LORA),
    ),
    Case(
        "MLP with LoRA",
        _lora_mlp,
        (2.0 * FFN + 2 * STREAM + 5 * WIDE, 2.0 * TOKENS * FFN + FFN_LORA),
        (2.0 * FFN + 3 * STREAM + 8 * WIDE, 2.0 * TOKENS * FFN + 2 * FFN_LORA),
    ),
]


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


def both_ways(function: Callable[..., Any], inputs: list[torch.Tensor]) -> tuple[float, float]:
    """(forward ms, backward ms) on the device. An op that can be differentiated once only is run forward again each time."""
    inputs = [x.detach().requires_grad_() if x.is_leaf and not x.requires_grad else x for x in inputs]
    forward = device_ms(lambda: function(*inputs))

    def outputs() -> tuple[torch.Tensor, ...]:
        out = function(*inputs)
        return out if isinstance(out, tuple) else (out,)

    upstream = [torch.randn_like(out) for out in outputs()]
    both = device_ms(lambda: torch.autograd.grad(outputs(), inputs, upstream))
    return forward, both - forward


def measure() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for case in CASES:
        times = both_ways(*case.make())
        for way, ms, (moved, flops) in zip(("forward", "backward"), times, (case.forward, case.backward), strict=True):
            rows.append({"op": f"{case.name}, {way}", "ms": ms, "bytes": moved, "flops": flops})
        torch.cuda.empty_cache()
    for chunk in (1024, 4096):
        function, (hidden,) = _head(chunk)
        hidden.requires_grad_()
        total = milliseconds(lambda: torch.autograd.grad(function(hidden), hidden))  # noqa: B023
        name = f"fused head, forward and backward, chunks of {chunk}"
        rows.append({"op": name, "ms": total, "bytes": 2 * HEAD + 2 * STREAM, "flops": 2 * TOKENS * HEAD})
    return [*rows, *_nf4(), *_optimizers()]


def _nf4() -> list[dict[str, Any]]:
    ours, theirs = quantized((MLP, WIDTH))
    count = float(MLP * WIDTH)
    calls = {"NF4 to bf16": lambda: dequantize_nf4(ours, torch.bfloat16), "NF4 to bf16, bitsandbytes": theirs}
    return [
        {"op": name, "ms": milliseconds(call), "bytes": 2.5 * count, "flops": count} for name, call in calls.items()
    ]


def _optimizers() -> list[dict[str, Any]]:
    """A step of AdamW on 2^28 bf16 weights: weight and moments read and written, the gradient read."""
    count, rule = 2**28, AdamWConfig(1e-5, 0.9, 0.999, 1e-8, 0.0, 1)
    weight, grad, first, second = (torch.rand(count, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    plain = weight.clone().requires_grad_()
    plain.grad = grad
    optimizer = torch.optim.AdamW([plain], fused=True)
    calls = {
        "AdamW in bf16, stochastic rounding": lambda: adamw_(weight, grad, (first, second), rule, 1),
        "AdamW in bf16, torch's fused": optimizer.step,
    }
    return [
        {"op": name, "ms": milliseconds(call), "bytes": 14.0 * count, "flops": 16.0 * count}
        for name, call in calls.items()
    ]
