"""Plans and writes the merged model as a checkpoint with the base's layout: tensors, their order, and the config."""

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.errors import ExportError
from hasten.export.active import listed, peft_models_around, unmergeable, unread
from hasten.export.base import BaseCheckpoint, disk_names_of, find_base, slots_of
from hasten.export.folder import new_folder
from hasten.export.merge import Merger
from hasten.export.shards import ShardWriter, write_json
from hasten.export.slots import Slot, collect, same_source
from hasten.state import causal_lm_of
from hasten.weights import active_adapters, base_layer_of
from hasten.weights.formats import is_quantized

log = logging.getLogger(__name__)


@dataclass
class MergePlan:
    """What will be written.

    entries: (name on disk, slot name, None for a tensor that is only copied), in order. tied: head and embedding are
    one tensor. base_names: {slot: its name in the base}. converted: names that the base stores in another layout.
    """

    model: Any
    base: BaseCheckpoint | None
    slots: dict[str, Slot]
    merger: Merger
    entries: list[tuple[str, str | None]] = field(default_factory=list)
    tied: bool = False
    base_names: dict[str, str] = field(default_factory=dict)
    converted: list[str] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[str, str | None, torch.Tensor]]:
        """Yields (name on disk, slot name, merged tensor on the CPU), one at a time."""
        for name, slot in self.entries:
            if slot is None:
                assert self.base is not None
                yield name, None, self.base.read(name)
            else:
                yield name, slot, self.merged(slot, name)

    def merged(self, slot: str, name: str) -> torch.Tensor:
        """Returns the tensor of one slot."""
        found = self.base_names.get(slot)
        base = self.base.read(found) if self.base is not None and found is not None else None
        return self.merger.merged(name, self.slots[slot], base)

    def bytes_of(self, name: str, slot: str | None) -> int:
        """Returns the size of one tensor as it will be written."""
        found = name if slot is None else self.base_names.get(slot)
        base = self.base.read(found) if self.base is not None and found is not None else None
        if slot is None:
            assert base is not None
            return base.numel() * base.element_size()
        width = self.merger.dtype or (base.dtype if base is not None else self.merger.live_dtype)
        return self.slots[slot].elements * width.itemsize


def plan_merge(model: nn.Module, dtype: torch.dtype | None) -> MergePlan:
    """Reads the model and finds its base; raises ExportError for anything that cannot be merged. The model is not changed.

    `dtype`: None = each tensor keeps the dtype that it has in the base checkpoint.
    """
    causal_lm = causal_lm_of(model)
    models = [model, *peft_models_around(model)]
    slots = collect(causal_lm, unmergeable(models))
    configs = getattr(model, "peft_config", {})
    if configs and not any(slot.layers for slot in slots.values()) and not _trained_copies(causal_lm):
        raise ExportError("no adapter is active, so there is none to merge; activate one with set_adapter")
    base = find_base(causal_lm)
    live_dtype = causal_lm.config.dtype if isinstance(causal_lm.config.dtype, torch.dtype) else causal_lm.dtype
    inits = [str(config.init_lora_weights) for config in configs.values() if hasattr(config, "init_lora_weights")]
    inits += ["loftq" for config in configs.values() if getattr(config, "loftq_config", None)]
    plan = MergePlan(causal_lm, base, slots, Merger([name.lower() for name in inits], dtype, live_dtype))
    if base is None:
        plan.entries = list(disk_names_of(causal_lm, slots).items())
        _warn_without_base(causal_lm, slots)
    else:
        _enter_base(plan, base)
    _tie(plan)
    _check_complete(plan, models)
    return plan


def write_model(plan: MergePlan, target: Path, max_bytes: int, method: str, tokenizer: Any) -> int:
    """Writes the plan as a checkpoint folder and returns the bytes of its weights. config.json comes last."""
    needed = sum(plan.bytes_of(name, slot) for name, slot in plan.entries)
    with new_folder(target, needed, method) as work:
        writer = ShardWriter(work, max_bytes)
        for name, _, tensor in plan.tensors():
            writer.add(name, tensor)
        writer.finish()
        write_beside(plan, work, tokenizer)
        write_json(work / "config.json", config_of(plan))
    report_sources(plan)
    return writer.total_bytes


def write_beside(plan: MergePlan, work: Path, tokenizer: Any) -> None:
    """Writes the tokenizer as given, and the model's generation config."""
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
    if getattr(plan.model, "generation_config", None) is not None:
        plan.model.generation_config.to_json_file(work / "generation_config.json")


def config_of(plan: MergePlan) -> dict[str, Any]:
    """Returns the config of the merged weights: dtype, vocabulary and tying as written, without the base's
    quantisation."""
    config = copy.deepcopy(plan.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.tie_word_embeddings = plan.tied
    config.architectures = [type(plan.model).__name__]
    config.dtype = str(_main_dtype(plan)).removeprefix("torch.")
    if plan.base is not None:  # trainers switch caches off for training; the merged model is for inference
        config.use_cache = plan.base.config.get("use_cache", True)
    return json.loads(config.to_json_string())


def report_sources(plan: MergePlan) -> None:
    """Logs which tensors differ from the base checkpoint and were therefore taken from the model, and warns where the
    adapter changed nothing."""
    if any(slot.changes for slot in plan.slots.values()) and not plan.merger.changed:
        log.warning(
            "the adapter changes no weight: its deltas are zero, as before training, or below the rounding of the dtype; "
            "the merged weights are the base's"
        )
    taken = sorted(plan.merger.from_live)
    if taken:
        log.info(
            "%d tensors were changed since loading and are taken from the model: %s", len(taken), ", ".join(taken[:8])
        )


def _main_dtype(plan: MergePlan) -> torch.dtype:
    """Returns the dtype of most matrices' elements as they are written."""
    if plan.merger.dtype is not None:
        return plan.merger.dtype
    counted: dict[torch.dtype, int] = {}
    for slot, name in plan.base_names.items():
        if slot in plan.slots and plan.base is not None:
            tensor = plan.base.read(name)
            if tensor.is_floating_point():
                counted[tensor.dtype] = counted.get(tensor.dtype, 0) + tensor.numel()
    return max(counted, key=lambda dtype: counted[dtype]) if counted else plan.merger.live_dtype


def _enter_base(plan: MergePlan, base: BaseCheckpoint) -> None:
    """Lists the base's tensors in their order, then those that only the model has."""
    found, plan.converted = slots_of(plan.model, base.names, plan.slots)
    plan.base_names = {slot: name for name, slot in found.items() if slot is not None}
    new = [slot for slot in plan.slots if slot not in plan.base_names]
    if plan.converted and any(plan.slots[slot].layers or plan.slots[slot].value.requires_grad for slot in new):
        raise ExportError(
            f"trained tensors of {type(plan.model).__name__} are stored in another layout ({', '.join(plan.converted[:3])}, ...); "
            "merge with PEFT's merge_and_unload() and save with transformers' save_pretrained()"
        )
    plan.entries = list(found.items()) + ([] if plan.converted else [(slot, slot) for slot in new])


def _tie(plan: MergePlan) -> None:
    """Decides whether head and embedding are still equal, and so are written once, or twice if not."""
    head, embedding = _head_and_embedding(plan)
    plan.tied = bool(getattr(plan.model.config, "tie_word_embeddings", False))
    if head is None or embedding is None or not plan.tied:
        return
    if head not in plan.base_names and embedding in plan.base_names:
        plan.base_names[head] = plan.base_names[embedding]
    one, other = plan.slots[embedding], plan.slots[head]
    plan.tied = same_source(one, other) or torch.equal(plan.merged(embedding, embedding), plan.merged(head, head))
    if plan.tied:
        plan.entries = [(name, slot) for name, slot in plan.entries if slot != head]
    else:
        log.warning("embedding and head differ after training, so the merged model has both and is no longer tied")


def _check_complete(plan: MergePlan, models: list[nn.Module]) -> None:
    """Compares what will be written with what is active and what trains; raises ExportError for anything left out."""
    written = {slot for _, slot in plan.entries}
    head = _head_and_embedding(plan)[0] if plan.tied else None
    missing = [name for name, slot in plan.slots.items() if slot.changes and name not in written and name != head]
    read = [slot.value for slot in plan.slots.values()]
    read += [parameter for slot in plan.slots.values() for layer in slot.layers for parameter in layer.parameters()]
    missing += unread(models, read)
    if missing:
        raise ExportError(
            f"{listed(missing)} would not be in the merged model, although trained or part of the active adapter; merge "
            "with PEFT's merge_and_unload() and save with transformers' save_pretrained()"
        )


def _head_and_embedding(plan: MergePlan) -> tuple[str | None, str | None]:
    """Returns the slot names of the head's and the input embedding's weights."""
    names = {id(slot.module): name for name, slot in plan.slots.items() if slot.kind == "weight"}
    found = []
    for module in (plan.model.get_output_embeddings(), plan.model.get_input_embeddings()):
        found.append(None if module is None else names.get(id(base_layer_of(module))))
    return found[0], found[1]


def _trained_copies(model: nn.Module) -> bool:
    wrappers = [module for module in model.modules() if hasattr(module, "modules_to_save")]
    return any(name in wrapper.modules_to_save for wrapper in wrappers for name in active_adapters(wrapper))  # pyright: ignore[reportOperatorIssue]


def _warn_without_base(model: Any, slots: dict[str, Slot]) -> None:
    origin = model.config._name_or_path or "(built in memory)"
    if any(is_quantized(slot.module) for slot in slots.values() if slot.kind == "weight"):
        log.warning(
            "the unquantised weights of %s cannot be read, so the adapter is merged into the dequantised weights, and the "
            "result has their quantisation error. Load from the 16-bit checkpoint for an exact merge",
            origin,
        )
    else:
        log.info("no base checkpoint of %s was found, so all tensors are taken from the model", origin)
