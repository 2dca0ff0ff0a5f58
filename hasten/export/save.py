"""`save_merged`: writes a trained model through the exporter that `save_method` names."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.errors import ExportError
from hasten.export import exporters
from hasten.export.base import find_base
from hasten.export.folder import check_target
from hasten.export.request import ExportRequest
from hasten.export.shards import parse_size
from hasten.export.target import absolute
from hasten.state import causal_lm_of
from hasten.suggest import did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written. bytes: of the weights. kl: mean KL divergence from the 16-bit merge in nats per token, None for
    exporters that do not quantise."""

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
    """Writes `model` (a causal LM, with or without a PEFT adapter) to `folder`, completely or not at all; the model is
    not changed.

    save_method: one of `exporters.names()`.
      "merged_16bit": the active adapters added to the *unquantised* base checkpoint, summed in fp32 and cast once.
        Tensors that training did not change are the base's, bit for bit, under the base's names. Each tensor keeps the
        base's dtype, so an fp32 base stays fp32; `dtype` casts all floating tensors instead. Where the base cannot be
        read again (built in memory, or itself quantised) the model's own weights are used, with a warning if they are
        quantised. A fully fine-tuned model without adapter is saved the same way.
      the `save_method` of a storage format: that merge, requantised. Its mean KL divergence from the 16-bit merge is
        measured on `rows` ((B, T) token ids; None = random ones) and returned; this needs the 16-bit model in CPU
        memory.
      "lora": the one active adapter as PEFT writes it, with the base's name and revision.

    max_shard_size: bytes, or "5GB". tokenizer: saved as given, None = not saved. Raises ExportError and leaves no
    partial model; an existing `folder` is replaced only if hasten wrote everything in it.
    """
    known = exporters.names()
    if save_method not in known:
        hint = did_you_mean(save_method, known, count=1, cutoff=0.3)
        raise ExportError(f"save_method={save_method!r}{hint} is not known; must be one of {', '.join(known)}")
    exporter, target = exporters.named(save_method), absolute(folder)
    request = ExportRequest(model, target, save_method, tokenizer, dtype=dtype, rows=rows)
    if problems := exporter.check(request):
        raise ExportError("; ".join(problems))
    request = replace(request, max_bytes=parse_size(max_shard_size))
    check_target(target)
    _refuse_own_base(model, target)
    with torch.no_grad():
        size, kl = exporter.write(request, exporter.preflight(request))
    log.info("wrote %s (%s, %d bytes)%s", target, save_method, size, "" if kl is None else f", KL to 16-bit {kl:.4g}")
    return Exported(target, save_method, size, kl)


def _refuse_own_base(model: nn.Module, target: Path) -> None:
    base = find_base(causal_lm_of(model))
    if base is not None and target.exists() and Path(base.origin).exists() and target.samefile(base.origin):
        raise ExportError(
            f"{target} is the base that this model was loaded from, and the merge reads it. Save to another folder"
        )
