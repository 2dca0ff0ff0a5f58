"""Each op at the 8B step's shapes: time on the device, the bytes it must move and the operations it must do.

    python -m benchmarks.gpu --out FOLDER --only ops
A row: {"op", "ms", "bytes", "flops"}; benchmarks/tables.py compares it with the measured ceilings.
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import inputs, limits, tables
from benchmarks.harness import timing
from benchmarks.harness.results import Record
from benchmarks.harness.timing import DTYPE, Row, draw
from benchmarks.inputs import Sizes
from hasten.ops import NormConfig, ScoreConfig, glu, linear_cross_entropy, norm, qk_rope
from hasten.ops.adamw import AdamWConfig, adamw_
from hasten.ops.attention import attention
from hasten.ops.lora import lora_linears, lora_mlp
from hasten.ops.nf4 import NF4Weight, dequantize_nf4

Work = tuple[float, float]
"""(bytes, FLOP)."""
Made = tuple[Callable[..., Any], list[torch.Tensor]]
"""A function and its inputs."""


@dataclass(frozen=True)
class Case:
    """One op and the least its forward and backward must do.

    make: returns (function, its inputs, all of which get gradients).
    """

    name: str
    make: Callable[[], Made]
    forward: Work
    backward: Work


def elementwise(s: Sizes) -> Iterator[Case]:
    """FLOP per bf16 element, counted once each: multiply, add, exponential, reciprocal."""
    residual, rotated, wide = (2.0 * s.tokens * n for n in (s.width, (s.heads + s.kv) * s.dim, s.mlp))

    def make_norm(kind: Any, fp32: bool) -> Made:
        weight, rule = inputs.draw(s, s.width), NormConfig(1e-5, kind, fp32_weight=fp32)
        return lambda x: norm(x, weight, rule), [inputs.stream(s)]

    def make_rope() -> Made:
        position = inputs.angles(s)
        return lambda q, k: qk_rope(q, k, position), inputs.heads(s, s.heads, s.kv)

    def make_glu() -> Made:
        return lambda gate, up: glu(gate, up, "silu"), inputs.gate_and_up(s)

    yield Case("RMSNorm", lambda: make_norm("rms", False), (2 * residual, 2 * residual), (3 * residual, 4.5 * residual))
    yield Case(
        "LayerNorm", lambda: make_norm("layer", True), (2 * residual, 3 * residual), (3 * residual, 6 * residual)
    )
    yield Case("rotary embedding of q and k", make_rope, (2 * rotated, 1.5 * rotated), (2 * rotated, 1.5 * rotated))
    yield Case("gated activation", make_glu, (3 * wide, 2.5 * wide), (5 * wide, 5 * wide))


def attentions(s: Sizes) -> Iterator[Case]:
    seen = 2.0 * s.tokens * 2 * (s.heads + s.kv) * s.dim

    def make(window: int | None) -> Made:
        return lambda q, k, v: attention(q, k, v, s.dim**-0.5, window), inputs.qkv_heads(s)

    for name, window, pairs in (
        ("attention, causal", None, s.tokens * s.length / 2),
        (f"attention, window of {s.window}", s.window, s.tokens * s.window - s.batch * s.window**2 / 2),
    ):
        flops = s.heads * s.dim * pairs
        yield Case(name, functools.partial(make, window), (seen, 4 * flops), (2 * seen, 10 * flops))


def linears(s: Sizes) -> Iterator[Case]:
    """Weights, inputs and outputs once; a backward computes the gradients of the input and of LoRA."""
    residual, wide = 2.0 * s.tokens * s.width, 2.0 * s.tokens * s.mlp
    queries, keys = s.heads * s.dim, s.kv * s.dim
    qkv, mlp = s.width * (queries + 2 * keys), 3 * s.width * s.mlp
    qkv_lora = 2 * s.tokens * s.rank * (3 * s.width + queries + 2 * keys)
    mlp_lora = 2 * s.tokens * s.rank * 3 * (s.width + s.mlp)

    def make(op: Callable[..., Any], shapes: Iterable[tuple[int, int]]) -> Made:
        made = tuple(inputs.adapted(s, *shape) for shape in shapes)
        trained = [t for one in made for t in (one.a, one.b) if t is not None]
        return lambda x, *_: op(x, made), [inputs.stream(s), *trained]

    yield Case("q, k, v with LoRA",
               lambda: make(lora_linears, inputs.qkv_shapes(s)),
               (2.0 * qkv + 2 * residual, 2.0 * s.tokens * qkv + qkv_lora),
               (2.0 * qkv + 3 * residual, 2.0 * s.tokens * qkv + 2 * qkv_lora))  # fmt: skip
    yield Case("MLP with LoRA",
               lambda: make(lambda x, made: lora_mlp(x, made, "silu"), inputs.mlp_shapes(s)),
               (2.0 * mlp + 2 * residual + 5 * wide, 2.0 * s.tokens * mlp + mlp_lora),
               (2.0 * mlp + 3 * residual + 8 * wide, 2.0 * s.tokens * mlp + 2 * mlp_lora))  # fmt: skip


def both_ways(case: Case) -> list[Row]:
    """The rows of forward and backward. The backward is timed with a forward before it, since some ops allow only one."""
    function, made = case.make()
    made = [x.detach().requires_grad_() if x.is_leaf and not x.requires_grad else x for x in made]
    forward = timing.device_ms(lambda: function(*made))

    def outputs() -> tuple[torch.Tensor, ...]:
        out = function(*made)
        return out if isinstance(out, tuple) else (out,)

    upstream = [torch.randn_like(out) for out in outputs()]
    both = timing.device_ms(lambda: torch.autograd.grad(outputs(), made, upstream))
    return [
        {"op": f"{case.name}, {way}", "ms": ms, "bytes": moved, "flops": flops}
        for way, ms, (moved, flops) in (("forward", forward, case.forward), ("backward", both - forward, case.backward))
    ]


def heads(s: Sizes) -> list[Row]:
    hidden, weight, labels = inputs.head(s)
    hidden, size = hidden.requires_grad_(), 2.0 * s.words * s.width

    def both(chunk: int) -> Any:
        loss = linear_cross_entropy(hidden, weight, labels, ScoreConfig(chunk=chunk)).loss.sum()
        return torch.autograd.grad(loss, hidden)

    names = {chunk: f"fused head, forward and backward, chunks of {chunk}" for chunk in (1024, 4096)}
    calls = {name: functools.partial(both, chunk) for chunk, name in names.items()}
    return timing.rows(calls, 2 * size + 4.0 * s.tokens * s.width, 2 * s.tokens * size)


def quantized(shape: tuple[int, int]) -> tuple[NF4Weight, Callable[[], torch.Tensor]]:
    """(weight, bitsandbytes' own dequantisation of it)."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(draw(*shape), blocksize=64, compress_statistics=True, quant_type="nf4")
    assert state is not None and state.state2 is not None and state.code is not None
    outer = state.state2
    weight = NF4Weight(packed, state.code, shape, state.absmax, outer.code, outer.absmax, state.offset)
    return weight, lambda: bnb.dequantize_4bit(packed, state)


def nf4(s: Sizes) -> list[Row]:
    ours, theirs = quantized((s.mlp, s.width))
    count = float(s.mlp * s.width)
    calls = {"NF4 to bf16": lambda: dequantize_nf4(ours, DTYPE), "NF4 to bf16, bitsandbytes": theirs}
    return timing.rows(calls, 2.5 * count, count)


def optimizers(s: Sizes) -> list[Row]:
    """A step of AdamW on bf16 weights: weight and Adam moments read and written, the gradient read."""
    count, rule = s.optimized, AdamWConfig(1e-5, 0.9, 0.999, 1e-8, 0.0, 1)
    weight, grad, first, second = inputs.adam(s, torch.bfloat16)
    plain = weight.clone().requires_grad_()
    plain.grad = grad
    calls = {
        "AdamW in bf16, stochastic rounding": lambda: adamw_(weight, grad, (first, second), rule, 1),
        "AdamW in bf16, torch's fused": torch.optim.AdamW([plain], fused=True).step,
    }
    return timing.rows(calls, 14.0 * count, 16.0 * count)


def measure(sizes: Sizes | None = None) -> Iterator[Row]:
    sizes = sizes or Sizes()
    for case in (case for cases in (elementwise, attentions, linears) for case in cases(sizes)):
        yield from both_ways(case)
        torch.cuda.empty_cache()
    for calls in (heads, nf4, optimizers):
        yield from calls(sizes)
        torch.cuda.empty_cache()


def run(args: argparse.Namespace, record: Record) -> bool:
    ceilings = limits.measure()
    record.put("ceilings", ceilings, tables.ceilings_line({"ceilings": ceilings}))
    record.put("ops", list(measure()), tables.ops_table(record.result))
    return True
