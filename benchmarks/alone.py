"""What a step's large products and attention take on this card with nothing else around them, once its power limit settles.

Ceilings of single products flatter a card: after a second of them its power limit lowers the clock. So the products of one
step (`floors.floor_ms` counts the same ones) and torch's fastest causal attention run back to back, on random numbers.
"""

import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.jobs import JOBS, RECOMPUTED, SHAPES, Job

SETTLE_S, MEASURE_S = 2.0, 2.0
SETS = 4  # weights of so many layers take turns, more than the L2 cache holds
CHUNK = 1024  # tokens of the head at a time


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.05


class Products:
    """The products and the attention of one step of `job`, outputs thrown away."""

    def __init__(self, job: Job, recompute: bool) -> None:
        shape = SHAPES[job.shape]
        self.job, self.recompute, self.layers = job, recompute, shape["num_hidden_layers"]
        width, mlp, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
        queries, keys = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
        sizes = ((width, queries + 2 * keys), (queries, width), (width, 2 * mlp), (mlp, width))
        self.weights = [[_draw(out, into) for into, out in sizes] for _ in range(SETS)]
        self.inputs = {into: _draw(job.tokens, into) for into, _ in sizes}
        self.gradients = {out: _draw(job.tokens, out) for _, out in sizes}
        self.head, self.hidden = _draw(shape["vocab_size"], width), _draw(job.tokens, width)
        rows = (job.batch, job.length)
        self.qkv = [
            _draw(*rows, heads, dim).transpose(1, 2).requires_grad_()
            for heads in (shape["num_attention_heads"], *[shape["num_key_value_heads"]] * 2)
        ]
        self.upstream = _draw(*rows, shape["num_attention_heads"], dim).transpose(1, 2)

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
        for rows in self.hidden.split(CHUNK):
            logits = rows @ self.head.T
            _ = logits @ self.head
            if self.job.kind == "full":
                _ = logits.T @ rows


def alone_ms(name: str, mode: str) -> float:
    """Milliseconds that one step's products and attention take, back to back, after SETTLE_S seconds of them."""
    products = Products(JOBS[name], mode in RECOMPUTED)
    times: list[float] = []
    begin = time.perf_counter()
    while sum(times) < MEASURE_S:
        start = time.perf_counter()
        products.step()
        torch.cuda.synchronize()
        if start - begin > SETTLE_S:
            times.append(time.perf_counter() - start)
    return sum(times) / len(times) * 1e3
