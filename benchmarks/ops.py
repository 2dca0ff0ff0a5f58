"""Each op at the 8B step's shapes: time on the device, the bytes it must move and the operations it must do.

A row: {"op", "ms", "bytes", "flops"}; benchmarks/tables.py compares it with the measured ceilings.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.timing import device_ms, draw, milliseconds
from benchmarks.nf4_speed import quantized
from hasten.ops import NormConfig, ScoreConfig, glu, linear_cross_entropy, norm, qk_rope
from hasten.ops.adamw import AdamWConfig, adamw_
from hasten.ops.attention import attention
from hasten.ops.lora import DenseWeight, LoraLinear, lora_linears, lora_mlp
from hasten.ops.nf4 import dequantize_nf4

BATCH, TOKENS, WIDTH, MLP, HEADS, KV, D, WORDS, RANK = 4, 8192, 4096, 14336, 32, 8, 128, 128256, 16


@dataclass(frozen=True)
class Case:
    """One op and the least its forward and backward must do, each as (bytes, FLOP).

    make: returns (function, its inputs, all of which get gradients).
    """

    name: str
    make: Callable[[], tuple[Callable[..., Any], list[torch.Tensor]]]
    forward: tuple[float, float]
    backward: tuple[float, float]


def adapted(out: int, width: int) -> LoraLinear:
    a, b = torch.randn(RANK, width, device="cuda") * 0.01, torch.randn(out, RANK, device="cuda") * 0.01
    return LoraLinear(DenseWeight(draw(out, width) * 0.02), None, a.requires_grad_(), b.requires_grad_(), 1.0)


def _trained(linears: Sequence[LoraLinear]) -> list[torch.Tensor]:
    return [t for one in linears for t in (one.a, one.b) if t is not None]


def _norm(kind: Any, fp32: bool) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    weight, rule = draw(WIDTH), NormConfig(1e-5, kind, fp32_weight=fp32)
    return lambda x: norm(x, weight, rule), [draw(TOKENS, WIDTH)]


def _glu() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return lambda gate, up: glu(gate, up, "silu"), [draw(TOKENS, MLP), draw(TOKENS, MLP)]


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


RESIDUAL, ROTATED, WIDE = 2.0 * TOKENS * WIDTH, 2.0 * TOKENS * (HEADS + KV) * D, 2.0 * TOKENS * MLP
QKV, FFN = WIDTH * (HEADS + 2 * KV) * D, 3 * WIDTH * MLP
QKV_LORA = 2 * TOKENS * RANK * (3 * WIDTH + (HEADS + 2 * KV) * D)
FFN_LORA = 2 * TOKENS * RANK * 3 * (WIDTH + MLP)
HEAD = 2.0 * WORDS * WIDTH
SEEN = 2.0 * TOKENS * (2 * HEADS + 2 * KV) * D

CASES = [
    # elementwise: FLOP per bf16 element, counted once each: multiply, add, exponential, reciprocal
    Case("RMSNorm", lambda: _norm("rms", False), (2 * RESIDUAL, 2.0 * RESIDUAL), (3 * RESIDUAL, 4.5 * RESIDUAL)),
    Case("LayerNorm", lambda: _norm("layer", True), (2 * RESIDUAL, 3.0 * RESIDUAL), (3 * RESIDUAL, 6.0 * RESIDUAL)),
    Case("rotary embedding of q and k", _rope, (2 * ROTATED, 1.5 * ROTATED), (2 * ROTATED, 1.5 * ROTATED)),
    Case("gated activation", _glu, (3 * WIDE, 2.5 * WIDE), (5 * WIDE, 5.0 * WIDE)),
    *(
        Case(name, lambda window=window: _attention(window), (SEEN, 4 * HEADS * D * pairs), (2 * SEEN, 10 * HEADS * D * pairs))
        for name, window, pairs in (
            ("attention, causal", None, TOKENS * (TOKENS // BATCH) / 2),
            ("attention, window of 512", 512, TOKENS * 512 - BATCH * 512**2 / 2),
        )
    ),
    # matmuls: weights, inputs and outputs once; a backward computes the gradients of the input and of LoRA
    Case("q, k, v with LoRA", _lora_qkv, (2.0 * QKV + 2 * RESIDUAL, 2.0 * TOKENS * QKV + QKV_LORA),
         (2.0 * QKV + 3 * RESIDUAL, 2.0 * TOKENS * QKV + 2 * QKV_LORA)),
    Case("MLP with LoRA", _lora_mlp, (2.0 * FFN + 2 * RESIDUAL + 5 * WIDE, 2.0 * TOKENS * FFN + FFN_LORA),
         (2.0 * FFN + 3 * RESIDUAL + 8 * WIDE, 2.0 * TOKENS * FFN + 2 * FFN_LORA)),
]  # fmt: skip


def both_ways(function: Callable[..., Any], inputs: list[torch.Tensor]) -> tuple[float, float]:
    """(forward ms, backward ms) on the device. The backward is timed with a forward before it, since some ops allow only one."""
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
    return [*rows, *(row for calls in (_heads, _nf4, _optimizers) for row in calls())]


def _rows(calls: dict[str, Callable[[], Any]], moved: float, flops: float) -> list[dict[str, Any]]:
    return [{"op": name, "ms": milliseconds(call), "bytes": moved, "flops": flops} for name, call in calls.items()]


def _heads() -> list[dict[str, Any]]:
    weight, labels = draw(WORDS, WIDTH) * 0.02, torch.randint(0, WORDS, (TOKENS,), device="cuda")
    hidden = draw(TOKENS, WIDTH).requires_grad_()

    def both(chunk: int) -> Any:
        loss = linear_cross_entropy(hidden, weight, labels, ScoreConfig(chunk=chunk)).loss.sum()
        return torch.autograd.grad(loss, hidden)

    names = {chunk: f"fused head, forward and backward, chunks of {chunk}" for chunk in (1024, 4096)}
    calls = {name: functools.partial(both, chunk) for chunk, name in names.items()}
    return _rows(calls, 2 * HEAD + 2 * RESIDUAL, 2 * TOKENS * HEAD)


def _nf4() -> list[dict[str, Any]]:
    ours, theirs = quantized((MLP, WIDTH))
    count = float(MLP * WIDTH)
    calls = {"NF4 to bf16": lambda: dequantize_nf4(ours, torch.bfloat16), "NF4 to bf16, bitsandbytes": theirs}
    return _rows(calls, 2.5 * count, count)


def _optimizers() -> list[dict[str, Any]]:
    """A step of AdamW on 2^28 bf16 weights: weight and Adam moments read and written, the gradient read."""
    count, rule = 2**28, AdamWConfig(1e-5, 0.9, 0.999, 1e-8, 0.0, 1)
    weight, grad, first, second = (torch.rand(count, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    plain = weight.clone().requires_grad_()
    plain.grad = grad
    calls = {
        "AdamW in bf16, stochastic rounding": lambda: adamw_(weight, grad, (first, second), rule, 1),
        "AdamW in bf16, torch's fused": torch.optim.AdamW([plain], fused=True).step,
    }
    return _rows(calls, 14.0 * count, 16.0 * count)
