"""The arguments of the engines that generate: hasten's own, and vLLM's (`fast_inference`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hasten.options.fields import LoadFields
from hasten.options.values import Rule, not_yet, positive_integer


@dataclass(frozen=True)
class EngineOptions:
    """fast_inference: `generate` runs on vLLM. gpu_memory_utilization: the fraction of the GPU's memory that it may
    use.

    float8_kv_cache: keys and values in FP8 while generating. max_lora_rank: the largest rank of an adapter that it serves.
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


FP8_CAPABILITY = (8, 9)
RULES: Mapping[str, Rule] = {"gpu_memory_utilization": memory_fraction, "max_lora_rank": positive_integer}


def check(options: LoadFields) -> list[str]:
    """Refuses arguments that need the vLLM engine, and an FP8 cache on a GPU without FP8."""
    engine = EngineOptions.of(options)
    problems = []
    if engine.fast_inference is not False and engine.fast_inference is not None:
        problems.append(
            not_yet(
                f"fast_inference={engine.fast_inference!r}", "leave it out; model.generate uses hasten's own engine"
            )
        )
    if (
        engine.float8_kv_cache is True
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() < FP8_CAPABILITY
    ):
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        problems.append(
            f"float8_kv_cache=True: needs a GPU of compute capability 8.9 or later (Ada, Hopper), found {found}. Leave it out, or pass "
            'cache_implementation="quantized", cache_config={"backend": "hasten-int8"} to generate'
        )
    return problems
