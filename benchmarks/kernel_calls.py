"""Runs every Triton kernel of hasten, forward and backward, on small shapes that fill no tile.

    python -m benchmarks.kernel_calls
is what the sanitizers watch (benchmarks/sanitize.py). A new kernel needs a call in CALLS; a test finds a kernel without one.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.harness.timing import DEVICE, DTYPE
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
from hasten.ops.decode_attention import BLOCK, CacheView, NewToken, attend_new_token, decode_attention, write_cache
from hasten.ops.host_rows import host_rows
from hasten.ops.lora import DenseWeight, HeadsConfig, LoraLinear, lora_linears, lora_mlp, lora_qkv
from hasten.ops.lora.kernels.lora_delta import MIN_WIDTH_BACKWARD, add_lora_delta, lora_delta_bwd
from hasten.ops.matvec import Part, matvecs, split_matvecs
from hasten.ops.nf4 import NF4Weight, dequantize_nf4, matvecs_nf4


def _draw(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * 0.3).to(dtype or DTYPE).requires_grad_()


def _back(outputs: Iterable[torch.Tensor | None]) -> None:
    """Runs the backward of every output that requires it, from random upstream gradients."""
    made = [out for out in outputs if out is not None and out.requires_grad]
    torch.autograd.backward(made, [torch.randn_like(out) for out in made])


def _norms() -> None:
    for kind, *weights in (("rms", 37), ("layer", 37), ("rms", 3, 130), ("layer", 3, 8)):
        for offset, fp32 in ((False, False), (True, True)):
            rule = NormConfig(1e-5, kind, offset, fp32)  # pyright: ignore[reportArgumentType]
            x, weight = _draw(5, 3, weights[-1]), _draw(*weights)
            _back([norm(x, weight, rule, "triton")])
            if len(weights) == 1:
                _back([add_norm(x, weight, _draw(5, 3, weights[-1]), rule, "triton")])
            frozen = weight.detach()
            _back(norm_with_residual(x, frozen, rule, "triton"))


def _rotations() -> None:
    cos, sin = (torch.randn(2, 5, 12, device=DEVICE) for _ in range(2))
    per_head = QKNorm(_draw(5, 12), _draw(1, 12), NormConfig(1e-5, "layer", False, True))
    shared = QKNorm(_draw(12), _draw(12), NormConfig(1e-5, "rms", True, False))
    for rotation in ("half", "interleaved"):
        for qk_norm in (None, per_head, shared):
            for position in ((cos, sin), (cos[:1], sin[:1]), None):
                if position is None and qk_norm is None:
                    continue
                q, k = _draw(2, 5, 5, 12), _draw(2, 5, 1, 12)
                _back(qk_rope(q, k, position, rotation, True, qk_norm, "triton"))  # pyright: ignore[reportArgumentType]


def _activations() -> None:
    for activation in ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
        gate, up = _draw(3, 5, 2 * 37).chunk(2, dim=-1)
        _back([glu(gate, up, activation, "triton")])


def _heads() -> None:
    labels = torch.tensor([3, 8, -100, 500, 0, 76, 12], device=DEVICE)
    every = frozenset({"entropy", "is_top1", "log_sum_sq_probs", "mean_logits"})
    for rule, trained in (
        (ScoreConfig(chunk=3), False),
        (ScoreConfig(0.5, 4.0, 0.7, label_smoothing=0.1, want=every, chunk=4), True),
    ):
        hidden, weight, bias = _draw(7, 24), _draw(501, 24), _draw(501)
        lora = LoraHead(_draw(3, 24), _draw(501, 3), 0.5) if trained else None
        if not trained:
            weight, bias = weight.detach(), bias.detach()
        scores = linear_cross_entropy(hidden, weight, labels, rule, bias, lora, "triton")
        _back([scores.loss, scores.log_prob, scores.entropy])


def _adapted(out: int, width: int, rank: int) -> LoraLinear:
    return LoraLinear(DenseWeight(_draw(out, width).detach()), None, _draw(rank, width), _draw(out, rank), 0.5)


def _loras() -> None:
    x, residual = _draw(2, 19, 24), _draw(2, 19, 24)
    _back(lora_linears(x, [_adapted(out, 24, 5) for out in (40, 16, 8)], backend="triton"))
    _back(lora_linears(x, [_adapted(24, 24, 5)], residual, backend="triton"))
    source, weight = _draw(2, 19, 24).detach(), _draw(24).detach()
    rule = NormConfig(1e-5)
    norm_input = NormInput(source, weight, rule)
    table = torch.randn(1, 19, 8, device=DEVICE)
    heads = HeadsConfig(8, (table, table), qk_norm=QKNorm(_draw(8), _draw(8), rule))
    normed = norm(source, weight, rule, "triton").requires_grad_()
    _back(lora_qkv(normed, [_adapted(out, 24, 5) for out in (40, 8, 8)], heads, norm_input, "triton"))
    for ranks in ((3, 20, 4), (16, 16, 16)):
        gate, up = (_adapted(150, 24, rank) for rank in ranks[:2])
        _back([lora_mlp(x, (gate, up, _adapted(24, 150, ranks[2])), "silu", residual, backend="triton")])
    plain = [LoraLinear(DenseWeight(_draw(*shape).detach())) for shape in ((150, 24), (150, 24), (24, 150))]
    _back([lora_mlp(x, (plain[0], plain[1], plain[2]), "gelu_pytorch_tanh", backend="triton")])


def _lora_deltas() -> None:
    """The launchers alone, without cuBLAS matmuls between them."""
    base, xa, b = _draw(75, 301).detach(), _draw(75, 7).detach(), _draw(7, 301).detach()
    add_lora_delta(base, xa, b)
    add_lora_delta(base[:1].expand(75, -1), xa, b)
    lora_delta_bwd(base, xa, b, splits=3)


def _wide_loras() -> None:
    _back(lora_linears(_draw(2, 19, 24), [_adapted(MIN_WIDTH_BACKWARD + 4, 24, 5)], backend="triton"))


def _attentions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]] * 2, device=DEVICE)
    packing = row_spans((2, 13, positions.device), position_ids_BT=positions)
    for width, window, softcap, packed in ((16, None, None, False), (24, 4, 5.0, True), (16, 5, None, True)):
        q, k, v = _draw(2, 13, 4, width), _draw(2, 13, 2, width), _draw(2, 13, 2, width)
        _back([attention(q, k, v, width**-0.5, window, softcap, packing if packed else None, "triton")])


def _nf4() -> None:
    rows, width = 3, 192
    blocks = rows * width // 64
    packed = torch.randint(0, 256, (rows * width // 2, 1), device=DEVICE, dtype=torch.uint8)
    code = torch.linspace(-1, 1, 16, device=DEVICE)
    plain = NF4Weight(packed, code, (rows, width), torch.rand(blocks, device=DEVICE))
    double = NF4Weight(
        packed, code, (rows, width), torch.randint(0, 256, (blocks,), device=DEVICE, dtype=torch.uint8),
        torch.rand(256, device=DEVICE), torch.rand(1, device=DEVICE), torch.rand((), device=DEVICE),
    )  # fmt: skip
    for weight in (plain, double):
        dequantize_nf4(weight, DTYPE, backend="triton")
        dequantize_nf4(weight, DTYPE, torch.empty(rows, width + 7, device=DEVICE, dtype=DTYPE)[:, :width], "triton")


def _adamw() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        w, g, m, v = (torch.ones(1030, device=DEVICE, dtype=dtype) for _ in range(4))
        adamw_(w, g, (m, v), AdamWConfig(1e-3, 0.9, 0.999, 1e-8, 0.01, 1), 3, "triton")


def _host_rows() -> None:
    table = torch.randn(11, 1030, dtype=DTYPE)
    host_rows(table.pin_memory() if DEVICE == "cuda" else table, torch.tensor([[3, 10, 0]], device=DEVICE), "triton")


def _decoding() -> None:
    """One token: matrix-vector products, and attention over a cache that reaches into a second block."""
    x = _draw(2112).detach()
    part = Part(_draw(5, 2112).detach(), _draw(5).detach(), _draw(5, 3).detach(), 0.5)
    xa, residual = torch.rand(2, 6, device=DEVICE), _draw(10).detach()
    matvecs([part, part], x, xa, residual, backend="triton")
    matvecs([part, part], x, xa, activation="silu", backend="triton")
    split_matvecs([part, part], x, 2, "triton")
    for double in (True, False):
        count = 3 * 2112 // 64
        codes = torch.randint(0, 256, (3 * 2112 // 2, 1), dtype=torch.uint8, device=DEVICE)
        scale_code = torch.rand(256, device=DEVICE)
        index = torch.randint(0, 256, (count,), dtype=torch.uint8, device=DEVICE)
        nested = (index, scale_code, torch.rand(1, device=DEVICE), torch.rand((), device=DEVICE))
        plain = (torch.rand(count, device=DEVICE), None, None, None)
        weight = NF4Weight(codes, torch.rand(16, device=DEVICE), (3, 2112), *(nested if double else plain))
        matvecs_nf4([Part(weight)] * 3, x, None, _draw(9).detach(), backend="triton")
        matvecs_nf4([Part(weight)] * 2, x, activation="silu", backend="triton")
    blocks = [torch.randn(2, 2, 1, BLOCK, 80, device=DEVICE).to(DTYPE) for _ in range(2)]
    table = torch.tensor([block.data_ptr() for block in blocks], device=DEVICE)
    slots, starts = (torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in ([BLOCK - 1, 3], [0, 5]))
    cache = CacheView(blocks, table, slots, starts)
    q, k, v = _draw(2, 3, 4, 80).detach(), _draw(2, 3, 1, 80).detach(), _draw(2, 3, 1, 80).detach()
    write_cache(k, v, cache, "triton")
    token = NewToken(
        q[:, :1], k[:, :1], v[:, :1], (torch.rand(2, 1, 80, device=DEVICE), torch.rand(2, 1, 80, device=DEVICE))
    )
    attend_new_token(token, cache, 0.1, 7, 2.0, "triton")
    for window, softcap in ((None, None), (7, 2.0)):
        decode_attention(q, cache, 0.1, window, softcap, "triton")


CALLS: dict[str, Callable[[], Any]] = {
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
    "decoding": _decoding,
}


def call_all(names: Iterable[str] = CALLS) -> None:
    """Runs entries of CALLS on random inputs."""
    torch.manual_seed(0)
    for name in names:
        CALLS[name]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    names = sys.argv[1:] or list(CALLS)
    call_all(names)
    print(f"called {', '.join(names)}")
