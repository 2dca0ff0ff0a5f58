"""save_merged: one call for the three ways in which a trained model leaves."""

import difflib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.errors import ExportError
from hasten.export.adapter import write_adapter
from hasten.export.base import find_base
from hasten.export.folder import check_target
from hasten.export.merged import plan_merge, write_model
from hasten.export.quantized import write_quantized
from hasten.export.shards import parse_size
from hasten.state import causal_lm_of

log = logging.getLogger(__name__)

METHODS = ("merged_16bit", "merged_4bit", "lora")


@dataclass(frozen=True)
class Exported:
    """What was written. bytes: of the weights; kl: nats per token from the 16-bit merge to this one, None if they are one."""

    folder: Path
    method: str
    bytes: int
    kl: float | None = None


def save_merged(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    rows: torch.Tensor | None = None,
) -> Exported:
    """Writes `model` (a causal LM, with or without a PEFT adapter) to `folder`, whole or not at all; the model stays as it is.

    save_method:
      "merged_16bit": the active adapters added to the *unquantised* base checkpoint, summed in fp32 and cast once.
        Tensors that training did not change are the base's, bit for bit, under the base's names. Each tensor keeps the
        base's dtype, so an fp32 base stays fp32; `dtype` casts all floating tensors instead. Where the base cannot be
        read again (built in memory, or itself quantised) the model's own weights are used, with a warning if they are
        quantised. A fully fine-tuned model without adapter is saved the same way.
      "merged_4bit": that merge, requantised to NF4 in bitsandbytes' format, for plain transformers. Its mean KL
        divergence from the 16-bit merge is measured on `rows` ((B, T) token ids; None = random ones) and returned;
        this holds the 16-bit model in host memory.
      "lora": the one active adapter as PEFT writes it, with the base's name and revision.

    max_shard_size: bytes, or "5GB". tokenizer: saved as given, None = not saved. Raises ExportError, with nothing left
    that looks like a model; an existing `folder` is replaced only if hasten wrote all that is in it.
    """
    if save_method not in METHODS:
        near = difflib.get_close_matches(save_method, METHODS, n=1, cutoff=0.3) or ["merged_16bit"]
        raise ExportError(
            f"save_method={save_method!r} is not known; known are {', '.join(METHODS)}. Nearest: {near[0]!r}"
        )
    if dtype is not None and (save_method == "lora" or not dtype.is_floating_point or dtype.itemsize < 2):
        raise ExportError(
            f"dtype={dtype} cannot be honoured: it is for merged weights, as bfloat16, float16 or float32"
        )
    if rows is not None and save_method != "merged_4bit":
        raise ExportError(f"rows are what merged_4bit is measured on; save_method={save_method!r} measures nothing")
    target, max_bytes, kl = Path(folder), parse_size(max_shard_size), None
    check_target(target)
    _refuse_own_base(model, target)
    with torch.no_grad():
        if save_method == "lora":
            size = write_adapter(model, target, tokenizer)
        elif save_method == "merged_16bit":
            size = write_model(plan_merge(model, dtype), target, max_bytes, save_method, tokenizer)
        else:
            size, kl = write_quantized(plan_merge(model, dtype), target, max_bytes, tokenizer, rows)
    log.info("wrote %s (%s, %d bytes)%s", target, save_method, size, "" if kl is None else f", KL to 16-bit {kl:.4g}")
    return Exported(target, save_method, size, kl)


def _refuse_own_base(model: nn.Module, target: Path) -> None:
    base = find_base(causal_lm_of(model))
    if base is not None and target.exists() and Path(base.origin).exists() and target.samefile(base.origin):
        raise ExportError(
            f"{target} is the base that this model was loaded from; a merge reads it. Save to another folder"
        )
