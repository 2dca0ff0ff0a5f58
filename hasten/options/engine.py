"""The arguments of the vLLM engine (`fast_inference`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.options.fields import LoadFields
from hasten.options.values import Rule, not_yet, positive_integer


@dataclass(frozen=True)
class EngineOptions:
    """fast_inference: `generate` runs on vLLM. gpu_memory_utilization: the fraction of the GPU's memory that it may
    use.

    float8_kv_cache: keys and values in FP8. max_lora_rank: the largest rank of an adapter that it serves.
    disable_log_stats: no throughput in its log.
    """

    fast_inference: bool = False
    gpu_memory_utilization: float = 0.5
    float8_kv_cache: bool = False
    max_lora_rank: int = 64
    disable_log_stats: bool = True

    @classmethod
    def of(cls, options: LoadFields) -> "EngineOptions":
        """Selects them from the arguments of `from_pretrained`."""
        return cls(**{name: getattr(options, name) for name in cls.__dataclass_fields__})


def memory_fraction(value: Any) -> str | None:
    """Validates `gpu_memory_utilization`."""
    fits = isinstance(value, int | float) and 0 < value <= 1
    return None if fits else "must be a fraction of the GPU's memory, above 0 and at most 1"


RULES: Mapping[str, Rule] = {"gpu_memory_utilization": memory_fraction, "max_lora_rank": positive_integer}


def check(options: LoadFields) -> list[str]:
    """Refuses arguments that need the engine."""
    engine = EngineOptions.of(options)
    instead = {
        "fast_inference": "leave it out; model.generate uses transformers' decoding",
        "float8_kv_cache": "leave it out",
    }
    asked = [name for name in instead if getattr(engine, name) not in (False, None)]
    return [not_yet(f"{name}={getattr(engine, name)!r}", instead[name]) for name in asked]
