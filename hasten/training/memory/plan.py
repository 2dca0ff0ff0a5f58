"""Chooses an ActivationAction for each layer: the fastest plan whose predicted peak stays within a memory budget.

Decoder layers are alike, so a plan is two mixes and the number of layers that get each. The mix that saves less comes
first: the backward starts at the last layers, and frees what they saved before it recomputes the first ones. A mix is
one action, or two that are interleaved, so that copies to CPU memory use all the bandwidth they can without delaying
the layers.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.bandwidth import DeviceSpeed
from hasten.training.memory.costs import ModelShape, Peak, peak
from hasten.training.memory.layer_costs import forward_flops, mlp_flops, recompute_flops, saved_bytes
from hasten.training.memory.shape import LayerShape

MIN_TILE = 1024
"""Tokens; a plan tries the whole batch as one tile, then halves of it down to this size."""
TILE_OVERHEAD = 300
"""Cost of each further tile, as tokens of an MLP's forward: weights are read again, small kernels are launched again
(docs/log.md)."""
SUSTAINED_FRACTION = 0.75
"""Fraction of a short measurement's matmul speed that a whole step sustains: a GPU under load lowers its clock."""
COPY_OVERHEAD = 0.02
"""Fraction of a hidden copy's time that still counts: copies and kernels compete for the device's memory bandwidth."""
ON_DEVICE = (ActivationAction.RECOMPUTE, ActivationAction.RECOMPUTE_MLP, ActivationAction.SAVE_ALL)
"""Actions without offloading, from least to most device memory."""
DESCRIPTIONS = {
    ActivationAction.SAVE_ALL: "save all activations",
    ActivationAction.RECOMPUTE_MLP: "recompute their MLP",
    ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST: "recompute their MLP and offload the rest to CPU memory",
    ActivationAction.RECOMPUTE: "are recomputed from their input",
    ActivationAction.OFFLOAD: "are recomputed from their input, which is offloaded to CPU memory",
}
"""Descriptions of the actions, to follow "n layers"."""
Mix = Callable[[int], tuple[ActivationAction, ...]]
"""Number of layers -> their actions."""


@dataclass(frozen=True)
class LayerPlan:
    """actions: one per layer. tile: tokens per tile of MLPs that are recomputed, None = no tiles. peak: predicted.
    fits: whether the peak is within the budget."""

    actions: tuple[ActivationAction, ...]
    tile: int | None
    peak: Peak
    fits: bool = True

    def __str__(self) -> str:
        counts = Counter(self.actions)
        parts = [
            f"{counts[action]} of {len(self.actions)} layers {DESCRIPTIONS[action]}"
            for action in ActivationAction
            if counts[action]
        ]
        tiled = self.tile is not None and counts[ActivationAction.SAVE_ALL] < len(self.actions)
        return "; ".join(parts) + (f", MLPs in tiles of {self.tile} tokens" if tiled else "")


def uniform_plan(
    shape: ModelShape, batch: int, length: int, action: ActivationAction, tile: int | None = None
) -> LayerPlan:
    """Returns the plan that gives every layer the same action."""
    actions = (action,) * len(shape.layers)
    return LayerPlan(actions, tile, peak(shape, batch, length, actions, tile))


def plan_layers(
    shape: ModelShape,
    batch: int,
    length: int,
    budget: int,
    speed: DeviceSpeed | None,
    tiles: Sequence[int | None] = (),
    max_pinned: int | None = None,
    accumulates: bool = False,
) -> LayerPlan:
    """Returns the fastest plan whose predicted peak is at most `budget` bytes; if none fits, the one with the lowest
    peak.

    shape: the model. batch, length: sequences and tokens per sequence. speed: None = no offloading (a CPU, whose memory
    is the device's). tiles: sizes in tokens to try for MLPs that are recomputed on their own; () = powers-of-two
    fractions of the batch; (None,) = MLPs cannot run in tiles. max_pinned: bytes of pinned CPU memory that the plan may
    use, None = no limit. accumulates: gradients of earlier micro-batches are already allocated.
    """
    search = _Search(shape, batch, length, budget, speed, max_pinned, accumulates)
    tried: list[LayerPlan] = []
    for tile in tiles or tile_sizes(batch * length):
        mixes = search.mixes(tile is not None, always_tiled=bool(tiles))
        tried += [search.maximize(less, more, tile) for less, more in combinations(mixes, 2)]
    fitting = [plan for plan in tried if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: (search.cost(plan), plan.peak.total))
    return min(tried, key=lambda plan: plan.peak.total)


def tile_sizes(tokens: int) -> list[int]:
    """Returns the tile sizes to try: all tokens, half of them, and so on down to MIN_TILE."""
    sizes = [tokens]
    while sizes[-1] > MIN_TILE:
        sizes.append(max(MIN_TILE, -(-sizes[-1] // 2)))
    return sizes


@dataclass(frozen=True)
class _Search:
    """The search for one step's plan; fields are the arguments of `plan_layers`."""

    shape: ModelShape
    batch: int
    length: int
    budget: int
    speed: DeviceSpeed | None
    max_pinned: int | None
    accumulates: bool

    def mixes(self, tiled: bool, always_tiled: bool) -> list[Mix]:
        """Returns the mixes, from least to most device memory. tiled: MLPs can be recomputed on their own. always_tiled: all of them
        are."""
        excluded = ActivationAction.RECOMPUTE_MLP if not tiled else ActivationAction.SAVE_ALL if always_tiled else None
        mixes: list[Mix] = [_only(action) for action in ON_DEVICE if action is not excluded]
        if self.speed is None:
            return mixes
        mixes.insert(0, _only(ActivationAction.OFFLOAD))
        fraction = self._offloaded_fraction(self.speed) if tiled else 0.0
        if fraction > 0:
            offload, rest = ActivationAction.OFFLOAD, ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST
            mixes.insert(1, partial(_interleave, offload, rest, fraction))
        return mixes

    def _offloaded_fraction(self, speed: DeviceSpeed) -> float:
        """Returns the fraction of layers that can offload their attention's activations while all others offload their
        input, so that the copies take no longer than the layers' forward."""
        tokens, shape = self.batch * self.length, self.shape
        rest = ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST
        largest = max(shape.layers, key=lambda layer: self._offloaded_bytes(layer, rest))
        forward_seconds = forward_flops(largest, tokens, self.length) / (SUSTAINED_FRACTION * speed.flops_per_s)
        hidden = forward_seconds * speed.bytes_per_s
        least, most = (self._offloaded_bytes(largest, action) for action in (ActivationAction.OFFLOAD, rest))
        return min(1.0, (hidden - least) / (most - least))

    def _offloaded_bytes(self, layer: LayerShape, action: ActivationAction) -> int:
        return saved_bytes(layer, action, self.batch * self.length, self.length, self.shape.itemsize).host

    def cost(self, plan: LayerPlan) -> float:
        """Returns the extra work of a step compared with saving all activations: seconds where the device's speed is
        known, else FLOPs."""
        tokens, cost = self.batch * self.length, 0.0
        for (layer, action), count in Counter(zip(self.shape.layers, plan.actions, strict=True)).items():
            flops = recompute_flops(layer, action, tokens, self.length)
            if plan.tile is not None and action is not ActivationAction.SAVE_ALL:
                flops += (-(-tokens // plan.tile) - 1) * mlp_flops(layer, TILE_OVERHEAD)
            if self.speed is None:
                cost += count * flops
            else:
                copying = 2 * self._offloaded_bytes(layer, action) / self.speed.bytes_per_s
                cost += count * (flops / (SUSTAINED_FRACTION * self.speed.flops_per_s) + COPY_OVERHEAD * copying)
        return cost

    def maximize(self, less: Mix, more: Mix, tile: int | None) -> LayerPlan:
        """Gives the mix that saves more to as many layers as fit, found by bisection; to none if one is too many."""
        layers = len(self.shape.layers)

        def plan(count: int) -> LayerPlan:
            actions = (*less(layers - count), *more(count))
            found = peak(self.shape, self.batch, self.length, actions, tile, accumulates=self.accumulates)
            pinnable = self.max_pinned is None or found.host <= self.max_pinned
            return LayerPlan(actions, tile, found, pinnable and found.total <= self.budget)

        # The peak grows with the count, except for dips at the ends that cost little to miss.
        low, high = 0, layers + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if plan(middle).fits else (low, middle)
        return plan(low)


def _only(action: ActivationAction) -> Mix:
    return partial(_interleave, action, action, 0.0)


def _interleave(
    mostly: ActivationAction, sometimes: ActivationAction, fraction: float, layers: int
) -> tuple[ActivationAction, ...]:
    """Returns `sometimes` for that fraction of the layers, evenly spread, and `mostly` for the others."""
    return tuple(
        sometimes if math.floor((i + 1) * fraction) > math.floor(i * fraction) else mostly for i in range(layers)
    )
