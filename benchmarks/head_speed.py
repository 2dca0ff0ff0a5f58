"""The fused head: its kernel's candidate launches, the sum of the weight's gradient, and whole losses beside their products.

    python -m benchmarks.head_speed
Prints three short tables, in about a minute on an H200. Times are medians in milliseconds, forward and backward.
"""

from typing import Any

import torch

from benchmarks.ceilings import copy_rate, milliseconds
from hasten.ops import LoraHead, ScoreConfig, linear_cross_entropy, linear_cross_entropy_loss
from hasten.ops.linear_cross_entropy import kernel
from hasten.ops.linear_cross_entropy.function import Upstream, tokens_at_once

WORDS = 128256
SHAPES = {"1b": (16384, 2048), "8b": (8192, 4096)}


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.05


def kernels(bandwidth: float) -> None:
    """One chunk of 2048 tokens: logits are read and their gradient written; a second read comes from the L2 cache or not."""
    raw, labels = _draw(2048, WORDS), torch.randint(0, WORDS, (2048,), device="cuda")
    scores, rule = torch.empty(6, 2048, device="cuda"), ScoreConfig()
    upstream = Upstream(torch.ones(2048, device="cuda"))
    capped = ScoreConfig(softcap=30.0)
    wanted = ScoreConfig(want=frozenset({"entropy", "is_top1"}))
    print("kernel, 2048 x 128256".ljust(34), "training".rjust(16), "softcap".rjust(16), "entropy, top 1".rjust(16))
    moved = 2 * raw.numel() * 2
    for launch in kernel.LAUNCHES:
        times = [
            milliseconds(lambda: kernel.score_rows(raw, labels, r, scores, upstream, launch))  # noqa: B023
            for r in (rule, capped, wanted)
        ]
        cells = (f"{t:6.3f} ({moved / bandwidth * 1e3 / t:4.2f})".rjust(16) for t in times)
        print(f"  {launch.columns} columns, {launch.warps} warps".ljust(34), *cells, flush=True)
    print("  (in brackets: of the copy bandwidth, one read and one write)")


def sums(width: int) -> None:
    """d_weight's product, and ways to add it to what earlier chunks gave."""
    for tokens in (1024, tokens_at_once(ScoreConfig(), _draw(1, width), True)):
        d_raw, hidden = _draw(tokens, WORDS), _draw(tokens, width)
        total = torch.zeros(WORDS, width, device="cuda")
        low = total.bfloat16()
        fp32 = torch.float32
        exact = total + d_raw.T.float() @ hidden.float()
        torch.addmm(total, d_raw.T, hidden, out_dtype=fp32, out=total)
        error = float((total - exact).norm() / exact.norm())
        times = {
            "bf16 product": milliseconds(lambda: torch.mm(d_raw.T, hidden, out=low)),  # noqa: B023
            "fp32 product": milliseconds(lambda: torch.mm(d_raw.T, hidden, out_dtype=fp32)),  # noqa: B023
            "added inside": milliseconds(lambda: torch.addmm(total, d_raw.T, hidden, out_dtype=fp32, out=total)),  # noqa: B023
            "added after": milliseconds(lambda: total.add_(torch.mm(d_raw.T, hidden, out_dtype=fp32))),  # noqa: B023
        }
        flop = 2 * tokens * WORDS * width
        print(f"{tokens} tokens x {width}, error of the sum {error:.1e}:")
        print(
            "  " + ", ".join(f"{name} {t:.2f} ({flop / t / 1e9:.0f} TFLOP/s)" for name, t in times.items()), flush=True
        )


def losses(name: str) -> None:
    tokens, width = SHAPES[name]
    labels = torch.randint(0, WORDS, (tokens,), device="cuda")
    hidden, weight = _draw(tokens, width).requires_grad_(), _draw(WORDS, width)
    lora = LoraHead(_draw(16, width).requires_grad_(), _draw(WORDS, 16).requires_grad_(), 1.0)
    rule = ScoreConfig()
    some, low = hidden.detach()[:1024], _draw(1024, WORDS)
    product = milliseconds(lambda: torch.mm(some, weight.T, out=low)) * tokens / 1024
    print(f"{name}: {tokens} tokens x {width}; one product with the head takes {product:.1f} ms")
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
            products = 3 if trains else 2
            share = products * product / time
            print(
                f"  {case:8} {way:10} {time:7.2f} ms, {products} products are {share:.0%} of it, peak {peak:.2f} GiB",
                flush=True,
            )


def main() -> None:
    kernels(copy_rate())
    sums(2048)
    for name in SHAPES:
        losses(name)


if __name__ == "__main__":
    main()
