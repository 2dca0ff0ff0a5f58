"""Computes bytes and FLOPs of one decoder layer: saved activations per action, working memory, recomputation.

Symbols: N tokens of a step, T tokens per sequence, E hidden size, Q and K widths of queries and of keys (or values), F
width of the MLP, R LoRA rank, e bytes of the compute dtype. docs/memory.md has the formulas in words. The order of
allocations is that of `overlays.layer` and `ops.lora`; each `max` below runs over the points at which most is
allocated.
"""

from dataclasses import dataclass

from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.layer_shape import FP32, LayerShape, Linears

UNFUSED_BYTES = 9
"""Bytes that plain torch and PEFT save for each number that the fused path saves: casts, norms in fp32, results of
matmuls before and after an addition. An upper bound, compared with measured bytes by
tests/training/memory/test_memory_costs.py."""
SCORE = 8
"""Bytes that attention in plain torch saves per score: softcapped, in fp32, and as an attention weight."""
STATISTICS = 2 * FP32
"""Bytes per token that a norm saves (LayerNorm: mean and inverse deviation; RMSNorm has one of the two)."""


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that one layer saves from its forward to its backward, on the device and in pinned CPU memory."""

    device: int
    host: int = 0


# Saved activations


def saved_bytes(
    layer: LayerShape, action: ActivationAction, tokens: int, length: int, itemsize: int, tile: int | None = None
) -> SavedBytes:
    """Returns what `layer` saves under `action` for `tokens` tokens in sequences of `length`.

    An MLP in tiles saves x A^T of down_proj's LoRA under every action, on the device.
    """
    tiled = 0 if tile is None or action is ActivationAction.SAVE_ALL else tokens * layer.down[0].rank * itemsize
    if action in (ActivationAction.RECOMPUTE, ActivationAction.OFFLOAD):
        size = tokens * layer.hidden * itemsize
    else:
        size = _saved_by_attention(layer, tokens, length, itemsize) + _saved_mlp_input(layer, tokens, itemsize)
        size += _saved_by_mlp(layer, tokens, itemsize) if action is ActivationAction.SAVE_ALL else 0
    if action is ActivationAction.OFFLOAD:
        return SavedBytes(tiled, size)
    if action is ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST:  # tensors with one row per token are offloaded
        stays = _adapters(layer.qkv, 0, itemsize) + _adapters(layer.o, 0, itemsize) + tokens * 2 * STATISTICS
        return SavedBytes(stays + tiled, size - stays)
    return SavedBytes(size + tiled)


def _bytes_per_number(layer: LayerShape, e: int) -> int:
    return e if layer.fused else UNFUSED_BYTES


def _saved_by_attention(layer: LayerShape, n: int, length: int, e: int) -> int:
    """Counts hidden states, q, k, v (q and k twice with a q/k norm), attention's output and log-sum-exp, x A^T, A and
    B."""
    e = _bytes_per_number(layer, e)
    normed = layer.queries + layer.keys if layer.attention.qk_norm is not None else 0
    numbers = layer.hidden + layer.queries + 2 * layer.keys + normed + layer.queries
    adapters = _adapters(layer.qkv, n, e) + _adapters(layer.o, n, e)
    per_head = length * SCORE if layer.scores else FP32
    return n * (numbers * e + layer.heads * per_head + STATISTICS) + adapters + _saved_by_branch_norm(layer, n, e)


def _saved_mlp_input(layer: LayerShape, n: int, e: int) -> int:
    """Counts hidden states before the MLP (in a parallel block they are attention's own), and the MLP's output if a
    norm follows."""
    e = _bytes_per_number(layer, e)
    own = 0 if layer.overlay_config.residual == "parallel" else n * (layer.hidden * e + STATISTICS)
    return own + _saved_by_branch_norm(layer, n, e)


def _saved_by_mlp(layer: LayerShape, n: int, e: int) -> int:
    """Counts gate and up, x A^T, A and B."""
    e = _bytes_per_number(layer, e)
    return n * 2 * layer.intermediate * e + _adapters(layer.gate_up, n, e) + _adapters(layer.down, n, e)


def _saved_by_branch_norm(layer: LayerShape, n: int, e: int) -> int:
    """Counts a branch's output, saved by the norm after it (sandwich norms)."""
    return n * (layer.hidden * e + STATISTICS) if layer.overlay_config.residual == "sandwich" else 0


def _adapters(linears: Linears, n: int, e: int) -> int:
    """Counts x A^T of the LoRAs of one (packed) matmul, and their A and B in the compute dtype: A stacked, B
    block-diagonal."""
    rank = sum(one.rank for one in linears)
    return rank * (n + linears[0].columns + sum(one.rows for one in linears)) * e


def _dense_copy(linears: Linears, e: int) -> int:
    """Counts the dense weight of one matmul that cannot read the weight as stored (quantised, or not packed)."""
    return 0 if all(one.dense for one in linears) else sum(one.rows * one.columns for one in linears) * e


# Working memory


def forward_bytes(
    layer: LayerShape, action: ActivationAction, tokens: int, length: int, tile: int | None, itemsize: int
) -> int:
    """Returns the peak of a layer's forward, in bytes, including its input and what it saves."""
    n, e = tokens, itemsize
    hidden = n * layer.hidden * e
    attention = 2 * hidden + n * (2 * layer.queries + 2 * layer.keys) * e
    attention += max(_dense_copy(layer.qkv, e), _dense_copy(layer.o, e) + hidden)
    recomputes = action in (ActivationAction.RECOMPUTE, ActivationAction.OFFLOAD)
    before_mlp = hidden if recomputes else _saved_by_attention(layer, n, length, e)
    before_mlp += _scaled_branch(layer, n, e)
    return max(attention, before_mlp + _mlp_forward(layer, action is ActivationAction.SAVE_ALL, n, tile, e))


def _scaled_branch(layer: LayerShape, n: int, e: int) -> int:
    """Counts attention's output before its residual multiplier. No backward needs it, but the forward holds it during
    the MLP."""
    return n * layer.hidden * e if layer.overlay_config.multiplier != 1.0 else 0


def _mlp_forward(layer: LayerShape, saves_all: bool, n: int, tile: int | None, e: int) -> int:
    """Counts the MLP's input and its norm, gate, up, their activation, the output."""
    hidden = n * layer.hidden * e
    wide = n * layer.intermediate * e
    if tile is not None and not saves_all:
        tokens = min(n, tile)
        return 3 * hidden + tokens * (3 * layer.intermediate + layer.hidden) * e + _mlp_dense_copies(layer, e)
    up = 2 * wide + max(wide, _dense_copy(layer.gate_up, e))
    down = wide + hidden + _dense_copy(layer.down, e) + (2 * wide if saves_all else 0)
    return 2 * hidden + max(up, down)


def backward_bytes(
    layer: LayerShape, action: ActivationAction, tokens: int, length: int, tile: int | None, itemsize: int
) -> tuple[int, int]:
    """Returns the peaks of the backward of a layer's MLP and of its attention, in bytes: activations saved or
    recomputed, the gradient of the output, buffers. Gradients of weights are not included."""
    n, e = tokens, itemsize
    hidden = n * layer.hidden * e
    by_attention = _saved_by_attention(layer, n, length, e)
    base = by_attention + _saved_mlp_input(layer, n, e) + hidden
    recomputes = action in (ActivationAction.RECOMPUTE, ActivationAction.OFFLOAD)
    parallel = layer.overlay_config.residual == "parallel"
    if action is ActivationAction.SAVE_ALL or (recomputes and tile is None):
        wide = n * layer.intermediate * e
        most = base + _saved_by_mlp(layer, n, e)
        # The activation's gradient; then gate's and up's overwrite gate and up; the input and its gradient exist too.
        most += max(wide + _dense_copy(layer.down, e), hidden + max(_dense_copy(layer.gate_up, e), hidden))
    else:
        most = base + max(hidden + _tile_backward(layer, min(n, tile or n), e), 2 * hidden)
    if not layer.fused:
        most += by_attention + _saved_by_mlp(layer, n, e)  # at worst one gradient per saved tensor
    if recomputes:  # up to the last activation that is saved
        recomputed = 0
        if tile is None:
            recomputed = _saved_by_mlp(layer, n, e) + max(n * layer.intermediate * e, _dense_copy(layer.gate_up, e))
        most = max(most, base + hidden + recomputed + _scaled_branch(layer, n, e) + (hidden if parallel else 0))
    # In a parallel block the MLP's gradient of the shared normed input is held until attention's is added.
    attention = by_attention + hidden + (hidden if parallel else 0) + _attention_backward(layer, n, length, e)
    return most, attention


def _tile_backward(layer: LayerShape, tokens: int, e: int) -> int:
    """Counts gate and up, their activation or its gradient, the tile's input and output, dense weights; weight
    gradients summed in fp32."""
    trained = sum(one.rows * one.columns for one in (*layer.gate_up, *layer.down) if one.trained)
    return tokens * (3 * layer.intermediate + 2 * layer.hidden) * e + _mlp_dense_copies(layer, e) + trained * FP32


def _mlp_dense_copies(layer: LayerShape, e: int) -> int:
    return _dense_copy(layer.gate_up, e) + _dense_copy(layer.down, e)


def _attention_backward(layer: LayerShape, n: int, length: int, e: int) -> int:
    """Counts the memory besides attention's saved activations and the gradient of its output projection's result.

    Gradients of attention's output and of q, k, v; cuDNN sums dq in fp32 and, with grouped queries, makes dk and dv per
    query head. Then, with attention's saved activations freed, the two buffers of the QKV projection and the gradient
    of its input.
    """
    q, qkv = n * layer.queries, n * (layer.queries + 2 * layer.keys)
    attention = (q + qkv) * e + n * layer.heads * FP32
    if layer.sdpa(length):
        per_query_head = 2 * q * e if layer.keys != layer.queries else 0
        attention += q * FP32 + per_query_head
    if layer.scores:
        attention += 2 * n * length * layer.heads * SCORE
    projection = (2 * qkv + 2 * n * layer.hidden) * e + _dense_copy(layer.qkv, e) - (q + qkv) * e
    return max(q * e + _dense_copy(layer.o, e), attention, projection)


# Work


def recompute_flops(layer: LayerShape, action: ActivationAction, tokens: int, length: int) -> int:
    """Returns the FLOPs that `action` recomputes in one step: matmuls and attention.

    A recomputed layer stops before down_proj, and a tiled MLP recomputes gate and up (`ops.lora.mlp`).
    """
    if action is ActivationAction.SAVE_ALL:
        return 0
    mlp = _matmul_flops(layer.gate_up, tokens)
    if action in (ActivationAction.RECOMPUTE_MLP, ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST):
        return mlp
    window = min(length, layer.attention.window or length)
    # Two matmuls over the keys that each token attends to: half of the sequence on average without a window.
    pairs = window * length - window * window // 2
    attention = 4 * layer.queries * pairs * tokens // length
    return _matmul_flops(layer.qkv, tokens) + _matmul_flops(layer.o, tokens) + attention + mlp


def forward_flops(layer: LayerShape, tokens: int, length: int) -> int:
    """Returns the FLOPs of one forward: matmuls and attention."""
    return recompute_flops(layer, ActivationAction.RECOMPUTE, tokens, length) + _matmul_flops(layer.down, tokens)


def mlp_flops(layer: LayerShape, tokens: int) -> int:
    """Returns the FLOPs of the MLP's forward."""
    return _matmul_flops(layer.gate_up, tokens) + _matmul_flops(layer.down, tokens)


def _matmul_flops(linears: Linears, tokens: int) -> int:
    return sum(2 * tokens * (one.rows * one.columns + one.rank * (one.rows + one.columns)) for one in linears)
