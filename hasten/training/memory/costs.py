"""The peak of a training step: what all layers keep, what each moment needs beyond, trained state. Bytes on one device.

Symbols as in `layer_costs`; L layers, V vocabulary. The order of events is that of `ops.linear_cross_entropy.function` and
torch's autograd.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hasten.ops.linear_cross_entropy import ScoreConfig
from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.layer_costs import SavedBytes, backward, forward, recompute_flops, saved_bytes
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
"""cuBLAS's, which torch takes from its own allocator (aten/src/ATen/cuda/CublasHandlePool.cpp, Hopper)."""
SCORES = 7
"""fp32 numbers a token in the fused loss: six scores and the upstream of one."""


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


def peak(
    shape: ModelShape,
    batch: int,
    length: int,
    actions: Sequence[ActivationAction] | ActivationAction,
    tile: int | None = None,
    optimizer: Optimizer = "adamw",
    accumulates: bool = False,
) -> Peak:
    """The predicted torch.cuda.max_memory_allocated of one training step: forward under autocast, backward, optimizer.

    actions: one a layer, or one for all. tile: rows at a time of an MLP that is made again; None = its whole input.
    optimizer: "adamw" has two moments in each trained weight's dtype, "adamw_8bit" bitsandbytes' codes, "paged" keeps
    its moments in pages that leave the device when it is short. accumulates: gradients of steps before are there from
    the start. Raises ValueError for a number of actions that is not the number of layers.
    """
    plan = [actions] * len(shape.layers) if isinstance(actions, ActivationAction) else list(actions)
    if len(plan) != len(shape.layers):
        raise ValueError(f"{len(plan)} actions were given for {len(shape.layers)} layers")
    n, e = batch * length, shape.itemsize
    layers = list(zip(shape.layers, plan, strict=True))
    known: dict[tuple[int, ActivationAction], tuple[SavedBytes, int, tuple[int, int]]] = {}
    for layer, action in layers:
        if (id(layer), action) not in known:  # a planner asks for hundreds of peaks of layers that are alike
            known[id(layer), action] = (
                saved_bytes(layer, action, n, length, e, tile),
                forward(layer, action, n, length, tile, e),
                backward(layer, action, n, length, tile, e),
            )
    sizes = [known[id(layer), action][0] for layer, action in layers]
    leaving = [0, *(size.host for size in sizes)]  # while layer i runs, what layer i - 1 keeps goes
    done = shape.gradients if accumulates else 0
    found = [("optimizer step", shape.gradients, 0, 0)]  # when, gradients, kept by layers, working

    before = 0
    for index, ((layer, action), size) in enumerate(zip(layers, sizes, strict=True)):
        working = known[id(layer), action][1] + leaving[index]
        found.append((f"forward of layer {index}", done, before, working))
        before += size.device
    found += [("loss", done, before, working + leaving[-1]) for working in _loss(shape, n)]

    made = 0 if accumulates else shape.head + shape.head_adapter + shape.norm
    for index, ahead in zip(reversed(range(len(layers))), _fetched_ahead(sizes), strict=True):
        layer, action = layers[index]
        before -= sizes[index].device
        mlp, attention = known[id(layer), action][2]
        new = (0, 0) if accumulates else (layer.mlp_gradients, layer.gradients)
        found.append((f"backward of layer {index}'s MLP", done + made + new[0], before, mlp + ahead))
        found.append((f"backward of layer {index}'s attention", done + made + new[1], before, attention + ahead))
        made += new[1]
    if shape.embedding or shape.head and shape.tied:
        looked_up = shape.vocabulary * shape.hidden * e + n * shape.hidden * e
        found.append(("backward of the embedding", shape.gradients, 0, looked_up))
    when, gradients, held, working = max(found, key=lambda moment: sum(moment[1:]))
    host = sum(size.host for size in sizes)
    return Peak(when, shape.weights, gradients, moments(shape, optimizer), held, working + WORKSPACE, host)


def _fetched_ahead(sizes: Sequence[SavedBytes]) -> list[int]:
    """For each layer's backward, the last layer's first: bytes that are fetched already for the next layer that waits on the
    host, which the first one to come back starts (`offload.OffloadedLayer`)."""
    found, started = [], False
    for index in reversed(range(len(sizes))):
        started = started or bool(sizes[index].host)
        waiting = next((size.host for size in reversed(sizes[:index]) if size.host), 0)
        found.append(waiting if started else 0)
    return found


def moments(shape: ModelShape, optimizer: Optimizer) -> int:
    """Bytes of the two moments on the device: in the weights' dtype, or codes with one fp32 scale for 256 of them."""
    eight_bit = round(shape.moment_numbers * 2 * (1 + FP32 / 256))
    return {"adamw": 2 * shape.gradients, "adamw_8bit": eight_bit, "paged": 0}[optimizer]


def with_tile(actions: Sequence[ActivationAction], tile: int | None) -> tuple[ActivationAction, ...]:
    """What layers get once their MLPs run in tiles: one that would keep everything makes its MLP again."""
    return tuple(
        ActivationAction.RECOMPUTE_MLP if tile and one is ActivationAction.SAVE_ALL else one for one in actions
    )


def _loss(shape: ModelShape, n: int) -> list[int]:
    """Beyond what layers keep: at the last chunk, and where the gradients are scaled. The stream, its norm, its gradient;
    a chunk's logits; of a head that trains the gradient in fp32, then beside it the one in its own dtype."""
    e, matrix = shape.itemsize, shape.vocabulary * shape.hidden
    stream = n * shape.hidden * e
    trains = shape.head > 0
    # As `function.tokens_at_once`.
    chunk = min(max(ScoreConfig.chunk, 4 * shape.hidden // e) if trains else ScoreConfig.chunk, n)
    logits = chunk * -(-shape.vocabulary // 8) * 8 * e
    cast = matrix * e if shape.head_itemsize != e else 0
    gradient = (matrix * FP32 if trains else 0) + shape.head_adapter
    if not shape.layers[0].fused:
        logits += 3 * chunk * shape.vocabulary * FP32  # plain torch's scores, their softmax and its gradient
    return [3 * stream + n * SCORES * FP32 + logits + cast + gradient, 3 * stream + gradient + shape.head]
