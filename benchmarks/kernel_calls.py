"""Runs every Triton kernel of hasten, forward and backward, on small shapes that fill no tile.

    python -m benchmarks.kernel_calls
is what the sanitizers watch (benchmarks/sanitize.py). A new kernel needs a call in CALLS; a test finds a kernel without one.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import inputs
from benchmarks.harness.timing import DEVICE
from benchmarks.inputs import SMALL, Sizes
from hasten.ops import (
    LoraHead,
    NormConfig,
    NormInput,
    QKNorm,
    ScoreConfig,
    add_norm,
    glu,
    linear_cross_entropy,
    norm,
    norm_with_residual,
    qk_rope,
)
from hasten.ops.adamw import AdamWConfig, adamw_
from hasten.ops.attention import attention, row_spans
from hasten.ops.decode_attention import BLOCK, NewToken, attend_new_token, decode_attention, write_cache
from hasten.ops.host_rows import host_rows
from hasten.ops.lora import HeadsConfig, lora_linears, lora_mlp, lora_qkv
from hasten.ops.lora.kernels.lora_delta import MIN_WIDTH_BACKWARD, add_lora_delta, lora_delta_bwd
from hasten.ops.matvec import Part, matvecs, split_matvecs
from hasten.ops.nf4 import dequantize_nf4, matvecs_nf4


def _leaf(s: Sizes, *shape: int) -> torch.Tensor:
    return inputs.draw(s, *shape, scale=0.3).requires_grad_()


def backward(outputs: Iterable[torch.Tensor | None]) -> None:
    """Runs the backward of every output that requires it, from random upstream gradients."""
    made = [out for out in outputs if out is not None and out.requires_grad]
    torch.autograd.backward(made, [torch.randn_like(out) for out in made])


def _trained(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


def _norms(s: Sizes) -> None:
    for kind, *weights in (("rms", 37), ("layer", 37), ("rms", 3, 130), ("layer", 3, 8)):
        for offset, fp32 in ((False, False), (True, True)):
            rule = NormConfig(1e-5, kind, offset, fp32)  # pyright: ignore[reportArgumentType]
            x, weight = _leaf(s, 5, 3, weights[-1]), _leaf(s, *weights)
            backward([norm(x, weight, rule, "triton")])
            if len(weights) == 1:
                backward([add_norm(x, weight, _leaf(s, 5, 3, weights[-1]), rule, "triton")])
            backward(norm_with_residual(x, weight.detach(), rule, "triton"))


def _rotations(s: Sizes) -> None:
    s = replace(s, length=5, dim=12)
    cos, sin = (torch.randn(s.batch, s.length, s.dim, device=DEVICE) for _ in range(2))
    per_head = QKNorm(_leaf(s, s.heads, s.dim), _leaf(s, s.kv, s.dim), NormConfig(1e-5, "layer", False, True))
    shared = QKNorm(_leaf(s, s.dim), _leaf(s, s.dim), NormConfig(1e-5, "rms", True, False))
    for rotation in ("half", "interleaved"):
        for qk_norm in (None, per_head, shared):
            for position in ((cos, sin), (cos[:1], sin[:1]), None):
                if position is None and qk_norm is None:
                    continue
                q, k = _trained(inputs.heads(s, s.heads, s.kv))
                backward(qk_rope(q, k, position, rotation, True, qk_norm, "triton"))  # pyright: ignore[reportArgumentType]


def _activations(s: Sizes) -> None:
    for activation in ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
        gate, up = inputs.gate_and_up(replace(s, mlp=37), packed=True)
        backward([glu(gate.requires_grad_(), up.requires_grad_(), activation, "triton")])


def _heads(s: Sizes) -> None:
    s = replace(s, batch=1, length=7)
    every = frozenset({"entropy", "is_top1", "log_sum_sq_probs", "mean_logits"})
    for rule, trained in (
        (ScoreConfig(chunk=3), False),
        (ScoreConfig(0.5, 4.0, 0.7, label_smoothing=0.1, want=every, chunk=4), True),
    ):
        hidden, weight, labels = inputs.head(s)
        labels[2] = -100
        bias = inputs.draw(s, s.words)
        lora = LoraHead(_leaf(s, 3, s.width), _leaf(s, s.words, 3), 0.5) if trained else None
        parameters = [one.requires_grad_(trained) for one in (weight, bias)]
        scores = linear_cross_entropy(
            hidden.requires_grad_(), parameters[0], labels, rule, parameters[1], lora, "triton"
        )
        backward([scores.loss, scores.log_prob, scores.entropy])


def _loras(s: Sizes) -> None:
    x, residual = _trained([inputs.stream(s), inputs.stream(s)])
    qkv = [inputs.adapted(s, *shape) for shape in inputs.qkv_shapes(s)]
    backward(lora_linears(x, qkv, backend="triton"))
    backward(lora_linears(x, [inputs.adapted(s, s.width, s.width)], residual, backend="triton"))
    source, weight = inputs.stream(s), inputs.draw(s, s.width)
    rule = NormConfig(1e-5)
    norm_input = NormInput(source, weight, rule)
    qk_norm = QKNorm(_leaf(s, s.dim), _leaf(s, s.dim), rule)
    heads = HeadsConfig(s.dim, inputs.angles(s, torch.float32), qk_norm=qk_norm)
    normed = norm(source, weight, rule, "triton").requires_grad_()
    backward(lora_qkv(normed, qkv, heads, norm_input, "triton"))
    for ranks in ((3, 20, 4), (16, 16, 16)):
        gate, up, down = (
            inputs.adapted(replace(s, rank=rank), *shape)
            for rank, shape in zip(ranks, inputs.mlp_shapes(s), strict=True)
        )
        backward([lora_mlp(x, (gate, up, down), "silu", residual, backend="triton")])
    gate, up, down = (inputs.frozen(s, *shape) for shape in inputs.mlp_shapes(s))
    backward([lora_mlp(x, (gate, up, down), "gelu_pytorch_tanh", backend="triton")])


def _lora_deltas(s: Sizes) -> None:
    """The launchers alone, without cuBLAS matmuls between them."""
    base, xa, b = inputs.draw(s, 75, 301), inputs.draw(s, 75, 7), inputs.draw(s, 7, 301)
    add_lora_delta(base, xa, b)
    add_lora_delta(base[:1].expand(75, -1), xa, b)
    lora_delta_bwd(base, xa, b, splits=3)


def _wide_loras(s: Sizes) -> None:
    (x,) = _trained([inputs.stream(s)])
    backward(lora_linears(x, [inputs.adapted(s, MIN_WIDTH_BACKWARD + 4, s.width)], backend="triton"))


def _attentions(s: Sizes) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]] * 2, device=DEVICE)
    packing = row_spans((2, 13, positions.device), position_ids_BT=positions)
    for width, window, softcap, packed in ((16, None, None, False), (24, s.window, 5.0, True), (16, 5, None, True)):
        q, k, v = _trained(inputs.qkv_heads(replace(s, length=13, heads=4, kv=2, dim=width)))
        backward([attention(q, k, v, width**-0.5, window, softcap, packing if packed else None, "triton")])


def _nf4(s: Sizes) -> None:
    rows, width = 3, 192
    for double in (False, True):
        weight = inputs.nf4(rows, width, double)
        dequantize_nf4(weight, s.dtype, backend="triton")
        dequantize_nf4(weight, s.dtype, torch.empty(rows, width + 7, device=DEVICE, dtype=s.dtype)[:, :width], "triton")


def _adamw(s: Sizes) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        w, g, m, v = inputs.adam(s, dtype)
        adamw_(w, g, (m, v), AdamWConfig(1e-3, 0.9, 0.999, 1e-8, 0.01, 1), 3, "triton")


def _host_rows(s: Sizes) -> None:
    table = torch.randn(11, 1030, dtype=s.dtype)
    host_rows(table.pin_memory() if DEVICE == "cuda" else table, torch.tensor([[3, 10, 0]], device=DEVICE), "triton")


def _one_token(s: Sizes) -> None:
    """Matrix-vector products."""
    width = 2112
    x = inputs.draw(s, width)
    part = Part(inputs.draw(s, 5, width), inputs.draw(s, 5), inputs.draw(s, 5, 3), 0.5)
    xa, residual = torch.rand(2, 6, device=DEVICE), inputs.draw(s, 10)
    matvecs([part, part], x, xa, residual, backend="triton")
    matvecs([part, part], x, xa, activation="silu", backend="triton")
    split_matvecs([part, part], x, 2, "triton")
    for double in (True, False):
        weight = inputs.nf4(3, width, double)
        matvecs_nf4([Part(weight)] * 3, x, None, inputs.draw(s, 9), backend="triton")
        matvecs_nf4([Part(weight)] * 2, x, activation="silu", backend="triton")


def _cached_attentions(s: Sizes) -> None:
    s = replace(s, length=3, heads=4, dim=80)
    cache = inputs.cache(s, BLOCK)
    q, k, v = inputs.qkv_heads(s)
    write_cache(k, v, cache, "triton")
    for window, softcap in ((None, None), (7, 2.0)):
        decode_attention(q, cache, 0.1, window, softcap, "triton")
    s = replace(s, length=1)
    rule = QKNorm(inputs.draw(s, s.dim), inputs.draw(s, s.dim), NormConfig(1e-5))
    for qk_norm in (None, rule):
        q, k, v = inputs.qkv_heads(s)
        token = NewToken(q, k, v, inputs.angles(s, torch.float32), qk_norm=qk_norm)
        attend_new_token(token, cache, 0.1, backend="triton")


CALLS: dict[str, Callable[[Sizes], Any]] = {
    "norms": _norms,
    "rotary embeddings": _rotations,
    "activations": _activations,
    "heads": _heads,
    "LoRA": _loras,
    "wide LoRA": _wide_loras,
    "LoRA deltas": _lora_deltas,
    "attention": _attentions,
    "NF4": _nf4,
    "AdamW": _adamw,
    "rows of a CPU table": _host_rows,
    "one token": _one_token,
    "attention over a cache": _cached_attentions,
}


def call_all(names: Iterable[str] = CALLS, sizes: Sizes = SMALL) -> None:
    """Runs entries of CALLS on random inputs."""
    torch.manual_seed(0)
    for name in names:
        CALLS[name](sizes)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    names = sys.argv[1:] or list(CALLS)
    call_all(names)
    print(f"called {', '.join(names)}")
