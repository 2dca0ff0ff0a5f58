"""Predicts the peak memory of a training step: saved activations, working memory of each phase, trained state. Bytes on
one device.

Symbols as in `layer_costs`; L layers, V vocabulary size. Phases follow `ops.linear_cross_entropy.function` and torch's
autograd.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hasten.ops.linear_cross_entropy import ScoreConfig
from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.layer_costs import SavedBytes, backward_bytes, forward_bytes, recompute_flops, saved_bytes
from hasten.training.memory.layer_shape import FP32
from hasten.training.memory.shape import ModelShape

__all__ = [
    "SavedBytes",
    "ModelShape",
    "Optimizer",
    "Peak",
    "saved_bytes",
    "moments",
    "peak",
    "recompute_flops",
    "with_tile",
]

Optimizer = Literal["adamw", "adamw_8bit", "paged"]
WORKSPACE = 32 * 2**20
"""Bytes of cuBLAS's workspace, which torch takes from its own allocator (aten/src/ATen/cuda/CublasHandlePool.cpp,
Hopper)."""
SCORES = 7
"""fp32 numbers per token in the fused loss: six scores, and the upstream gradient of one."""


@dataclass(frozen=True)
class Peak:
    """Bytes on the device in the phase of a step that allocates most. `total` is their sum.

    when: that phase. optimizer: Adam's moments. layers: saved activations of all layers. working: temporary memory of
    the phase. host: pinned CPU memory, not part of `total`.
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


_Phase = tuple[str, int, int, int]
"""A phase of a step: its name, and bytes of gradients, of the saved activations of all layers, and of temporary
memory."""


class _LayerCosts(NamedTuple):
    """Bytes of one layer under one action. mlp, attention: in the backward of each half."""

    saved: SavedBytes
    forward: int
    mlp: int
    attention: int


def peak(
    shape: ModelShape,
    batch: int,
    length: int,
    actions: Sequence[ActivationAction] | ActivationAction,
    tile: int | None = None,
    optimizer: Optimizer = "adamw",
    accumulates: bool = False,
) -> Peak:
    """Predicts torch.cuda.max_memory_allocated of one training step: forward under autocast, backward, optimizer step.

    batch, length: sequences and tokens per sequence. actions: one per layer, or one for all. tile: tokens per tile of
    MLPs that are recomputed; None = the whole batch. optimizer: "adamw" has two moments in each trained weight's dtype,
    "adamw_8bit" bitsandbytes' 8-bit codes, "paged" moments in pages that move to the CPU when the device is full.
    accumulates: gradients of earlier micro-batches are present from the start. Raises ValueError unless there is one
    action per layer.
    """
    plan = [actions] * len(shape.layers) if isinstance(actions, ActivationAction) else list(actions)
    if len(plan) != len(shape.layers):
        raise ValueError(f"{len(plan)} actions were given for {len(shape.layers)} layers")
    layers = _layer_costs(shape, batch, length, plan, tile)
    phases: list[_Phase] = [
        ("optimizer step", shape.gradients, 0, 0),
        *_forward_phases(shape, batch * length, layers, accumulates),
        *_backward_phases(shape, batch * length, layers, accumulates),
    ]
    when, gradients, saved, working = max(phases, key=lambda phase: sum(phase[1:]))
    host = sum(layer.saved.host for layer in layers)
    return Peak(when, shape.weights, gradients, moments(shape, optimizer), saved, working + WORKSPACE, host)


def _layer_costs(
    shape: ModelShape, batch: int, length: int, plan: Sequence[ActivationAction], tile: int | None
) -> list[_LayerCosts]:
    """Computes the costs of every layer, once for layers that are the same object: a planner asks for hundreds of peaks
    of the same few layers."""
    n, e = batch * length, shape.itemsize
    known: dict[tuple[int, ActivationAction], _LayerCosts] = {}
    for layer, action in zip(shape.layers, plan, strict=True):
        if (id(layer), action) not in known:
            known[id(layer), action] = _LayerCosts(
                saved_bytes(layer, action, n, length, e, tile),
                forward_bytes(layer, action, n, length, tile, e),
                *backward_bytes(layer, action, n, length, tile, e),
            )
    return [known[id(layer), action] for layer, action in zip(shape.layers, plan, strict=True)]


def _forward_phases(shape: ModelShape, n: int, layers: Sequence[_LayerCosts], accumulates: bool) -> Iterator[_Phase]:
    gradients = shape.gradients if accumulates else 0
    saved = outgoing = 0  # outgoing: activations of the previous layer are still being copied
    for index, layer in enumerate(layers):
        yield (f"forward of layer {index}", gradients, saved, layer.forward + outgoing)
        saved += layer.saved.device
        outgoing = layer.saved.host
    for working in _loss(shape, n):
        yield ("loss", gradients, saved, working + outgoing)


def _backward_phases(shape: ModelShape, n: int, layers: Sequence[_LayerCosts], accumulates: bool) -> Iterator[_Phase]:
    before = shape.gradients if accumulates else 0
    new = 0 if accumulates else shape.head + shape.head_adapter + shape.norm
    saved = sum(layer.saved.device for layer in layers)
    for index, ahead in zip(reversed(range(len(layers))), _fetched_ahead(layers), strict=True):
        layer, own = layers[index], shape.layers[index]
        saved -= layer.saved.device
        of_mlp, of_layer = (0, 0) if accumulates else (own.mlp_gradients, own.gradients)
        yield (f"backward of layer {index}'s MLP", before + new + of_mlp, saved, layer.mlp + ahead)
        yield (f"backward of layer {index}'s attention", before + new + of_layer, saved, layer.attention + ahead)
        new += of_layer
    if shape.embedding or shape.head and shape.tied:
        embedding = (shape.vocabulary + n) * shape.hidden * shape.itemsize
        yield ("backward of the embedding", shape.gradients, 0, embedding)


def _fetched_ahead(layers: Sequence[_LayerCosts]) -> list[int]:
    """Returns for each layer's backward, the last layer first, the bytes already fetched for the offloaded layer before
    it. The first offloaded layer that is fetched starts this (`offload.OffloadedLayer`)."""
    before, last = [], 0
    for layer in layers:
        before.append(last)
        last = layer.saved.host or last
    found, started = [], False
    for layer, size in zip(reversed(layers), reversed(before), strict=True):
        started = started or bool(layer.saved.host)
        found.append(size if started else 0)
    return found


def moments(shape: ModelShape, optimizer: Optimizer) -> int:
    """Returns the bytes of Adam's two moments on the device: in the weights' dtype, or 8-bit codes with one fp32 scale
    per 256."""
    eight_bit = round(shape.moment_numbers * 2 * (1 + FP32 / 256))
    return {"adamw": 2 * shape.gradients, "adamw_8bit": eight_bit, "paged": 0}[optimizer]


def with_tile(actions: Sequence[ActivationAction], tile: int | None) -> tuple[ActivationAction, ...]:
    """Returns the actions once MLPs run in tiles: a layer that would save all activations recomputes its MLP."""
    return tuple(
        ActivationAction.RECOMPUTE_MLP if tile and one is ActivationAction.SAVE_ALL else one for one in actions
    )


def _loss(shape: ModelShape, n: int) -> list[int]:
    """Returns the working memory of the loss at its last chunk, and while it scales the gradients: hidden states, their
    norm, their gradient; a chunk's logits; of a trained head the gradient in fp32, then also the one in its own
    dtype."""
    e, weights = shape.itemsize, shape.vocabulary * shape.hidden
    hidden = n * shape.hidden * e
    trains = shape.head > 0
    # the formula of `function.tokens_at_once`
    chunk = min(max(ScoreConfig.chunk, 4 * shape.hidden // e) if trains else ScoreConfig.chunk, n)
    logits = chunk * -(-shape.vocabulary // 8) * 8 * e
    cast = weights * e if shape.head_itemsize != e else 0
    gradient = (weights * FP32 if trains else 0) + shape.head_adapter
    if not shape.layers[0].fused:
        logits += 3 * chunk * shape.vocabulary * FP32  # plain torch's scores, their softmax and its gradient
    return [3 * hidden + n * SCORES * FP32 + logits + cast + gradient, 3 * hidden + gradient + shape.head]
