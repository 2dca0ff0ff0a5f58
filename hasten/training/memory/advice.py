"""What a user could change to make a training step fit, and how much memory each change gives by the formulas of `costs`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.costs import Optimizer, peak, with_tile
from hasten.training.memory.layer_shape import LayerShape, LinearShape
from hasten.training.memory.shape import ModelShape
from hasten.training.tiling import DEFAULT_ROWS
from hasten.units import format_bytes
from hasten.weights import formats

MIN_SAVING = 2**20
"""Bytes; nobody changes a run for less."""


@dataclass(frozen=True)
class Settings:
    """A run as it is: rows and tokens of a row, a action for each layer, and the rest as `costs.peak` takes it."""

    batch: int
    length: int
    actions: tuple[ActivationAction, ...]
    tile: int | None = None
    optimizer: Optimizer = "adamw"
    accumulates: bool = False

    def peak(self, shape: ModelShape) -> int:
        """Bytes of the peak with `shape`."""
        return peak(shape, self.batch, self.length, self.actions, self.tile, self.optimizer, self.accumulates).total


@dataclass(frozen=True)
class Saving:
    """A change, in words that name the argument, and the bytes by which it lowers the peak when it is the only one."""

    text: str
    gain: int

    def __str__(self) -> str:
        return f"{self.text}: {format_bytes(self.gain)} less"


def savings(shape: ModelShape, settings: Settings) -> list[Saving]:
    """Every change that lowers the peak, largest gain first."""
    now = settings.peak(shape)
    found = [Saving(text, now - then.peak(after)) for text, after, then in _changes(shape, settings)]
    return sorted((one for one in found if one.gain >= MIN_SAVING), key=lambda one: -one.gain)


def advice(found: Sequence[Saving]) -> str:
    """Lines for an error message; what each gives is no sum, since each counts from where the run is now."""
    if not found:
        return "Nothing that hasten knows would lower the peak: a smaller model or a larger GPU is needed."
    return "\n".join(["What would lower the peak, each change by itself:", *(f"  - {one}" for one in found)])


def _changes(shape: ModelShape, s: Settings) -> list[tuple[str, ModelShape, Settings]]:
    count = len(shape.layers)
    found: list[tuple[str, ModelShape, Settings]] = []
    if s.batch > 1:
        half = s.batch // 2
        text = f"per_device_train_batch_size={half} with gradient_accumulation_steps times {-(-s.batch // half)}"
        found.append((text, shape, replace(s, batch=half, accumulates=True)))
    if s.length > 1:
        found.append((f"max_seq_length={s.length // 2}", shape, replace(s, length=s.length // 2)))
    for mode, action in (("True", ActivationAction.RECOMPUTE), ('"offload"', ActivationAction.OFFLOAD)):
        found.append((f"use_gradient_checkpointing={mode}", shape, replace(s, actions=(action,) * count)))
    tiled = replace(s, actions=with_tile(s.actions, DEFAULT_ROWS), tile=min(s.tile or DEFAULT_ROWS, DEFAULT_ROWS))
    found.append(("unsloth_tiled_mlp=True", shape, tiled))
    found.append(('optim="adamw_8bit"', shape, replace(s, optimizer="adamw_8bit")))
    found.append(('optim="paged_adamw_8bit"', shape, replace(s, optimizer="paged")))
    if shape.lookup:
        found.append(("offload_embedding=True", replace(shape, weights=shape.weights - shape.lookup), s))
    linears = [one for layer in shape.layers for one in layer.linears]
    if not any(one.trained for one in linears):
        smallest = formats.smallest_loadable()
        found.append((f"{smallest.load_argument}=True", _quantized(shape, smallest), s))
    rank = max(one.rank for one in linears)
    if rank > 1:
        found.append((f"r={rank // 2}", _half_rank(shape), s))
    return found


def _quantized(shape: ModelShape, into: formats.WeightFormat) -> ModelShape:
    def change(one: LinearShape) -> LinearShape:
        return replace(one, stored=min(one.stored, into.bytes_for(one.rows, one.columns, shape.itemsize)), dense=False)

    return _changed(shape, [_mapped(layer, change) for layer in shape.layers])


def _half_rank(shape: ModelShape) -> ModelShape:
    def change(one: LinearShape) -> LinearShape:
        return replace(one, rank=one.rank // 2, adapter=one.adapter * (one.rank // 2) // max(one.rank, 1))

    layers = [_mapped(layer, change) for layer in shape.layers]
    share = sum(_adapters(layer) for layer in layers) / max(sum(_adapters(layer) for layer in shape.layers), 1)
    in_layers = min(shape.moment_numbers, sum(_numbers(layer) for layer in shape.layers))
    return replace(_changed(shape, layers), moment_numbers=shape.moment_numbers - round(in_layers * (1 - share)))


def _numbers(layer: LayerShape) -> int:
    return sum(one.rank * (one.rows + one.columns) for one in layer.linears)


def _adapters(layer: LayerShape) -> int:
    return sum(one.adapter for one in layer.linears)


def _mapped(layer: LayerShape, change: Callable[[LinearShape], LinearShape]) -> LayerShape:
    groups = {name: tuple(map(change, getattr(layer, name))) for name in ("qkv", "o", "gate_up", "down")}
    return replace(layer, **groups)


def _changed(shape: ModelShape, layers: Sequence[LayerShape]) -> ModelShape:
    """`shape` over other layers, whose Linears are stored in other sizes."""

    def held(of: Sequence[LayerShape]) -> int:
        return sum(one.stored + one.adapter for layer in of for one in layer.linears)

    return replace(shape, layers=tuple(layers), weights=shape.weights - held(shape.layers) + held(layers))
