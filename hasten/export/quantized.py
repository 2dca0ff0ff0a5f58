"""Writes the merged model requantised into a storage format, and measures how far that moves its predictions."""

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn import functional as F

from hasten.errors import ExportError, MissingExtraError
from hasten.export.folder import new_folder
from hasten.export.merged import MergePlan, config_of, report_sources, write_beside
from hasten.export.request import ExportRequest
from hasten.export.shards import ShardWriter, require_finite, write_json
from hasten.patching.contract import stock_class
from hasten.weights import base_layer_of
from hasten.weights.formats import WeightFormat

SLACK = 1.15
"""Factor on the bytes of codes and scales, for everything else that a format stores."""
SYNTHETIC_SEQUENCES, SYNTHETIC_LENGTH = 4, 64


def check_package(into: WeightFormat) -> None:
    """Raises MissingExtraError where the format's package is not installed."""
    if into.package is not None and importlib.util.find_spec(into.package) is None:
        raise MissingExtraError(f'save_method="{into.save_method}"', into.package, into.extra or into.package)


def check_layout(plan: MergePlan) -> None:
    """Raises ExportError for a model whose tensors are stored in another layout than it runs them in."""
    if plan.converted:
        raise ExportError(f"{type(plan.model).__name__} stores its tensors in another layout; save it as merged_16bit")


def write_quantized(plan: MergePlan, into: WeightFormat, request: ExportRequest) -> tuple[int, float]:
    """Writes the folder and returns (bytes of the weights, mean KL divergence from the 16-bit merge in nats per
    token)."""
    kept = _kept_dense(plan)
    linears = _quantizable(plan, kept)
    config = config_of(plan)
    config["quantization_config"] = into.export_config(getattr(torch, config["dtype"]), kept)
    dense: dict[str, torch.Tensor] = {}
    changed: dict[str, torch.Tensor] = {}
    needed = sum(_bytes_of(plan, into, name, slot, slot in linears) for name, slot in plan.entries)
    with new_folder(request.target, needed, request.method) as work:
        writer = ShardWriter(work, request.max_bytes)
        for name, slot, tensor in plan.tensors():
            if slot is not None:
                dense[slot] = tensor
            if slot is None or slot not in linears:
                writer.add(name, tensor)
                continue
            require_finite({name: tensor})
            stored = into.quantize(tensor)
            for suffix, part in stored.tensors.items():
                writer.add(f"{name}{suffix}", part)
            changed[slot] = stored.dense
        writer.finish()
        write_beside(plan, work, request.tokenizer)
        kl = _kl(plan, dense, changed, request.rows)
        write_json(work / "config.json", config)
    report_sources(plan)
    return writer.total_bytes, kl


def _bytes_of(plan: MergePlan, into: WeightFormat, name: str, slot: str | None, quantized: bool) -> int:
    if slot is None or not quantized:
        return plan.bytes_of(name, slot)
    linear: Any = plan.slots[slot].module
    itemsize = plan.bytes_of(name, slot) // plan.slots[slot].elements
    return int(SLACK * into.bytes_for(linear.out_features, linear.in_features, itemsize))


def _quantizable(plan: MergePlan, kept_dense: list[str]) -> set[str]:
    """Returns the slots of the weights that a loader will expect quantised: every Linear except the head."""
    return {
        name
        for name, slot in plan.slots.items()
        if slot.kind == "weight"
        and isinstance(slot.module, nn.Linear)
        and name.removesuffix(".weight") not in kept_dense
    }


def _kept_dense(plan: MergePlan) -> list[str]:
    """Returns the module names that stay 16-bit: the head, which is often tied to the embedding, and matters most for
    accuracy."""
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
    """Computes the mean KL(16-bit || quantised) over all positions, in nats, of two models made of the written
    tensors."""
    config = copy.deepcopy(plan.model.config)
    config.tie_word_embeddings = plan.tied
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model: Any = stock_class(plan.model)(config)
    if rows is None:
        generator = torch.Generator().manual_seed(0)
        length = min(SYNTHETIC_LENGTH, config.get_text_config().max_position_embeddings)
        shape = (SYNTHETIC_SEQUENCES, length)
        rows = torch.randint(config.get_text_config().vocab_size, shape, generator=generator)
    model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()
    model.eval()
    before = [scores.clone() for scores in _log_probabilities(model, rows)]
    model.load_state_dict(changed, strict=False, assign=True)
    pairs = zip(before, _log_probabilities(model, rows), strict=True)
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())


def _log_probabilities(model: Any, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields (T, V) fp32 for each sequence."""
    for row in rows.cpu():
        yield F.log_softmax(model(input_ids=row[None], use_cache=False).logits[0].float(), dim=-1)
