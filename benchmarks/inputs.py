"""Random inputs of hasten's kernels, of any size: ops.py times a step's, kernel_calls.py runs small ones that fill no tile."""

from dataclasses import dataclass

import torch

from benchmarks.harness.timing import DEVICE, DTYPE
from benchmarks.harness.timing import draw as draw_in
from hasten.ops.decode_attention import CacheView
from hasten.ops.lora import DenseWeight, LoraLinear
from hasten.ops.nf4 import NF4Weight


@dataclass(frozen=True)
class Sizes:
    """Of a step of an 8B model: batch x length tokens, width and MLP width, heads of q and of k and v with `dim` channels, words,
    LoRA's rank, keys that a window sees, weights of an optimizer. dtype: of everything drawn."""

    batch: int = 4
    length: int = 2048
    width: int = 4096
    mlp: int = 14336
    heads: int = 32
    kv: int = 8
    dim: int = 128
    words: int = 128256
    rank: int = 16
    window: int = 512
    optimized: int = 2**28
    dtype: torch.dtype = DTYPE

    @property
    def tokens(self) -> int:
        return self.batch * self.length


SMALL = Sizes(2, 19, 24, 150, 5, 1, 8, 501, 5, 4, 1030)
"""Nothing is a multiple of a tile."""


def draw(s: Sizes, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return draw_in(*shape, scale=scale, dtype=s.dtype)


def stream(s: Sizes) -> torch.Tensor:
    """(B, T, E): hidden states."""
    return draw(s, s.batch, s.length, s.width)


def heads(s: Sizes, *counts: int) -> list[torch.Tensor]:
    """(B, T, H, D) for each number of heads H."""
    return [draw(s, s.batch, s.length, count, s.dim) for count in counts]


def qkv_heads(s: Sizes) -> list[torch.Tensor]:
    return heads(s, s.heads, s.kv, s.kv)


def angles(s: Sizes, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (1, T, D) for any rotation. dtype: None = that of the sizes."""
    table = torch.randn(1, s.length, s.dim // 2, device=DEVICE).repeat(1, 1, 2).to(dtype or s.dtype)
    return table, table


def gate_and_up(s: Sizes, packed: bool = False) -> list[torch.Tensor]:
    """(B * T, F) each; packed: halves of one buffer."""
    if packed:
        return list(draw(s, s.tokens, 2 * s.mlp).chunk(2, dim=-1))
    return [draw(s, s.tokens, s.mlp) for _ in range(2)]


def frozen(s: Sizes, out: int, width: int) -> LoraLinear:
    return LoraLinear(DenseWeight(draw(s, out, width, scale=0.02)))


def adapted(s: Sizes, out: int, width: int) -> LoraLinear:
    """A frozen weight with a LoRA that trains in fp32."""
    a = torch.randn(s.rank, width, device=DEVICE) * 0.01
    b = torch.randn(out, s.rank, device=DEVICE) * 0.01
    return LoraLinear(frozen(s, out, width).weight, None, a.requires_grad_(), b.requires_grad_(), 1.0)


def qkv_shapes(s: Sizes) -> tuple[tuple[int, int], ...]:
    """(output, input channels) of q, k and v."""
    return (s.heads * s.dim, s.width), (s.kv * s.dim, s.width), (s.kv * s.dim, s.width)


def mlp_shapes(s: Sizes) -> tuple[tuple[int, int], ...]:
    """(output, input channels) of gate, up and down."""
    return (s.mlp, s.width), (s.mlp, s.width), (s.width, s.mlp)


def head(s: Sizes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (N, E), weight (V, E), labels (N,)."""
    labels = torch.randint(0, s.words, (s.tokens,), device=DEVICE)
    return draw(s, s.tokens, s.width), draw(s, s.words, s.width, scale=0.02), labels


def nf4(rows: int, width: int, double: bool) -> NF4Weight:
    """Random codes; double: with quantised scales."""
    blocks = rows * width // 64
    codes = torch.randint(0, 256, (rows * width // 2, 1), device=DEVICE, dtype=torch.uint8)
    code = torch.linspace(-1, 1, 16, device=DEVICE)
    if not double:
        return NF4Weight(codes, code, (rows, width), torch.rand(blocks, device=DEVICE))
    scales = torch.randint(0, 256, (blocks,), device=DEVICE, dtype=torch.uint8)
    outer = (torch.rand(256, device=DEVICE), torch.rand(-(-blocks // 256), device=DEVICE))
    return NF4Weight(codes, code, (rows, width), scales, *outer, torch.rand((), device=DEVICE))


def adam(s: Sizes, dtype: torch.dtype) -> list[torch.Tensor]:
    """weight, gradient and Adam moments, flat."""
    return [torch.rand(s.optimized, device=DEVICE, dtype=dtype) for _ in range(4)]


def cache(s: Sizes, block: int) -> CacheView:
    """One layer's keys and values in two blocks; the next tokens of the first sequence reach into the second."""
    blocks = [torch.randn(2, s.batch, s.kv, block, s.dim, device=DEVICE).to(s.dtype) for _ in range(2)]
    table = torch.tensor([one.data_ptr() for one in blocks], device=DEVICE)
    slots = torch.tensor([block - 1, *[3] * (s.batch - 1)], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, *[5] * (s.batch - 1)], dtype=torch.int32, device=DEVICE)
    return CacheView(blocks, table, slots, starts)
