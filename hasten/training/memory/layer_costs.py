"""Bytes and FLOPs of one decoder layer: what each action keeps of it, what it needs while it runs, what is made twice.

Symbols: N tokens of a step, T tokens of a row, E hidden size, Q and K widths of queries and of keys (or values), F width of the
MLP, R a rank, e bytes of the compute dtype. docs/memory.md has the formulas in words.
The order of events is that of `overlays.layer` and `ops.lora`; each `max` below runs over the moments at which most is alive.
"""

from dataclasses import dataclass

from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.layer_shape import FP32, LayerShape, Linears

UNFUSED_BYTES = 9
"""Bytes a number that plain torch and PEFT keep in place of each one that the fused path keeps: casts, norms in fp32 and
products before and after an addition. An upper bound, held against the truth by tests/training/test_memory_costs.py."""
SCORE = 8
"""Bytes of a score that attention in plain torch keeps: capped, in fp32 and as weight."""
STATISTICS = 2 * FP32
"""A norm's numbers a token; RMSNorm has one of the two."""


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that one layer keeps from its forward to its backward, on the device and in pinned host memory."""

    device: int
    host: int = 0


# What a layer keeps


def saved_bytes(
    layer: LayerShape, action: ActivationAction, tokens: int, length: int, itemsize: int, tile: int | None = None
) -> SavedBytes:
    """What `layer` keeps of `tokens`, in rows of `length`, under `action`. An MLP in tiles keeps x A^T of its last product."""
    always = 0 if tile is None or action is ActivationAction.SAVE_ALL else tokens * layer.down[0].rank * itemsize
    if action in (ActivationAction.RECOMPUTE, ActivationAction.OFFLOAD):
        size = tokens * layer.hidden * itemsize
    else:
        size = _attention_kept(layer, tokens, length, itemsize) + _mlp_input(layer, tokens, itemsize)
        size += _mlp_kept(layer, tokens, itemsize) if action is ActivationAction.SAVE_ALL else 0
    if action is ActivationAction.OFFLOAD:
        return SavedBytes(always, size)
    if action is ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST:  # what has a row a token goes
        stays = _adapters(layer.qkv, 0, itemsize) + _adapters(layer.o, 0, itemsize) + tokens * 2 * STATISTICS
        return SavedBytes(stays + always, size - stays)
    return SavedBytes(size + always)


def _width(layer: LayerShape, e: int) -> int:
    """Bytes that are kept for each number of the fused path."""
    return e if layer.fused else UNFUSED_BYTES


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
    own = 0 if layer.overlay_config.residual == "parallel" else n * (layer.hidden * e + STATISTICS)
    return own + _branch(layer, n, e)


def _mlp_kept(layer: LayerShape, n: int, e: int) -> int:
    """Gate and up, x A^T, A and B."""
    e = _width(layer, e)
    return n * 2 * layer.intermediate * e + _adapters(layer.gate_up, n, e) + _adapters(layer.down, n, e)


def _branch(layer: LayerShape, n: int, e: int) -> int:
    """A branch's output, which the norm behind it keeps."""
    return n * (layer.hidden * e + STATISTICS) if layer.overlay_config.residual == "sandwich" else 0


def _adapters(linears: Linears, n: int, e: int) -> int:
    """x A^T of one product's LoRAs, and their A and B as it takes them: all A on top of each other, all B on a diagonal."""
    rank = sum(one.rank for one in linears)
    return rank * (n + linears[0].columns + sum(one.rows for one in linears)) * e


def _copy(linears: Linears, e: int) -> int:
    """The dense weight of one product, where it is not read as it is stored."""
    return 0 if all(one.dense for one in linears) else sum(one.rows * one.columns for one in linears) * e


# What a layer needs while it runs


def forward(
    layer: LayerShape, action: ActivationAction, tokens: int, length: int, tile: int | None, itemsize: int
) -> int:
    """The most that is alive of a layer in its forward, its input and what it keeps included."""
    n, e = tokens, itemsize
    stream = n * layer.hidden * e
    attending = 2 * stream + n * (2 * layer.queries + 2 * layer.keys) * e
    attending += max(_copy(layer.qkv, e), _copy(layer.o, e) + stream)
    whole = action in (ActivationAction.RECOMPUTE, ActivationAction.OFFLOAD)
    before = (stream if whole else _attention_kept(layer, n, length, e)) + _beside(layer, n, e)
    return max(attending, before + _mlp_forward(layer, action is ActivationAction.SAVE_ALL, n, tile, e))


def _beside(layer: LayerShape, n: int, e: int) -> int:
    """What no backward needs and the layer's forward still holds while its MLP runs: a branch that was scaled and added."""
    return n * layer.hidden * e if layer.overlay_config.multiplier != 1.0 else 0


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
    layer: LayerShape, action: ActivationAction, tokens: int, length: int, tile: int | None, itemsize: int
) -> tuple[int, int]:
    """The most that is alive of a layer in the backward of its MLP and of its attention: what it keeps or makes again,
    its output's gradient, and buffers; not the gradients of what trains."""
    n, e = tokens, itemsize
    stream = n * layer.hidden * e
    held = _attention_kept(layer, n, length, e)
    behind = held + _mlp_input(layer, n, e) + stream
    recomputes, parallel = (
        action in (ActivationAction.RECOMPUTE, ActivationAction.OFFLOAD),
        layer.overlay_config.residual == "parallel",
    )
    if action is ActivationAction.SAVE_ALL or (recomputes and tile is None):
        wide = n * layer.intermediate * e
        most = behind + _mlp_kept(layer, n, e)
        # The product's gradient; then gate's and up's lie where gate and up did, and the input's gradient and the input.
        most += max(wide + _copy(layer.down, e), stream + max(_copy(layer.gate_up, e), stream))
    else:
        most = behind + max(stream + _tile_backward(layer, min(n, tile or n), e), 2 * stream)
    if not layer.fused:
        most += held + _mlp_kept(layer, n, e)  # as many gradients as tensors, at the worst
    if recomputes:  # up to the last tensor that is kept
        making = (
            0 if tile is not None else _mlp_kept(layer, n, e) + max(n * layer.intermediate * e, _copy(layer.gate_up, e))
        )
        most = max(most, behind + stream + making + _beside(layer, n, e) + (stream if parallel else 0))
    # Of a parallel block the gradient that the MLP made of their one normed input waits for attention's.
    attention = held + stream + (stream if parallel else 0) + _attention_backward(layer, n, length, e)
    return most, attention


def _tile_backward(layer: LayerShape, rows: int, e: int) -> int:
    """Gate and up, their product or its gradient, rows in and out, dense weights; gradients of weights are summed in fp32."""
    trained = sum(one.rows * one.columns for one in (*layer.gate_up, *layer.down) if one.trained)
    return rows * (3 * layer.intermediate + 2 * layer.hidden) * e + _weights(layer, e) + trained * FP32


def _weights(layer: LayerShape, e: int) -> int:
    """The MLP's dense weights, where they are not read as they are stored."""
    return _copy(layer.gate_up, e) + _copy(layer.down, e)


def _attention_backward(layer: LayerShape, n: int, length: int, e: int) -> int:
    """Beyond what the half keeps and the stream's gradient: gradients of attention's output and of q, k, v; cuDNN sums dq in fp32
    and makes dk and dv for every head of the queries, where several share a key's; then, what attention kept being gone, both
    buffers of the projection and its input's gradient."""
    q, qkv = n * layer.queries, n * (layer.queries + 2 * layer.keys)
    attending = (q + qkv) * e + n * layer.heads * FP32
    if layer.sdpa(length):
        shares = 2 * q * e if layer.keys != layer.queries else 0
        attending += q * FP32 + shares
    if layer.scores:
        attending += 2 * n * length * layer.heads * SCORE
    projecting = (2 * qkv + 2 * n * layer.hidden) * e + _copy(layer.qkv, e) - (q + qkv) * e
    return max(q * e + _copy(layer.o, e), attending, projecting)


def recompute_flops(layer: LayerShape, action: ActivationAction, tokens: int, length: int) -> int:
    """Floating point operations that `action` makes a second time in one step: products and attention.

    A recomputed layer stops before its last product, and a tiled MLP makes its first one once more (`ops.lora.mlp`).
    """
    if action is ActivationAction.SAVE_ALL:
        return 0
    mlp = _product_flops(layer.gate_up, tokens)
    if action in (ActivationAction.RECOMPUTE_MLP, ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST):
        return mlp
    seen = min(length, layer.attention.window or length)
    # Two products over the keys that each token sees, half of the row on average where there is no window.
    pairs = seen * length - seen * seen // 2
    attention = 4 * layer.queries * pairs * tokens // length
    return _product_flops(layer.qkv, tokens) + _product_flops(layer.o, tokens) + attention + mlp


def forward_flops(layer: LayerShape, tokens: int, length: int) -> int:
    """Of one forward, products and attention."""
    return recompute_flops(layer, ActivationAction.RECOMPUTE, tokens, length) + _product_flops(layer.down, tokens)


def mlp_flops(layer: LayerShape, tokens: int) -> int:
    """Of the MLP's forward."""
    return _product_flops(layer.gate_up, tokens) + _product_flops(layer.down, tokens)


def _product_flops(linears: Linears, tokens: int) -> int:
    return sum(2 * tokens * (one.rows * one.columns + one.rank * (one.rows + one.columns)) for one in linears)
