"""Bounds of numbers whose name says what they count. A number that has none of these must not be negative."""

from collections.abc import Callable, Mapping
from typing import Any

Bound = tuple[str, Callable[[float], bool]]

ABOVE_ZERO: Bound = ("above 0", lambda value: value > 0)
AT_LEAST_ONE: Bound = ("at least 1", lambda value: value >= 1)
NOT_NEGATIVE: Bound = ("at least 0", lambda value: value >= 0)
BELOW_ONE: Bound = ("at least 0 and below 1", lambda value: 0 <= value < 1)
UP_TO_ONE: Bound = ("at least 0 and at most 1", lambda value: 0 <= value <= 1)
STEPS: Bound = ("at least 1, or -1 for whole epochs", lambda value: value >= 1 or value == -1)
SEED: Bound = ("at least 0 and below 2^32", lambda value: 0 <= value < 2**32)
ANY: Bound = ("a number", lambda value: True)

BOUNDS: Mapping[str, Bound] = {
    **dict.fromkeys(
        (
            "r", "max_seq_length", "resize_model_vocab", "max_lora_rank", "memory_budget", "save_total_limit",
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "eval_accumulation_steps", "pad_to_multiple_of", "dataset_num_proc", "torch_empty_cache_steps",
        ),
        AT_LEAST_ONE,
    ),
    **dict.fromkeys(("lora_alpha", "num_train_epochs", "logging_steps", "save_steps", "eval_steps"), ABOVE_ZERO),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2"), BELOW_ONE),
    **dict.fromkeys(("label_smoothing_factor", "gpu_memory_utilization"), UP_TO_ONE),
    **dict.fromkeys(("seed", "data_seed", "random_state"), SEED),
    "max_steps": STEPS,
    "local_rank": ANY,
    "device_map": ANY,
}  # fmt: skip


def problem(name: str, value: Any) -> str | None:
    """What the number `value` of the argument `name` must be; None where it is that, or not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    words, holds = BOUNDS.get(name, NOT_NEGATIVE)
    return None if holds(value) else words
