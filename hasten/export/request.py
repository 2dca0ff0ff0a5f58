"""`ExportRequest`: what `save_merged` was asked to write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ExportRequest:
    """model: a causal LM, with or without a PEFT adapter. target: the folder to write. method: the exporter's name.

    tokenizer: saved as given, None = not saved. max_bytes: of a shard. dtype: of all floating tensors, None = as in the
    base. rows: (B, T) token ids to measure on, None = the exporter's choice.
    """

    model: nn.Module
    target: Path
    method: str
    tokenizer: Any = None
    max_bytes: int = 5 * 10**9
    dtype: torch.dtype | None = None
    rows: torch.Tensor | None = None
