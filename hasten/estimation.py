"""Peak memory of one training step, and what becomes of each layer, from a checkpoint's config alone: nothing is allocated.

The formulas are in `training.memory.costs`; docs/memory.md holds them against measured peaks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoConfig, PreTrainedConfig

from hasten.errors import CheckpointError, OptionError
from hasten.options import CHECKPOINTING, PLANNED
from hasten.training.memory.actions import UNIFORM_ACTIONS
from hasten.training.memory.advice import Saving, StepConfig, savings
from hasten.training.memory.bandwidth import DeviceSpeed, measure
from hasten.training.memory.costs import Optimizer, Peak, moments, peak, with_tile
from hasten.training.memory.layer_shape import Quantization
from hasten.training.memory.plan import LayerPlan, plan_layers
from hasten.training.memory.shape import ModelShape
from hasten.training.tiling import tile_of
from hasten.units import format_bytes, parse_bytes

ASSUMED = DeviceSpeed(bytes_per_s=25e9, flops_per_s=2e14)
"""Of a machine that is not at hand: 16 lanes of PCIe 4 and a GPU of 200 TFLOP/s in 16 bits. Decides what hides, not the bytes."""


@dataclass(frozen=True)
class Estimate:
    """peak: bytes by part at the moment at which most is allocated. plan: what becomes of the layers, in words. fits: whether
    `total` is within the budget that was given. savings: what would lower `total`, largest gain first."""

    peak: Peak
    plan: str
    fits: bool = True
    savings: tuple[Saving, ...] = ()

    @property
    def total(self) -> int:
        return self.peak.total

    def parts(self) -> dict[str, int]:
        """Label of each part -> bytes; `total` is their sum."""
        return {
            "weights": self.peak.weights,
            "gradients": self.peak.gradients,
            "optimizer": self.peak.optimizer,
            "kept by the layers": self.peak.layers,
            f"needed at the peak ({self.peak.when})": self.peak.working,
        }

    def __str__(self) -> str:
        lines = [f"{label}: {format_bytes(size)}" for label, size in self.parts().items()]
        host = [f"in host memory: {format_bytes(self.peak.host)}"] if self.peak.host else []
        return "\n".join([*lines, f"total: {format_bytes(self.total)}", *host, f"plan: {self.plan}"])


def estimate(  # noqa: PLR0913
    config: PreTrainedConfig | str | Path,
    *,
    batch_size: int = 1,
    seq_len: int = 2048,
    rank: int = 16,
    quantization: Quantization | None = "4bit",
    checkpointing: bool | str = True,
    full_finetuning: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    tiled_mlp: bool | int | str = False,
    optimizer: Optimizer = "adamw",
    offload_embedding: bool = False,
    memory_budget: int | str | None = None,
) -> Estimate:
    """Estimates torch.cuda.max_memory_allocated over a step of `FastLanguageModel` on one GPU.

    config: a transformers config, or a folder that holds one. rank: LoRA rank on all seven Linears of every layer.
    dtype: the compute dtype, and that of weights that are not quantised. checkpointing: as `use_gradient_checkpointing`:
    False, True, "offload", or "auto" (= "unsloth"), for which memory_budget (bytes, or a text such as "24GiB"; None = the
    memory of the GPU at hand) decides what each layer keeps. tiled_mlp: as `unsloth_tiled_mlp`. optimizer: "adamw",
    "adamw_8bit" or "paged", see `costs.peak`.

    Not in it: the CUDA context, fragmentation by the allocator, `modules_to_save`, several GPUs.

    Raises OptionError with every problem of the arguments, CheckpointError where there is no readable config or the
    architecture has other layers than those that hasten knows.
    """
    budget = _check(locals())
    shape = ModelShape.of_config(_config(config), rank, quantization, full_finetuning, dtype, offload_embedding)
    tile = tile_of(tiled_mlp)
    if checkpointing in PLANNED:
        assert budget is not None
        speed = measure(torch.device("cuda")) if torch.cuda.is_available() else ASSUMED
        # The planner counts AdamW's moments.
        room = budget + moments(shape, "adamw") - moments(shape, optimizer)
        plan = plan_layers(shape, batch_size, seq_len, room, speed, (tile,) if tile and tiled_mlp != "auto" else ())
        actions, tile = plan.actions, plan.tile
    else:
        actions = with_tile([UNIFORM_ACTIONS[checkpointing]] * len(shape.layers), tile)
    found = peak(shape, batch_size, seq_len, actions, tile, optimizer)
    step = StepConfig(batch_size, seq_len, actions, tile, optimizer)
    text = str(LayerPlan(actions, tile, found))
    return Estimate(found, text, budget is None or found.total <= budget, tuple(savings(shape, step)))


def _check(a: dict[str, object]) -> int | None:
    """The budget in bytes. Raises OptionError with every problem of `estimate`'s arguments."""
    problems = [
        f"{name}={a[name]}: must be a whole number of at least 1"
        for name in ("batch_size", "seq_len", "rank")
        if not isinstance(a[name], int) or int(str(a[name])) < 1
    ]
    quantization, mode, tiled = a["quantization"], a["checkpointing"], a["tiled_mlp"]
    if quantization not in (None, *get_args(Quantization)):
        problems.append(f"quantization={quantization!r}: known are '4bit', '8bit' and None")
    if a["full_finetuning"] and quantization is not None:
        problems.append(
            f"full_finetuning trains every weight, which {quantization} storage cannot; use quantization=None"
        )
    if mode not in CHECKPOINTING:
        problems.append(f"checkpointing={mode!r}: known are False, True, 'offload', 'auto' and 'unsloth'")
    if not (isinstance(tiled, bool) or tiled == "auto" or (isinstance(tiled, int) and tiled >= 1)):
        problems.append(f"tiled_mlp={tiled!r}: pass False, True, 'auto' or a number of rows")
    if a["optimizer"] not in get_args(Optimizer):
        problems.append(f"optimizer={a['optimizer']!r}: known are {', '.join(map(repr, get_args(Optimizer)))}")
    budget = None
    if a["memory_budget"] is not None:
        try:
            budget = parse_bytes(a["memory_budget"])  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            problems.append(f"memory_budget: {error}")
    elif mode in PLANNED and torch.cuda.is_available():
        budget = torch.cuda.get_device_properties(0).total_memory
    elif mode in PLANNED:
        problems.append(
            f"checkpointing={mode!r} plans for a budget, and no GPU is here: pass memory_budget, e.g. '24GiB'"
        )
    if problems:
        raise OptionError("estimate", problems)
    return budget


def _config(source: PreTrainedConfig | str | Path) -> PreTrainedConfig:
    if isinstance(source, PreTrainedConfig):
        return source
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no config of a known model was found in {source}: {error}") from error
