"""Lists what a user can change to make a training step fit, and how many bytes each change saves by the formulas of
`costs`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.costs import Optimizer, peak, with_tile
from hasten.training.memory.layer_shape import LayerShape, LinearShape
from hasten.training.memory.shape import ModelShape
from hasten.training.tiling import DEFAULT_TILE
from hasten.units import format_bytes
from hasten.weights import formats

MIN_SAVING = 2**20
"""Bytes; smaller savings are not worth a change."""


@dataclass(frozen=True)
class StepConfig:
    """The present configuration of a training step. batch: sequences. length: tokens per sequence. actions: one per
    layer. Others: see `costs.peak`."""

    batch: int
    length: int
    actions: tuple[ActivationAction, ...]
    tile: int | None = None
    optimizer: Optimizer = "adamw"
    accumulates: bool = False

    def peak(self, shape: ModelShape) -> int:
        """Returns the predicted peak of a model of this shape, in bytes."""
        return peak(shape, self.batch, self.length, self.actions, self.tile, self.optimizer, self.accumulates).total


@dataclass(frozen=True)
class Saving:
    """One change. text: names the argument. gain: bytes by which it lowers the peak when nothing else changes."""

    text: str
    gain: int

    def __str__(self) -> str:
        return f"{self.text}: {format_bytes(self.gain)} less"


def savings(shape: ModelShape, config: StepConfig) -> list[Saving]:
    """Returns every change that lowers the peak, largest gain first."""
    now = config.peak(shape)
    found = [Saving(text, now - then.peak(after)) for text, after, then in _changes(shape, config)]
    return sorted((one for one in found if one.gain >= MIN_SAVING), key=lambda one: -one.gain)


def advice(found: Sequence[Saving]) -> str:
    """Formats savings for an error message. The gains do not add up: each is relative to the present run."""
    if not found:
        return "No setting of hasten lowers the peak further: use a smaller model or a larger GPU."
    return "\n".join(["Each of these changes alone would lower the peak:", *(f"  - {one}" for one in found)])


def _changes(shape: ModelShape, step: StepConfig) -> list[tuple[str, ModelShape, StepConfig]]:
    count = len(shape.layers)
    found: list[tuple[str, ModelShape, StepConfig]] = []
    if step.batch > 1:
        half = step.batch // 2
        text = f"per_device_train_batch_size={half} with gradient_accumulation_steps times {-(-step.batch // half)}"
        found.append((text, shape, replace(step, batch=half, accumulates=True)))
    if step.length > 1:
        found.append((f"max_seq_length={step.length // 2}", shape, replace(step, length=step.length // 2)))
    for mode, action in (("True", ActivationAction.RECOMPUTE), ('"offload"', ActivationAction.OFFLOAD)):
        found.append((f"use_gradient_checkpointing={mode}", shape, replace(step, actions=(action,) * count)))
    tiled = replace(
        step, actions=with_tile(step.actions, DEFAULT_TILE), tile=min(step.tile or DEFAULT_TILE, DEFAULT_TILE)
    )
    found.append(("unsloth_tiled_mlp=True", shape, tiled))
    found.append(('optim="adamw_8bit"', shape, replace(step, optimizer="adamw_8bit")))
    found.append(('optim="paged_adamw_8bit"', shape, replace(step, optimizer="paged")))
    if shape.lookup:
        found.append(("offload_embedding=True", replace(shape, weights=shape.weights - shape.lookup), step))
    linears = [one for layer in shape.layers for one in layer.linears]
    if not any(one.trained for one in linears):
        smallest = formats.smallest_loadable()
        found.append((f"{smallest.load_argument}=True", _quantized(shape, smallest), step))
    rank = max(one.rank for one in linears)
    if rank > 1:
        found.append((f"r={rank // 2}", _half_rank(shape), step))
    return found


def _quantized(shape: ModelShape, into: formats.WeightFormat) -> ModelShape:
    def change(one: LinearShape) -> LinearShape:
        return replace(one, stored=min(one.stored, into.bytes_for(one.rows, one.columns, shape.itemsize)), dense=False)

    return _changed(shape, [_mapped(layer, change) for layer in shape.layers])


def _half_rank(shape: ModelShape) -> ModelShape:
    def change(one: LinearShape) -> LinearShape:
        return replace(one, rank=one.rank // 2, adapter=one.adapter * (one.rank // 2) // max(one.rank, 1))

    layers = [_mapped(layer, change) for layer in shape.layers]
    fraction = sum(_adapter_bytes(layer) for layer in layers) / max(
        sum(_adapter_bytes(layer) for layer in shape.layers), 1
    )
    in_layers = min(shape.moment_numbers, sum(_adapter_weights(layer) for layer in shape.layers))
    return replace(_changed(shape, layers), moment_numbers=shape.moment_numbers - round(in_layers * (1 - fraction)))


def _adapter_weights(layer: LayerShape) -> int:
    return sum(one.rank * (one.rows + one.columns) for one in layer.linears)


def _adapter_bytes(layer: LayerShape) -> int:
    return sum(one.adapter for one in layer.linears)


def _mapped(layer: LayerShape, change: Callable[[LinearShape], LinearShape]) -> LayerShape:
    groups = {name: tuple(map(change, getattr(layer, name))) for name in ("qkv", "o", "gate_up", "down")}
    return replace(layer, **groups)


def _changed(shape: ModelShape, layers: Sequence[LayerShape]) -> ModelShape:
    """Returns `shape` with other layers, and with its weights' bytes changed by the difference of their Linears."""

    def stored(of: Sequence[LayerShape]) -> int:
        return sum(one.stored + one.adapter for layer in of for one in layer.linears)

    return replace(shape, layers=tuple(layers), weights=shape.weights - stored(shape.layers) + stored(layers))
