"""Checks everything that needs no weights, reads the weights, then applies what was planned (`load`)."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hasten.errors import CheckpointError, HastenError, OptionError
from hasten.loading import checks, quantization, shards
from hasten.loading import tokenizer as tokens
from hasten.loading.config_file import read_generation_config
from hasten.loading.device import default_dtype, is_all_cpu, resolve_device_map
from hasten.loading.embedding import keep_embedding_on_host
from hasten.loading.read import Reading, placement_notes, read_model
from hasten.loading.resolve import Source, fetch_weights, resolve
from hasten.loading.rope import plan_rope
from hasten.loading.vocabulary import resize, rows_of
from hasten.options import LoadOptions, bad_values
from hasten.patching import family_of


@dataclass(frozen=True)
class Loaded:
    """The result of `load`. model: stock transformers, with weights. notes: lines for the report. adapter: a folder
    still to be attached.

    source: what was loaded, with the commit of a hub id.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    notes: list[str]
    adapter: Path | None
    source: Source


@dataclass
class Preparation:
    """Everything that `load` plans before it reads a weight."""

    config: Any
    empty: PreTrainedModel
    dtype: torch.dtype
    device_map: Any
    storage: quantization.Storage
    tokenizer: PreTrainedTokenizerBase
    fixes: tokens.TokenizerPlan | None
    notes: list[str] = field(default_factory=list)

    @property
    def rows_needed(self) -> int:
        return self.fixes.rows_needed if self.fixes is not None else tokens.rows_needed(self.tokenizer)


def load(options: LoadOptions) -> Loaded:
    """Loads the model that `options` describe, or raises one error with every reason why not, before it reads a weight.

    Raises OptionError (several problems, or one with the arguments), CheckpointError, TokenizerError,
    MissingExtraError. Nothing here draws from the caller's random generators.
    """
    findings = checks.Findings(options.problems())
    if "model_name" in bad_values(options):
        findings.refuse()
    options = options.readable()
    try:
        source = resolve(options)
    except CheckpointError as error:
        findings.add(error)
        findings.refuse()
        raise
    stored, damage = _local_tensors(source, options)
    ready = _prepare(source, options, stored, findings)
    findings.refuse()
    assert ready is not None  # without problems every step has returned a result
    if options.attn_implementation is None and checks.softcapped(ready.config, family_of(ready.empty)):
        options = replace(options, attn_implementation="eager")
        ready.notes.append("attention: eager, which applies this model's softcap on scores")
    if damage is not None:
        raise damage
    fetch_weights(source, options)
    if options.use_safetensors is not False:
        stored = stored or shards.read_checkpoint(source.folder, options.extra.get("variant"))
        ready.notes += shards.check_tensors(stored, ready.empty, source.folder)
    place, how = ready.device_map, ready.storage
    model = read_model(Reading(source.folder, ready.config, ready.dtype, place, how, options, ready.empty, stored))
    notes = [*source.notes(), *ready.notes, *placement_notes(how, place), *_finish(model, ready, options)]
    for holder in (model, model.config, ready.tokenizer):
        # Otherwise adapters would record the snapshot's folder on this machine as their base.
        holder.name_or_path = source.name
    model.config._commit_hash = source.revision  # an export reads the same commit again, and an adapter records it
    return Loaded(model, ready.tokenizer, notes, source.adapter, source)


def _local_tensors(
    source: Source, options: LoadOptions
) -> tuple[dict[str, shards.StoredTensor], CheckpointError | None]:
    """Returns the headers of a local checkpoint, and the error where they cannot be read; ({}, None) for a hub id, whose
    weights are not here yet, and for pickle."""
    if source.revision is not None or options.use_safetensors is False:
        return {}, None
    try:
        return shards.read_checkpoint(source.folder, options.extra.get("variant")), None
    except CheckpointError as error:
        return {}, error


def _prepare(
    source: Source, options: LoadOptions, stored: dict[str, shards.StoredTensor], findings: checks.Findings
) -> Preparation | None:
    """Reads config and tokenizer and plans rope, dtype and tokenizer fixes; None where one of the two cannot be
    read."""
    config: Any = _try_step(findings, checks.read_config, source, options, stored)
    if config is None:
        return None
    tokenizer: Any = _try_step(findings, tokens.read_tokenizer, source.tokenizer, options.trust_remote_code)
    _try_step(findings, read_generation_config, source.folder)
    findings.problems += checks.set_fields(config, options)
    empty: Any = _try_step(findings, checks.build_empty, config, options, options.dtype or torch.float32)
    if empty is None and options.attn_implementation is not None:
        # an invalid name must not hide the other problems
        plain = replace(options, attn_implementation=None)
        empty = _try_step(findings, checks.build_empty, config, plain, options.dtype or torch.float32)
    if empty is None:
        return None
    family = family_of(empty)
    findings.problems += checks.config_problems(config, family, options)
    place, place_notes = resolve_device_map(options.device_map)
    on_cpu = is_all_cpu(place)
    findings.problems += quantization.stored_problems(config, empty, on_cpu, options)
    if missing := quantization.missing_package(options, config):
        findings.add(missing)
    rope = plan_rope(config.get_text_config(), family, options.rope_scaling, options.max_seq_length)
    findings.problems += rope.problems
    for name, value in rope.changes.items():
        setattr(config.get_text_config(), name, value)
    if tokenizer is None:
        return None
    fixes = _plan_tokenizer(tokenizer, empty, source, options)
    dtype, notes = _choose_dtype(options, family is None or family.fp16_safe)
    storage = quantization.plan_storage(config, empty, dtype, on_cpu, options)
    notes += [*storage.notes, *rope.notes, *place_notes, *_unused(options)]
    ready = Preparation(config, empty, dtype, place, storage, tokenizer, fixes, notes)
    error = checks.vocabulary_error(ready.rows_needed, tokenizer, rows_of(empty), options)
    if isinstance(error, OptionError):
        findings.problems += error.problems
    elif error is not None:
        findings.add(error)
    return ready


def _try_step(findings: checks.Findings, step: Any, *args: Any) -> Any:
    """Returns the step's result; on an error adds it to the findings and returns None."""
    try:
        return step(*args)
    except OptionError as error:
        findings.problems += error.problems
    except HastenError as error:
        findings.add(error)
    return None


def _choose_dtype(options: LoadOptions, fp16_safe: bool) -> tuple[torch.dtype, list[str]]:
    dtype = options.dtype if options.dtype is not None else default_dtype(fp16_safe, half=options.load_in_16bit)
    short = str(dtype).removeprefix("torch.")
    if options.full_finetuning and options.float32_mixed_precision and dtype != torch.float32:
        return torch.float32, [
            f"dtype: float32 weights for full fine-tuning (float32_mixed_precision); {short} for autocast"
        ]
    why = "as asked" if options.dtype is not None else "this device's default"
    return dtype, [f"dtype: {short}, {why}"]


def _plan_tokenizer(
    tokenizer: PreTrainedTokenizerBase, empty: PreTrainedModel, source: Source, options: LoadOptions
) -> tokens.TokenizerPlan | None:
    if not options.fix_tokenizer:
        return None
    config = empty.config.get_text_config()
    eos_ids = [*tokens.as_ids(config.eos_token_id), *tokens.generation_eos_ids(source.folder)]
    rows = max(rows_of(empty), options.resize_model_vocab or 0)
    pad_id = getattr(config, "pad_token_id", None)
    return tokens.plan_fixes(tokenizer, rows, eos_ids, pad_id, pad_may_grow=source.adapter is not None)


def _unused(options: LoadOptions) -> list[str]:
    """Returns a note on the arguments that have no effect in this call."""
    defaults = LoadOptions()
    engine = ("gpu_memory_utilization", "max_lora_rank", "disable_log_stats")
    given = [name for name in engine if getattr(options, name) != getattr(defaults, name)]
    return [f"{', '.join(given)}: settings of the vLLM engine, which is off (fast_inference=False)"] if given else []


def _finish(model: PreTrainedModel, ready: Preparation, options: LoadOptions) -> list[str]:
    """Applies tokenizer fixes, resizes the vocabulary, sets what trains, offloads the embedding. Returns notes."""
    notes: list[str] = []
    if ready.fixes is not None:
        tokens.apply_fixes(ready.tokenizer, ready.fixes)
        notes += [*ready.fixes.notes, *tokens.agree(ready.tokenizer, model)]
    old = rows_of(model)
    rows = options.resize_model_vocab or max(old, ready.rows_needed)
    if rows != old:
        resize(model, rows, options.random_state)
        new = ", new ones are the mean of the old" if rows > old else ""
        notes.append(f"vocabulary: {rows} rows{new}; the checkpoint has {old}")
    for parameter in model.parameters():
        # quantised codes are integers, which cannot have a gradient
        parameter.requires_grad_(options.full_finetuning and parameter.is_floating_point())
    if options.offload_embedding:
        notes.append(keep_embedding_on_host(model))
    return notes
