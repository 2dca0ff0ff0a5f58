"""Which action each layer gets: the cheapest mix in time whose peak stays under a budget.

Layers are alike, so a mix is two mixes of treating them and how many layers get each. The way that keeps less comes first: in the
backward the last layers go first, and take what they kept with them before the first layers are made again. A way is one
action, or two that take turns, so that the speed to host memory is as busy as it can be without holding up the layers.
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

SMALLEST_TILE = 1024
"""Rows; each plan tries the whole input as one tile, then halves of it down to here."""
TILE_TOLL = 300
"""Rows' worth of an MLP's forward that each further tile costs: weights are read again, small kernels run once more (docs/log.md)."""
SUSTAINED = 0.75
"""Of the speed of one product, measured for a moment, what products reach in a step: a card under load lowers its clock."""
LINK_TOLL = 0.02
"""Share of a hidden copy's time that a step is charged all the same: copies and work share the device's memory."""
DEVICE_ALONE = (ActivationAction.RECOMPUTE, ActivationAction.RECOMPUTE_MLP, ActivationAction.SAVE_ALL)
"""From least to most."""
Mix = Callable[[int], tuple[ActivationAction, ...]]
"""How many layers -> their actions."""


@dataclass(frozen=True)
class LayerPlan:
    """actions: one a layer. tile: rows at a time of an MLP that is made again. peak: predicted. fits: under the budget."""

    actions: tuple[ActivationAction, ...]
    tile: int | None
    peak: Peak
    fits: bool = True

    def __str__(self) -> str:
        said = {
            ActivationAction.SAVE_ALL: "keep what is dear to make again",
            ActivationAction.RECOMPUTE_MLP: "make their MLP again",
            ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST: "make their MLP again and keep the rest in host memory",
            ActivationAction.RECOMPUTE: "are made again from their input",
            ActivationAction.OFFLOAD: "are made again from their input, which waits in host memory",
        }
        counts = Counter(self.actions)
        parts = [f"{counts[one]} of {len(self.actions)} layers {said[one]}" for one in ActivationAction if counts[one]]
        tiled = self.tile is not None and counts[ActivationAction.SAVE_ALL] < len(self.actions)
        return "; ".join(parts) + (f", MLPs {self.tile} rows at a time" if tiled else "")


def uniform(shape: ModelShape, batch: int, length: int, action: ActivationAction, tile: int | None = None) -> LayerPlan:
    """Every layer alike."""
    plan = (action,) * len(shape.layers)
    return LayerPlan(plan, tile, peak(shape, batch, length, plan, tile))


def plan_layers(
    shape: ModelShape,
    batch: int,
    length: int,
    budget: int,
    speed: DeviceSpeed | None,
    tiles: Sequence[int | None] = (),
    host_room: int | None = None,
    accumulates: bool = False,
) -> LayerPlan:
    """The cheapest plan whose predicted peak is at most `budget` bytes; where none fits, the one with the least peak.

    speed: None where there is no host memory apart from the device's. tiles: rows at a time of an MLP that is made again by itself,
    () = whatever is best; (None,) where MLPs cannot be. host_room: bytes of host memory that may be pinned, None = as many as it takes.
    """
    step = _Step(shape, batch, length, budget, speed, host_room, accumulates)
    tried: list[LayerPlan] = []
    for tile in tiles or halves(batch * length):
        mixes = step.mixes(tile is not None, always=bool(tiles))
        tried += [step.maximize(fewer, more, tile) for fewer, more in combinations(mixes, 2)]
    fitting = [plan for plan in tried if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: (step.seconds(plan), plan.peak.total))
    return min(tried, key=lambda plan: plan.peak.total)


def halves(tokens: int) -> list[int]:
    """Tiles to try: all rows, half of them, and so on."""
    found = [tokens]
    while found[-1] > SMALLEST_TILE:
        found.append(max(SMALLEST_TILE, -(-found[-1] // 2)))
    return found


@dataclass(frozen=True)
class _Step:
    """One step that is planned; the arguments of `plan_layers`."""

    shape: ModelShape
    batch: int
    length: int
    budget: int
    speed: DeviceSpeed | None
    host_room: int | None
    accumulates: bool

    def mixes(self, tiled: bool, always: bool) -> list[Mix]:
        """From least to most device memory. tiled: MLPs can be made again by themselves; always: and all of them are."""
        left_out = ActivationAction.RECOMPUTE_MLP if not tiled else ActivationAction.SAVE_ALL if always else None
        here = [one for one in DEVICE_ALONE if one is not left_out]
        found: list[Mix] = [partial(_taking_turns, one, one, 0.0) for one in here]
        if self.speed is None:
            return found
        found.insert(0, partial(_taking_turns, ActivationAction.OFFLOAD, ActivationAction.OFFLOAD, 0.0))
        share = self._host_share(self.speed) if tiled else 0.0
        if share > 0:
            found.insert(
                1, partial(_taking_turns, ActivationAction.OFFLOAD, ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST, share)
            )
        return found

    def _host_share(self, speed: DeviceSpeed) -> float:
        """Which share of layers can have their attention's tensors in host memory, beside layers whose input waits there."""
        tokens, shape = self.batch * self.length, self.shape
        large = max(shape.layers, key=lambda one: self._sent(one, ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST))
        running = forward_flops(large, tokens, self.length) / (SUSTAINED * speed.flops_per_s)
        hidden = running * speed.bytes_per_s
        least, most = (
            self._sent(large, ActivationAction.OFFLOAD),
            self._sent(large, ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST),
        )
        return min(1.0, (hidden - least) / (most - least))

    def _sent(self, layer: LayerShape, action: ActivationAction) -> int:
        return saved_bytes(layer, action, self.batch * self.length, self.length, self.shape.itemsize).host

    def seconds(self, plan: LayerPlan) -> float:
        """What a step pays for not keeping everything: seconds where the device's speed is known, else FLOPs."""
        tokens, cost = self.batch * self.length, 0.0
        for (layer, action), count in Counter(zip(self.shape.layers, plan.actions, strict=True)).items():
            made = recompute_flops(layer, action, tokens, self.length)
            if plan.tile is not None and action is not ActivationAction.SAVE_ALL:
                made += (-(-tokens // plan.tile) - 1) * mlp_flops(layer, TILE_TOLL)
            if self.speed is None:
                cost += count * made
            else:
                sent = 2 * self._sent(layer, action) / self.speed.bytes_per_s
                cost += count * (made / (SUSTAINED * self.speed.flops_per_s) + LINK_TOLL * sent)
        return cost

    def maximize(self, fewer: Mix, more: Mix, tile: int | None) -> LayerPlan:
        """As many layers by the second way as fit; none of them, fitting or not, where not even that fits."""
        layers = len(self.shape.layers)

        def plan(count: int) -> LayerPlan:
            actions = (*fewer(layers - count), *more(count))
            found = peak(self.shape, self.batch, self.length, actions, tile, accumulates=self.accumulates)
            room = self.host_room is None or found.host <= self.host_room
            return LayerPlan(actions, tile, found, room and found.total <= self.budget)

        # The peak grows with the count, but for dips at the ends that it costs little to miss.
        low, high = 0, layers + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if plan(middle).fits else (low, middle)
        return plan(low)


def _taking_turns(
    mostly: ActivationAction, sometimes: ActivationAction, share: float, layers: int
) -> tuple[ActivationAction, ...]:
    """`sometimes` for that share of the layers, evenly spread, `mostly` for the others."""
    return tuple(sometimes if math.floor((i + 1) * share) > math.floor(i * share) else mostly for i in range(layers))
