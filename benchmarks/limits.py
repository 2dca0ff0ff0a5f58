"""What bounds a step on this card: measured ceilings, the floor they give, and a step's matmuls and attention alone."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness.jobs import JOBS, RECOMPUTED, SHAPES, Job, sizes
from benchmarks.harness.timing import DEVICE, draw, milliseconds

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SETTLE_S, MEASURE_S = 2.0, 2.0
SETS = 4  # sets of layer weights used in turn: more than the L2 cache holds
CHUNK = 1024  # tokens of the head at a time


def copy_rate() -> float:
    """Bytes a second of a large device-to-device copy; reads and writes count."""
    source = torch.randn(1 << 30, device=DEVICE, dtype=torch.float16)
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / (milliseconds(lambda: target.copy_(source)) / 1e3)


def matmul_rate(size: int = 8192) -> float:
    """FLOP a second of a square bf16 matmul of random numbers."""
    left, right = draw(size, size), draw(size, size)
    return 2 * size**3 / (milliseconds(lambda: left @ right) / 1e3)


def attention_rates(batch: int = 4, heads: int = 32, length: int = 2048, width: int = 128) -> dict[str, Any]:
    """FLOP a second of causal attention, forward and backward, on the fastest backend of each; only visible pairs count.

    A backend that refuses the shape says so and has a rate of 0. Raises RuntimeError if all refuse.
    """
    qkv = [draw(batch, heads, length, width).requires_grad_() for _ in range(3)]
    flops = 2 * batch * heads * length**2 * width
    rates = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            try:
                spent = _attention_ms(qkv)
            except RuntimeError as error:
                print(f"attention on {name}: {str(error).splitlines()[0]}", flush=True)
                spent = {"forward": math.inf, "backward": math.inf}
        rates[name] = {
            "forward": flops / spent["forward"] * 1e3, "backward": 2.5 * flops / spent["backward"] * 1e3,
        }  # fmt: skip
    best = {f"attention_{way}": max(rate[way] for rate in rates.values()) for way in ("forward", "backward")}
    if not all(best.values()):
        raise RuntimeError(f"no backend of torch's attention supports {(batch, heads, length, width)}")
    return {**best, "attention_by_backend": rates}


def _attention_ms(qkv: list[torch.Tensor]) -> dict[str, float]:
    q, k, v = qkv
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    upstream = torch.randn_like(out)
    return {
        "forward": milliseconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True)),
        "backward": milliseconds(lambda: torch.autograd.grad(out, qkv, upstream, retain_graph=True)),
    }


def measure() -> dict[str, Any]:
    """FLOP/s and bytes/s: "matmul", "copy", "attention_forward", "attention_backward", and each attention backend's."""
    found: dict[str, Any] = {"matmul": matmul_rate(), "copy": copy_rate()}
    torch.cuda.empty_cache()
    found.update(attention_rates())
    torch.cuda.empty_cache()
    return found


def floor_ms(job: Job, mode: str, ceilings: Mapping[str, float]) -> dict[str, float]:
    """Least milliseconds of a step of `job` at the measured ceilings, by part and in "total". ceilings: from `measure`.

    With P parameters in the layers' linears, N tokens a step, and 2 N in out for a matmul of (N, in) by (in, out):
    - "matmuls": 4 P N (output, and gradient of the input), + 2 P N if the weights train, + 2 P N if layers are recomputed, at
      the rate of a large matmul;
    - "head": 4 N V E, + 2 N V E if it trains;
    - "attention": causal, so half of all pairs: 2 B H T^2 D forward (twice if recomputed) and 5 B H T^2 D backward (five matmuls
      instead of two), at attention's own rates;
    - "weights": bytes at the rate of a copy. NF4: half a byte read and two written per weight, forward and backward. Full
      fine-tuning: AdamW reads weight, gradient and two Adam moments and writes three, two bytes each.
    Norms, rotary embedding, activation, LoRA and launches are not counted. "default" and "budget" have the floor of "keep":
    nothing must be recomputed as long as CPU memory can hold the saved activations.
    """
    shape, found, tokens = SHAPES[job.shape], sizes(SHAPES[job.shape]), job.tokens
    full, again = job.kind == "full", mode in RECOMPUTED
    pairs = job.batch * shape["num_attention_heads"] * job.length**2 * shape["head_dim"] * shape["num_hidden_layers"]
    attention = 2 * pairs * (1 + again) / ceilings["attention_forward"] + 5 * pairs / ceilings["attention_backward"]
    moved = 2 * 2.5 * found.linears if job.kind == "qlora" else 0.0
    if full:
        moved = 14.0 * (found.linears + found.head + found.embeddings)
    parts = {
        "matmuls": (4 + 2 * full + 2 * again) * found.linears * tokens / ceilings["matmul"],
        "head": (4 + 2 * full) * found.head * tokens / ceilings["matmul"],
        "attention": attention,
        "weights": moved / ceilings["copy"],
    }
    parts = {name: seconds * 1e3 for name, seconds in parts.items()}
    return {**parts, "total": sum(parts.values())}


class Matmuls:
    """The matmuls and the attention of one step of `job` (those that `floor_ms` counts), outputs discarded."""

    def __init__(self, job: Job, recompute: bool) -> None:
        shape = SHAPES[job.shape]
        self.job, self.recompute, self.layers = job, recompute, shape["num_hidden_layers"]
        width, mlp, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
        heads, kv = shape["num_attention_heads"], shape["num_key_value_heads"]
        linears = ((width, (heads + 2 * kv) * dim), (heads * dim, width), (width, 2 * mlp), (mlp, width))
        self.weights = [[draw(out, into, scale=0.05) for into, out in linears] for _ in range(SETS)]
        self.inputs = {into: draw(job.tokens, into, scale=0.05) for into, _ in linears}
        self.gradients = {out: draw(job.tokens, out, scale=0.05) for _, out in linears}
        self.head, self.hidden = draw(shape["vocab_size"], width, scale=0.05), draw(job.tokens, width, scale=0.05)
        at = (job.batch, job.length)
        self.qkv = [draw(*at, n, dim, scale=0.05).transpose(1, 2).requires_grad_() for n in (heads, kv, kv)]
        self.upstream = draw(*at, heads, dim, scale=0.05).transpose(1, 2)

    def attend(self) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = self.qkv
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def layer(self, weights: list[torch.Tensor]) -> None:
        for _ in range(2 if self.recompute else 1):
            attended = self.attend()
            for weight in weights:
                _ = self.inputs[weight.shape[1]] @ weight.T
        torch.autograd.grad(attended, self.qkv, self.upstream)
        for weight in weights:
            upstream = self.gradients[weight.shape[0]]
            _ = upstream @ weight
            if self.job.kind == "full":
                _ = upstream.T @ self.inputs[weight.shape[1]]

    def step(self) -> None:
        for index in range(self.layers):
            self.layer(self.weights[index % SETS])
        for hidden in self.hidden.split(CHUNK):
            logits = hidden @ self.head.T
            _ = logits @ self.head
            if self.job.kind == "full":
                _ = logits.T @ hidden


def alone_ms(name: str, mode: str) -> float:
    """Milliseconds of one step's matmuls and attention, back to back, after SETTLE_S seconds of them.

    A second of large matmuls makes the power limit lower the clock, which the ceilings of single matmuls do not show.
    """
    matmuls = Matmuls(JOBS[name], mode in RECOMPUTED)
    times: list[float] = []
    begin = time.perf_counter()
    while sum(times) < MEASURE_S:
        start = time.perf_counter()
        matmuls.step()
        torch.cuda.synchronize()
        if start - begin > SETTLE_S:
            times.append(time.perf_counter() - start)
    return sum(times) / len(times) * 1e3
