"""Estimates the peak memory of one training step, and plans recomputation and offloading, from a checkpoint's config
alone.

Nothing is allocated. The formulas are in `training.memory.costs`; docs/memory.md compares them with measured peaks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoConfig, PreTrainedConfig

from hasten.errors import CheckpointError, OptionError
from hasten.loading.config_file import read_config
from hasten.loading.foreign import parsing
from hasten.options import CHECKPOINTING, PLANNED
from hasten.options.values import is_integer
from hasten.training.memory.actions import UNIFORM_ACTIONS
from hasten.training.memory.advice import Saving, StepConfig, savings
from hasten.training.memory.bandwidth import DeviceSpeed, measure
from hasten.training.memory.costs import Optimizer, Peak, moments, peak, with_tile
from hasten.training.memory.plan import LayerPlan, plan_layers
from hasten.training.memory.shape import ModelShape
from hasten.training.tiling import tile_of
from hasten.units import format_bytes, parse_bytes
from hasten.weights import formats

ASSUMED = DeviceSpeed(bytes_per_s=25e9, flops_per_s=2e14)
"""Assumed where no GPU is available: 16 lanes of PCIe 4 and 200 TFLOP/s in 16 bits. Decides which transfers overlap
with compute, not how many bytes are needed."""


@dataclass(frozen=True)
class Estimate:
    """peak: bytes by part when most is allocated. plan: in words, which layers save, recompute or offload their
    activations. fits: whether `total` is within the budget that was given. savings: changes that would lower `total`,
    largest gain first."""

    peak: Peak
    plan: str
    fits: bool = True
    savings: tuple[Saving, ...] = ()

    @property
    def total(self) -> int:
        return self.peak.total

    def parts(self) -> dict[str, int]:
        """Returns {label of each part: bytes}; `total` is their sum."""
        return {
            "weights": self.peak.weights,
            "gradients": self.peak.gradients,
            "optimizer": self.peak.optimizer,
            "saved activations": self.peak.layers,
            f"needed at the peak ({self.peak.when})": self.peak.working,
        }

    def __str__(self) -> str:
        lines = [f"{label}: {format_bytes(size)}" for label, size in self.parts().items()]
        host = [f"in CPU memory: {format_bytes(self.peak.host)}"] if self.peak.host else []
        return "\n".join([*lines, f"total: {format_bytes(self.total)}", *host, f"plan: {self.plan}"])


def estimate(  # noqa: PLR0913
    config: PreTrainedConfig | str | Path,
    *,
    batch_size: int = 1,
    seq_len: int = 2048,
    rank: int = 16,
    quantization: str | None = "4bit",
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
    quantization: a choice of `weights.formats` ("4bit", "8bit", ...), None = dense. dtype: the compute dtype, and that
    of weights that are not quantised. checkpointing: as `use_gradient_checkpointing`: False, True, "offload", or "auto"
    (= "unsloth"), which plans each layer for memory_budget (bytes, or a text such as "24GiB"; None = the memory of the
    first GPU). tiled_mlp: as `unsloth_tiled_mlp`. optimizer: "adamw",
    "adamw_8bit" or "paged", see `costs.peak`.

    Not included: the CUDA context, fragmentation by the allocator, `modules_to_save`, several GPUs.

    Raises OptionError with every problem of the arguments, CheckpointError if there is no readable config or the
    formulas do not cover the architecture's layers.
    """
    sizes = {"batch_size": batch_size, "seq_len": seq_len, "rank": rank}
    problems = [*_size_problems(sizes), *_storage_problems(quantization, full_finetuning)]
    problems += _mode_problems(checkpointing, tiled_mlp, optimizer)
    flags = {"full_finetuning": full_finetuning, "offload_embedding": offload_embedding}
    problems += [
        f"{name}={value!r}: must be True or False" for name, value in flags.items() if not isinstance(value, bool)
    ]
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        problems.append(f"dtype={dtype!r}: must be a floating torch.dtype such as torch.bfloat16")
    budget, budget_problems = _budget(memory_budget, checkpointing)
    if problems := [*problems, *budget_problems]:
        raise OptionError("estimate", problems)
    shape = ModelShape.of_config(_config(config), rank, quantization, full_finetuning, dtype, offload_embedding)
    tile = tile_of(tiled_mlp)
    if checkpointing in PLANNED:
        assert budget is not None
        speed = measure(torch.device("cuda")) if torch.cuda.is_available() else ASSUMED
        # The planner counts AdamW's moments.
        adamw_budget = budget + moments(shape, "adamw") - moments(shape, optimizer)
        plan = plan_layers(
            shape, batch_size, seq_len, adamw_budget, speed, (tile,) if tile and tiled_mlp != "auto" else ()
        )
        actions, tile = plan.actions, plan.tile
    else:
        actions = with_tile([UNIFORM_ACTIONS[checkpointing]] * len(shape.layers), tile)
    found = peak(shape, batch_size, seq_len, actions, tile, optimizer)
    step = StepConfig(batch_size, seq_len, actions, tile, optimizer)
    text = str(LayerPlan(actions, tile, found))
    return Estimate(found, text, budget is None or found.total <= budget, tuple(savings(shape, step)))


def _size_problems(sizes: dict[str, int]) -> list[str]:
    return [
        f"{name}={size}: must be an integer of at least 1" for name, size in sizes.items() if not is_integer(size, 1)
    ]


def _storage_problems(quantization: str | None, full_finetuning: bool) -> list[str]:
    known = [choice for choice in formats.choices() if not formats.by_choice(choice).exact]
    problems = []
    if quantization not in (None, *formats.choices()):
        problems.append(f"quantization={quantization!r}: known are {', '.join(map(repr, known))} and None")
    elif full_finetuning and not formats.by_choice(quantization).trainable:
        problems.append(
            f"full_finetuning trains every weight, which {quantization} storage cannot; use quantization=None"
        )
    return problems


def _mode_problems(mode: bool | str, tiled: bool | int | str, optimizer: str) -> list[str]:
    problems = []
    if mode not in CHECKPOINTING or (isinstance(mode, int) and not isinstance(mode, bool)):
        problems.append(f"checkpointing={mode!r}: known are False, True, 'offload', 'auto' and 'unsloth'")
    if not (isinstance(tiled, bool) or tiled == "auto" or (isinstance(tiled, int) and tiled >= 1)):
        problems.append(f"tiled_mlp={tiled!r}: pass False, True, 'auto' or a number of tokens")
    if optimizer not in get_args(Optimizer):
        problems.append(f"optimizer={optimizer!r}: known are {', '.join(map(repr, get_args(Optimizer)))}")
    return problems


def _budget(asked: int | str | None, mode: bool | str) -> tuple[int | None, list[str]]:
    """Returns (budget in bytes, None where none is needed or given; problems)."""
    if asked is not None:
        try:
            return parse_bytes(asked), []
        except ValueError as error:
            return None, [f"memory_budget: {error}"]
    if mode not in PLANNED:
        return None, []
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, []
    return None, [f"checkpointing={mode!r} plans for a budget, and there is no GPU: pass memory_budget, e.g. '24GiB'"]


def _config(source: PreTrainedConfig | str | Path) -> PreTrainedConfig:
    if isinstance(source, PreTrainedConfig):
        return source
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise CheckpointError(
                f"{source} has no config.json; pass a folder or hub id with the config of a known model"
            )
        return read_config(Path(source))
    with parsing(
        f"The config of {source}", CheckpointError, "Pass a folder or hub id with the config of a known model"
    ):
        return AutoConfig.from_pretrained(source)
