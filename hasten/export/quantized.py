"""The merged model requantised to NF4 in bitsandbytes' format, and how far that moves its predictions."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig

from hasten.errors import ExportError, MissingExtraError
from hasten.export.folder import new_folder
from hasten.export.merged import MergePlan, config_of, report_sources, write_beside
from hasten.export.shards import ShardWriter, write_json
from hasten.patching.contract import stock_class
from hasten.weights import base_layer_of

NF4_SHARE = 0.3  # of a 16-bit weight: half a byte for each value, and a scale for each 64 of them
SYNTHETIC_ROWS, SYNTHETIC_LENGTH = 4, 64


def write_quantized(
    plan: MergePlan, target: Path, max_bytes: int, tokenizer: Any, rows: torch.Tensor | None
) -> tuple[int, float]:
    """Writes the folder; returns (bytes of the weights, mean KL in nats per token).

    Raises MissingExtraError without bitsandbytes, ExportError for a model whose tensors are stored in another layout.
    """
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise MissingExtraError('save_method="merged_4bit"', "bitsandbytes", "train") from error
    if plan.converted:
        raise ExportError(f"{type(plan.model).__name__} stores its tensors in another layout; save it as merged_16bit")
    linears = _quantisable(plan)
    config = config_of(plan)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config["dtype"]),
        llm_int8_skip_modules=_kept_dense(plan),
    )
    config["quantization_config"] = settings.to_dict()
    dense: dict[str, torch.Tensor] = {}
    changed: dict[str, torch.Tensor] = {}
    needed = sum(plan.bytes_of(name, slot) * (NF4_SHARE if slot in linears else 1) for name, slot in plan.entries)
    with new_folder(target, int(needed), "merged_4bit") as work:
        writer = ShardWriter(work, max_bytes)
        for name, slot, tensor in plan.tensors():
            if slot is not None:
                dense[slot] = tensor
            if slot is None or slot not in linears:
                writer.add(name, tensor)
                continue
            codes, state = bnb.quantize_4bit(tensor.contiguous(), compress_statistics=True, quant_type="nf4")
            writer.add(name, codes)
            for part, value in state.as_dict(packed=True).items():
                writer.add(f"{name}.{part}", value)
            changed[slot] = bnb.dequantize_4bit(codes, state)
        writer.finish()
        write_beside(plan, work, tokenizer)
        kl = _kl(plan, dense, changed, rows)
        write_json(work / "config.json", config)
    report_sources(plan)
    return writer.total_bytes, kl


def _quantisable(plan: MergePlan) -> set[str]:
    """Slots of the weights that transformers will expect as NF4: every Linear but the head."""
    kept = set(_kept_dense(plan))
    return {
        name
        for name, slot in plan.slots.items()
        if slot.kind == "weight" and isinstance(slot.module, nn.Linear) and name.removesuffix(".weight") not in kept
    }


def _kept_dense(plan: MergePlan) -> list[str]:
    """Module names that stay 16-bit: the head, which is often the embedding, and decides the most."""
    head = plan.model.get_output_embeddings()
    module = None if head is None else base_layer_of(head)
    return [
        name.removesuffix(".weight")
        for name, slot in plan.slots.items()
        if slot.module is module and slot.kind == "weight"
    ]


def _kl(
    plan: MergePlan, dense: dict[str, torch.Tensor], changed: dict[str, torch.Tensor], rows: torch.Tensor | None
) -> float:
    """Mean KL(16-bit || 4-bit) over all positions, in nats; both models made of the tensors that were written."""
    config = copy.deepcopy(plan.model.config)
    config.tie_word_embeddings = plan.tied
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        judge: Any = stock_class(plan.model)(config)
    if rows is None:
        generator = torch.Generator().manual_seed(0)
        length = min(SYNTHETIC_LENGTH, config.get_text_config().max_position_embeddings)
        rows = torch.randint(config.get_text_config().vocab_size, (SYNTHETIC_ROWS, length), generator=generator)
    judge.load_state_dict(dense, strict=False, assign=True)
    judge.tie_weights()
    judge.eval()
    before = [scores.clone() for scores in _log_probabilities(judge, rows)]
    judge.load_state_dict(changed, strict=False, assign=True)
    pairs = zip(before, _log_probabilities(judge, rows), strict=True)
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())


def _log_probabilities(model: Any, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """(T, V) fp32 for each row."""
    for row in rows.cpu():
        yield F.log_softmax(model(input_ids=row[None], use_cache=False).logits[0].float(), dim=-1)
