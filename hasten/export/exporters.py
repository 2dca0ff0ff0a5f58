"""`Exporter`: one way of writing a trained model, and the registry of all of them. `save_method` is an exporter's
name."""

from abc import ABC, abstractmethod
from typing import Any

from hasten.export.adapter import write_adapter
from hasten.export.merged import plan_merge, write_model
from hasten.export.quantized import check_layout, check_package, write_quantized
from hasten.export.request import ExportRequest
from hasten.weights import formats
from hasten.weights.formats import WeightFormat


class Exporter(ABC):
    """Three steps, so that a call that cannot succeed is refused before anything is written: check, preflight, write.

    name: as `save_method` spells it.
    """

    name: str

    def check(self, request: ExportRequest) -> list[str]:
        """Returns the problems that can be found from the arguments alone."""
        return []

    @abstractmethod
    def preflight(self, request: ExportRequest) -> Any:
        """Reads the model and returns what `write` needs. Changes nothing. Raises ExportError or MissingExtraError."""

    @abstractmethod
    def write(self, request: ExportRequest, plan: Any) -> tuple[int, float | None]:
        """Writes the complete folder or none. plan: from `preflight`. Returns (bytes of the weights, mean KL
        divergence from the 16-bit merge in nats per token, None for exporters that do not quantise)."""


def _refuse_rows(request: ExportRequest) -> list[str]:
    if request.rows is None:
        return []
    measuring = ", ".join(one.name for one in exporters() if isinstance(one, MergedQuantized))
    return [f"rows were given, and only {measuring} uses them; leave them out with save_method={request.method!r}"]


class Merged16Bit(Exporter):
    """The active adapters added to the unquantised base checkpoint, summed in fp32 and cast once."""

    name = "merged_16bit"

    def check(self, request: ExportRequest) -> list[str]:
        return [*_cannot_cast(request), *_refuse_rows(request)]

    def preflight(self, request: ExportRequest) -> Any:
        return plan_merge(request.model, request.dtype)

    def write(self, request: ExportRequest, plan: Any) -> tuple[int, float | None]:
        return write_model(plan, request.target, request.max_bytes, request.method, request.tokenizer), None


class MergedQuantized(Exporter):
    """The 16-bit merge requantised into a storage format."""

    def __init__(self, into: WeightFormat) -> None:
        assert into.save_method is not None
        self.into, self.name = into, into.save_method

    def check(self, request: ExportRequest) -> list[str]:
        return _cannot_cast(request)

    def preflight(self, request: ExportRequest) -> Any:
        check_package(self.into)
        plan = plan_merge(request.model, request.dtype)
        check_layout(plan)
        return plan

    def write(self, request: ExportRequest, plan: Any) -> tuple[int, float | None]:
        return write_quantized(plan, self.into, request)


class Adapter(Exporter):
    """The one active adapter as PEFT writes it."""

    name = "lora"

    def check(self, request: ExportRequest) -> list[str]:
        cast = [] if request.dtype is None else [_not_castable(request.dtype)]
        return [*cast, *_refuse_rows(request)]

    def preflight(self, request: ExportRequest) -> Any:
        return None

    def write(self, request: ExportRequest, plan: Any) -> tuple[int, float | None]:
        return write_adapter(request.model, request.target, request.tokenizer), None


def _cannot_cast(request: ExportRequest) -> list[str]:
    dtype = request.dtype
    if dtype is None or (dtype.is_floating_point and dtype.itemsize >= 2):
        return []
    return [_not_castable(dtype)]


def _not_castable(dtype: Any) -> str:
    return f"dtype={dtype} was asked for; only merged weights can be cast, and to bfloat16, float16 or float32"


def exporters() -> tuple[Exporter, ...]:
    """Returns every exporter: the 16-bit merge, one for each storage format with a `save_method`, the adapter alone."""
    quantized = (MergedQuantized(one) for one in formats.FORMATS if one.save_method is not None)
    return (Merged16Bit(), *quantized, Adapter())


def names() -> list[str]:
    """Returns the values of `save_method`."""
    return [one.name for one in exporters()]


def named(name: str) -> Exporter:
    """Returns the exporter of a name. Raises KeyError."""
    return {one.name: one for one in exporters()}[name]
