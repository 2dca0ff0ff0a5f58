"""Bytes and FLOPs of a training step: what each treatment keeps of a layer, what it needs while it runs, the peak of all.

Symbols: N tokens of a step, T tokens of a row, L layers, E hidden size, Q and K widths of queries and of keys (or values),
F width of the MLP, V vocabulary, R a rank, e bytes of the compute dtype. docs/memory.md has the formulas in words.
The order of events is that of `overlays.layer`, `ops.lora` and `ops.linear_cross_entropy.function`; each `max` below runs
over the moments at which most is alive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hasten.ops.linear_cross_entropy import ScoreRule
from hasten.training.memory.shape import FP32, LayerShape, Linears, ModelShape
from hasten.training.memory.treatment import Treatment

__all__ = [
    "AHEAD",
    "Kept",
    "ModelShape",
    "Optimizer",
    "Peak",
    "backward",
    "forward",
    "kept",
    "peak",
    "remake_flops",
]

Optimizer = Literal["adamw", "adamw_8bit", "paged"]
WORKSPACE = 32 * 2**20
"""cuBLAS's, which torch takes from its own allocator (aten/src/ATen/cuda/CublasHandlePool.cpp, Hopper)."""
AHEAD = 1
"""Layers, beyond the one at work, whose tensors are on the device though they wait on the host: being sent, or fetched ahead."""
UNFUSED = 9
"""Bytes a number that plain torch and PEFT keep in place of each one that the fused path keeps: casts, norms in fp32 and
products before and after an addition. An upper bound, held against the truth by tests/training/test_memory_costs.py."""
SCORE = 8
"""Bytes of a score that attention in plain torch keeps: capped, in fp32 and as weight."""
STATISTICS = 2 * FP32
"""A norm's numbers a token; RMSNorm has one of the two."""
SCORES = 7
"""fp32 numbers a token in the fused loss: six scores and the upstream of one."""


@dataclass(frozen=True)
class Kept:
    """Bytes that one layer keeps from its forward to its backward, on the device and in pinned host memory."""

    device: int
    host: int = 0


@dataclass(frozen=True)
class Peak:
    """Bytes on the device at the moment of a step at which most is allocated. `total` is their sum.

    when: that moment. host: pinned host memory, beside the device. optimizer: moments. layers: what all layers keep.
    working: what the moment itself needs beyond.
    """

    when: str
    weights: int
    gradients: int
    optimizer: int
    layers: int
    working: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.layers + self.working


# What a layer keeps


def kept(layer: LayerShape, treatment: Treatment, tokens: int, length: int, itemsize: int) -> Kept:
    """What `layer` keeps of `tokens`, in rows of `length`, under `treatment`."""
    if treatment in (Treatment.RECOMPUTE, Treatment.OFFLOAD):
        size = tokens * layer.hidden * itemsize
    else:
        size = _attention_kept(layer, tokens, length, itemsize) + _mlp_input(layer, tokens, itemsize)
        size += _mlp_kept(layer, tokens, itemsize) if treatment is Treatment.KEEP else 0
    if treatment is Treatment.OFFLOAD:
        return Kept(0, size)
    if treatment is Treatment.HOST:  # what has a row a token goes
        stays = _adapters(layer.qkv, 0, itemsize) + _adapters(layer.o, 0, itemsize) + tokens * 2 * STATISTICS
        return Kept(stays, size - stays)
    return Kept(size)


def _width(layer: LayerShape, e: int) -> int:
    """Bytes that are kept for each number of the fused path."""
    return e if layer.fused else UNFUSED


def _attention_kept(layer: LayerShape, n: int, length: int, e: int) -> int:
    """The stream, q, k, v (q and k twice where a norm stands before the rotation), attention's output and its sums, x A^T,
    A and B."""
    e = _width(layer, e)
    normed = layer.queries + layer.keys if layer.attention.qk_norm is not None else 0
    numbers = layer.hidden + layer.queries + 2 * layer.keys + normed + layer.queries
    adapters = _adapters(layer.qkv, n, e) + _adapters(layer.o, n, e)
    sums = length * SCORE if layer.scores else FP32
    return n * (numbers * e + layer.heads * sums + STATISTICS) + adapters + _branch(layer, n, e)


def _mlp_input(layer: LayerShape, n: int, e: int) -> int:
    """The stream before the MLP, where it is not the attention's own, and the MLP's output where a norm follows it."""
    e = _width(layer, e)
    own = 0 if layer.facts.residual == "parallel" else n * (layer.hidden * e + STATISTICS)
    return own + _branch(layer, n, e)


def _mlp_kept(layer: LayerShape, n: int, e: int) -> int:
    """Gate and up, x A^T, A and B."""
    e = _width(layer, e)
    return n * 2 * layer.intermediate * e + _adapters(layer.gate_up, n, e) + _adapters(layer.down, n, e)


def _branch(layer: LayerShape, n: int, e: int) -> int:
    """A branch's output, which the norm behind it keeps."""
    return n * (layer.hidden * e + STATISTICS) if layer.facts.residual == "sandwich" else 0


def _adapters(linears: Linears, n: int, e: int) -> int:
    """x A^T of one product's LoRAs, and their A and B as it takes them: all A on top of each other, all B on a diagonal."""
    rank = sum(one.rank for one in linears)
    return rank * (n + linears[0].columns + sum(one.rows for one in linears)) * e


def _copy(linears: Linears, e: int) -> int:
    """The dense weight of one product, where it is not read as it is stored."""
    return 0 if all(one.dense for one in linears) else sum(one.rows * one.columns for one in linears) * e


# What a layer needs while it runs


def forward(layer: LayerShape, treatment: Treatment, tokens: int, length: int, tile: int | None, itemsize: int) -> int:
    """The most that is alive of a layer in its forward, its input and what it keeps included."""
    n, e = tokens, itemsize
    stream = n * layer.hidden * e
    attending = 2 * stream + n * (2 * layer.queries + 2 * layer.keys) * e
    attending += max(_copy(layer.qkv, e), _copy(layer.o, e) + stream)
    whole = treatment in (Treatment.RECOMPUTE, Treatment.OFFLOAD)
    before = (stream if whole else _attention_kept(layer, n, length, e)) + _beside(layer, n, e)
    return max(attending, before + _mlp_forward(layer, treatment is Treatment.KEEP, n, tile, e))


def _beside(layer: LayerShape, n: int, e: int) -> int:
    """What no backward needs and the layer's forward still holds while its MLP runs: a branch that was scaled and added."""
    return n * layer.hidden * e if layer.facts.multiplier != 1.0 else 0


def _mlp_forward(layer: LayerShape, keeps: bool, n: int, tile: int | None, e: int) -> int:
    """The MLP's input, its normed rows, gate and up, their product, the output."""
    stream = n * layer.hidden * e
    wide = n * layer.intermediate * e
    if tile is not None and not keeps:
        rows = min(n, tile)
        return 3 * stream + rows * (3 * layer.intermediate + layer.hidden) * e + _weights(layer, e)
    making = 2 * wide + max(wide, _copy(layer.gate_up, e))
    adding = wide + stream + _copy(layer.down, e) + (2 * wide if keeps else 0)
    return 2 * stream + max(making, adding)


def backward(
    layer: LayerShape, treatment: Treatment, tokens: int, length: int, tile: int | None, itemsize: int
) -> tuple[int, int]:
    """The most that is alive of a layer in the backward of its MLP and of its attention: what it keeps or makes again,
    its output's gradient, and buffers; not the gradients of what trains."""
    n, e = tokens, itemsize
    stream = n * layer.hidden * e
    held = _attention_kept(layer, n, length, e)
    behind = held + _mlp_input(layer, n, e) + stream
    recomputes, parallel = treatment in (Treatment.RECOMPUTE, Treatment.OFFLOAD), layer.facts.residual == "parallel"
    if treatment is Treatment.KEEP or (recomputes and tile is None):
        wide = n * layer.intermediate * e
        most = behind + _mlp_kept(layer, n, e)
        # The product's gradient; then gate's and up's lie where gate and up did, and the input's gradient and the input.
        most += max(wide + _copy(layer.down, e), stream + max(_copy(layer.gate_up, e), stream))
    else:
        most = behind + max(stream + _tile_backward(layer, min(n, tile or n), e), 2 * stream)
    if not layer.fused:
        most += held + _mlp_kept(layer, n, e)  # as many gradients as tensors, at the worst
    if recomputes:  # up to the last tensor that is kept
        making = _mlp_kept(layer, n, e) + n * layer.intermediate * e if tile is None else 0
        most = max(most, behind + stream + making + _beside(layer, n, e) + (stream if parallel else 0))
    # Of a parallel block the gradient that the MLP made of their one normed input waits for attention's.
    attention = held + stream + (stream if parallel else 0) + _attention_backward(layer, n, length, e)
    return most, attention


def _tile_backward(layer: LayerShape, rows: int, e: int) -> int:
    """Gate and up, their product and its gradient, rows in and out, dense weights; gradients of weights are summed in fp32."""
    trained = sum(one.rows * one.columns for one in (*layer.gate_up, *layer.down) if one.trained)
    return rows * (4 * layer.intermediate + 2 * layer.hidden) * e + _weights(layer, e) + trained * FP32


def _weights(layer: LayerShape, e: int) -> int:
    """The MLP's dense weights, where they are not read as they are stored."""
    return _copy(layer.gate_up, e) + _copy(layer.down, e)


def _attention_backward(layer: LayerShape, n: int, length: int, e: int) -> int:
    """Beyond what the half keeps and the stream's gradient: gradients of attention's output and of q, k, v; torch's kernel
    sums dq in fp32; then, what attention kept being gone, both buffers of the projection and its input's gradient."""
    q, qkv = n * layer.queries, n * (layer.queries + 2 * layer.keys)
    attending = (q + qkv) * e + (q * FP32 if layer.sdpa(length) else n * layer.heads * FP32)
    if layer.scores:
        attending += 2 * n * length * layer.heads * SCORE
    projecting = (2 * qkv + 2 * n * layer.hidden) * e + _copy(layer.qkv, e) - (q + qkv) * e
    return max(q * e + _copy(layer.o, e), attending, projecting)


def remake_flops(layer: LayerShape, treatment: Treatment, tokens: int, length: int) -> int:
    """Floating point operations that `treatment` makes a second time in one step: products and attention.

    A recomputed layer stops before its last product, and a tiled MLP makes its first one once more (`ops.lora.mlp`).
    """
    if treatment is Treatment.KEEP:
        return 0
    mlp = _product_flops(layer.gate_up, tokens)
    if treatment in (Treatment.REMAKE_MLP, Treatment.HOST):
        return mlp
    seen = min(length, layer.attention.window or length)
    # Two products over the keys that each token sees, half of the row on average where there is no window.
    pairs = seen * length - seen * seen // 2
    attention = 4 * layer.queries * pairs * tokens // length
    return _product_flops(layer.qkv, tokens) + _product_flops(layer.o, tokens) + attention + mlp


def _product_flops(linears: Linears, tokens: int) -> int:
    return sum(2 * tokens * (one.rows * one.columns + one.rank * (one.rows + one.columns)) for one in linears)


# A step


def peak(
    shape: ModelShape,
    batch: int,
    length: int,
    treatments: Sequence[Treatment] | Treatment,
    tile: int | None = None,
    optimizer: Optimizer = "adamw",
    accumulates: bool = False,
) -> Peak:
    """The predicted torch.cuda.max_memory_allocated of one training step: forward under autocast, backward, optimizer.

    treatments: one a layer, or one for all. tile: rows at a time of an MLP that is made again; None = its whole input.
    optimizer: "adamw" has two moments in each trained weight's dtype, "adamw_8bit" bitsandbytes' codes, "paged" keeps
    its moments in pages that leave the device when it is short. accumulates: gradients of steps before are there from
    the start. Raises ValueError for a number of treatments that is not the number of layers.
    """
    plan = [treatments] * len(shape.layers) if isinstance(treatments, Treatment) else list(treatments)
    if len(plan) != len(shape.layers):
        raise ValueError(f"{len(plan)} treatments were given for {len(shape.layers)} layers")
    n, e = batch * length, shape.itemsize
    layers = list(zip(shape.layers, plan, strict=True))
    sizes = [kept(layer, treatment, n, length, e) for layer, treatment in layers]
    flight = AHEAD * max((size.host for size in sizes), default=0)
    every = sum(size.device for size in sizes)
    done = shape.gradients if accumulates else 0
    found: list[tuple[str, int, int, int]] = [
        ("optimizer step", shape.gradients, 0, 0)
    ]  # when, gradients, layers, working

    before = 0
    for index, ((layer, treatment), size) in enumerate(zip(layers, sizes, strict=True)):
        found.append(
            (f"forward of layer {index}", done, before, forward(layer, treatment, n, length, tile, e) + flight)
        )
        before += size.device
    found += [("loss", done, every, working + flight) for working in _loss(shape, n)]

    made = 0 if accumulates else shape.head + shape.head_adapter + shape.norm
    for index in reversed(range(len(layers))):
        layer, treatment = layers[index]
        before -= sizes[index].device
        mlp, attention = backward(layer, treatment, n, length, tile, e)
        new = (0, 0) if accumulates else (layer.mlp_gradients, layer.gradients)
        found.append((f"backward of layer {index}'s MLP", done + made + new[0], before, mlp + flight))
        found.append((f"backward of layer {index}'s attention", done + made + new[1], before, attention + flight))
        made += new[1]
    if shape.embedding or shape.head and shape.tied:
        looked_up = shape.vocabulary * shape.hidden * e + n * shape.hidden * e
        found.append(("backward of the embedding", shape.gradients, 0, looked_up))
    moments = {
        "adamw": 2 * shape.gradients,
        "adamw_8bit": round(shape.moment_numbers * 2 * (1 + FP32 / 256)),
        "paged": 0,
    }
    when, gradients, held, working = max(found, key=lambda moment: sum(moment[1:]))
    host = sum(size.host for size in sizes)
    return Peak(when, shape.weights, gradients, moments[optimizer], held, working + WORKSPACE, host)


def _loss(shape: ModelShape, n: int) -> list[int]:
    """Beyond what layers keep: at the last chunk, and where the gradients are scaled. The stream, its norm, its gradient;
    a chunk's logits; of a head that trains the gradient in fp32, then beside it the one in its own dtype."""
    e, matrix = shape.itemsize, shape.vocabulary * shape.hidden
    stream = n * shape.hidden * e
    trains = shape.head > 0
    # As `function.tokens_at_once`.
    chunk = min(max(ScoreRule.chunk, 4 * shape.hidden // e) if trains else ScoreRule.chunk, n)
    logits = chunk * -(-shape.vocabulary // 8) * 8 * e
    cast = matrix * e if shape.head_itemsize != e else 0
    gradient = (matrix * FP32 if trains else 0) + shape.head_adapter
    if not shape.layers[0].fused:
        logits += 3 * chunk * shape.vocabulary * FP32  # plain torch's scores, their softmax and its gradient
    return [3 * stream + n * SCORES * FP32 + logits + cast + gradient, 3 * stream + gradient + shape.head]
