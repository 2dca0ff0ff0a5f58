"""Settings for TRL's SFTTrainer, which stays TRL's own: a config that fits the model."""

import logging
from typing import TYPE_CHECKING, Any

import torch

from hasten.errors import OptionError
from hasten.overlays import HeadOverlay, StockHeadOverlay
from hasten.schema import fields_of, text_for_other
from hasten.state import causal_lm_of
from hasten.training.optimizers import optimizer_problems

if TYPE_CHECKING:
    from trl import SFTConfig

logger = logging.getLogger(__name__)


def max_seq_length_of(model: Any) -> int | None:
    """The `max_seq_length` that the model was loaded with, in tokens, or None where it has no such limit."""
    base = causal_lm_of(model)
    return base.overlay_config.max_seq_length if isinstance(base, (HeadOverlay, StockHeadOverlay)) else None


def sft_config(model: Any, **kwargs: Any) -> "SFTConfig":
    """A `trl.SFTConfig` whose defaults are the model's instead of TRL's; every name in `kwargs` is SFTConfig's.

    max_length: the model's `max_seq_length` (TRL would truncate at 1024 tokens). None where nothing is truncated: for a
    model without a limit, and for `padding_free` without packing, of which TRL demands it; sequences that are too long
    then raise InputError.
    gradient_checkpointing: False, so that the trainer leaves the model as `use_gradient_checkpointing` set it.
    One process takes one GPU; torchrun starts one for each.
    bf16, fp16: on where the model computes in that dtype. use_cpu: on where the model is on the CPU. Raises OptionError
    for a `max_length` beyond the model's limit, for packing without any length, and for an `optim` whose package is missing.
    """
    from trl import SFTConfig

    limit = max_seq_length_of(model)
    packing = bool(kwargs.get("packing", False))
    untruncated = bool(kwargs.get("padding_free", False)) and not packing
    base = causal_lm_of(model)
    settings = {"max_length": None if untruncated else limit, "use_cpu": base.device.type == "cpu", **kwargs}
    # Renamed in transformers 5.23; the old name warns there, and stays the one that callers know.
    new = "activation_checkpointing"
    name = new if new in SFTConfig.__dataclass_fields__ else "gradient_checkpointing"
    settings.setdefault(name, settings.pop("gradient_checkpointing", False))
    if "bf16" not in kwargs and "fp16" not in kwargs:
        settings |= {"bf16": base.dtype == torch.bfloat16, "fp16": base.dtype == torch.float16}
    asked = settings["max_length"]
    problems = []
    if limit is not None and asked is not None and asked > limit:
        problems.append(
            f"max_length={asked} is more than the model's max_seq_length={limit}; load the model with "
            f"max_seq_length={asked}, or pass at most {limit}"
        )
    if packing and asked is None:
        problems.append("packing=True fills sequences of max_length tokens, but there is no max_length; pass one")
    problems += text_for_other(kwargs, fields_of("trl", "SFTConfig"))
    problems += optimizer_problems(settings.get("optim"))
    if problems:
        raise OptionError("sft_config", problems)
    return _on_one_gpu(SFTConfig(**settings), base)


def _on_one_gpu(config: "SFTConfig", base: Any) -> "SFTConfig":
    """Keeps transformers from nn.DataParallel, which would copy the model to every visible GPU at each step and multiply
    the batch size by their number. A model that is split over several GPUs trains on those."""
    if config.n_gpu > 1:
        if len({p.device for p in base.parameters()}) == 1:
            text = "training on %s, one of %d GPUs that are visible; torchrun --nproc_per_node N trains on N of them"
            logger.warning(text, base.device, config.n_gpu)
        config._n_gpu = 1  # as Trainer does for a model that is split over several
    return config
