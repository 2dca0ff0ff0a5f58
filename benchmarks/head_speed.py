"""The fused head: its kernel's candidate launches, accumulating the weight's gradient, and whole losses against their matmuls.

    python -m benchmarks.head_speed
Prints three short tables, in about a minute on an H200. Times are medians in milliseconds.
"""

import functools
from typing import Any

import torch

from benchmarks.harness.timing import draw, milliseconds
from benchmarks.limits import copy_rate
from hasten.ops import LoraHead, ScoreConfig, linear_cross_entropy, linear_cross_entropy_loss
from hasten.ops.linear_cross_entropy import kernel
from hasten.ops.linear_cross_entropy.function import Upstream, tokens_at_once

WORDS = 128256
SHAPES = {"1b": (16384, 2048), "8b": (8192, 4096)}
draw = functools.partial(draw, scale=0.05)


def kernels(bandwidth: float) -> None:
    """One chunk of 2048 tokens: logits are read and their gradient written; a second read may hit the L2 cache."""
    raw, labels = draw(2048, WORDS), torch.randint(0, WORDS, (2048,), device="cuda")
    scores, upstream = torch.empty(6, 2048, device="cuda"), Upstream(torch.ones(2048, device="cuda"))
    rules = (ScoreConfig(), ScoreConfig(softcap=30.0), ScoreConfig(want=frozenset({"entropy", "is_top1"})))
    print("kernel, 2048 x 128256".ljust(34), "training".rjust(16), "softcap".rjust(16), "entropy, top 1".rjust(16))
    least = 2 * raw.numel() * 2 / bandwidth * 1e3
    for launch in kernel.LAUNCHES:
        times = [
            milliseconds(lambda: kernel.score_rows(raw, labels, rule, scores, upstream, launch))  # noqa: B023
            for rule in rules
        ]
        cells = (f"{t:6.3f} ({least / t:4.2f})".rjust(16) for t in times)
        print(f"  {launch.columns} columns, {launch.warps} warps".ljust(34), *cells, flush=True)
    print("  (in brackets: of the copy bandwidth, one read and one write)")


def sums(width: int) -> None:
    """The matmul of d_weight, and ways to add it to the chunks before."""
    for tokens in (1024, tokens_at_once(ScoreConfig(), draw(1, width), True)):
        left, hidden = draw(tokens, WORDS).T, draw(tokens, width)
        total = torch.zeros(WORDS, width, device="cuda")
        low, fp32 = total.bfloat16(), torch.float32
        exact = total + left.float() @ hidden.float()
        torch.addmm(total, left, hidden, out_dtype=fp32, out=total)
        error = float((total - exact).norm() / exact.norm())
        calls = {
            "bf16 matmul": functools.partial(torch.mm, left, hidden, out=low),
            "fp32 matmul": functools.partial(torch.mm, left, hidden, out_dtype=fp32),
            "added inside": functools.partial(torch.addmm, total, left, hidden, out_dtype=fp32, out=total),
            "added after": lambda: total.add_(torch.mm(left, hidden, out_dtype=fp32)),  # noqa: B023
        }
        times = {name: milliseconds(call) for name, call in calls.items()}
        flop = 2 * tokens * WORDS * width
        cells = (f"{name} {t:.2f} ({flop / t / 1e9:.0f} TFLOP/s)" for name, t in times.items())
        print(f"{tokens} tokens x {width}, error of the sum {error:.1e}:\n  {', '.join(cells)}", flush=True)


def losses(name: str) -> None:
    """Forward and backward of each kind of head."""
    tokens, width = SHAPES[name]
    labels, rule = torch.randint(0, WORDS, (tokens,), device="cuda"), ScoreConfig()
    hidden, weight = draw(tokens, width).requires_grad_(), draw(WORDS, width)
    lora = LoraHead(draw(16, width).requires_grad_(), draw(WORDS, 16).requires_grad_(), 1.0)
    some, low = hidden.detach()[:1024], draw(1024, WORDS)
    matmul = milliseconds(lambda: torch.mm(some, weight.T, out=low)) * tokens / 1024
    print(f"{name}: {tokens} tokens x {width}; one matmul with the head takes {matmul:.1f} ms")
    for case, trains, pair in (("frozen", False, None), ("LoRA", False, lora), ("trained", True, None)):
        weight.requires_grad_(trains)
        leaves = [hidden, *([weight] if trains else []), *([lora.a_RE, lora.b_VR] if pair else [])]

        def loss() -> Any:
            total = linear_cross_entropy_loss(hidden, weight, labels, rule, tokens, None, pair)  # noqa: B023
            return torch.autograd.grad(total, leaves)  # noqa: B023

        def per_token() -> Any:
            total = linear_cross_entropy(hidden, weight, labels, rule, None, pair).loss.sum() / tokens  # noqa: B023
            return torch.autograd.grad(total, leaves)  # noqa: B023

        for way, function in (("loss", loss), ("per token", per_token)):
            time = milliseconds(function, measure_ms=300)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            count = 3 if trains else 2
            print(
                f"  {case:8} {way:10} {time:7.2f} ms, {count} matmuls are {count * matmul / time:.0%} of it, peak {peak:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    kernels(copy_rate())
    sums(2048)
    for name in SHAPES:
        losses(name)
