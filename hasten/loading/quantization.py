"""How weights are held: what the checkpoint stores already, what is quantised while reading, and what must stay dense."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from hasten.errors import MissingExtraError
from hasten.options import LoadOptions

NF4_BLOCK = 64  # weights that share one scale, bitsandbytes' default


def stored_quantization(config: Any) -> str | None:
    """How the checkpoint's own weights are quantised: "nf4", "fp4", "int8", another method's name, None = not at all."""
    record = _record(config)
    if not record:
        return None
    method = str(record.get("quant_method", "unknown"))
    if method != "bitsandbytes":
        return method
    return "int8" if record.get("load_in_8bit") else str(record.get("bnb_4bit_quant_type", "nf4"))


def stored_problems(config: Any, empty: PreTrainedModel, on_cpu: bool, options: LoadOptions) -> list[str]:
    """Why a checkpoint that is stored quantised cannot be loaded as asked."""
    stored = stored_quantization(config)
    if stored is None:
        return []
    if stored == "fp8":
        return ["the checkpoint holds fp8 weights, which a later version of hasten reads; use its dense original"]
    fits = {"nf4": "load_in_4bit", "fp4": "load_in_4bit", "int8": "load_in_8bit"}.get(stored)
    other = [name for name in options.asked_storage if name != fits]
    if fits == "load_in_4bit" and options.load_in_4bit is False:
        other.append("load_in_4bit=False")
    if options.full_finetuning:
        other.append("full_finetuning")
    found = []
    if other:
        found.append(
            f"{', '.join(other)} was asked for, but the checkpoint is stored as {stored} already; leave it out to load it "
            "as it is, or pass the dense original"
        )
    skipped = set(_record(config).get("llm_int8_skip_modules") or [])
    wrong = [name for name in misread_on_cpu(empty) if name not in skipped]
    if on_cpu and fits == "load_in_4bit" and wrong:
        found.append(
            f"the checkpoint is stored as {stored}, and bitsandbytes misreads {len(wrong)} of its layers on a CPU (the "
            f"inputs of {wrong[0]} are no multiple of {NF4_BLOCK}); load it on a GPU, or pass the dense original"
        )
    return found


def _record(config: Any) -> Mapping[str, Any]:
    stored = getattr(config, "quantization_config", None) or {}
    return stored if isinstance(stored, Mapping) else stored.to_dict()


def misread_on_cpu(empty: PreTrainedModel) -> list[str]:
    """Linears whose rows are no whole number of NF4 blocks.

    bitsandbytes' CPU code starts each row at a new scale, though blocks run on across rows (seen in 0.50: relative error
    0.28 in place of 0.09, and a RuntimeError from the first forward in eval mode).
    """
    kept = get_keys_to_not_convert(empty)
    return [
        name
        for name, module in empty.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % NF4_BLOCK and name not in kept
    ]


def plan_quantization(
    config: Any, empty: PreTrainedModel, dtype: torch.dtype, on_cpu: bool, options: LoadOptions
) -> tuple[Any, list[str]]:
    """(what transformers needs to quantise while it reads, notes). None for dense weights and those stored quantised."""
    if options.quantization == "own":
        return options.extra["quantization_config"], ["quantisation: by the caller's quantization_config"]
    stored = stored_quantization(config)
    if stored is not None:
        return None, [f"quantisation: {stored}, as the checkpoint is stored"]
    if options.quantization == "none":
        return None, []
    if options.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True), ["quantisation: LLM.int8"]
    dense = misread_on_cpu(empty) if on_cpu else []
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*get_keys_to_not_convert(empty), *dense] if dense else None,
    )
    notes = ["quantisation: NF4 with double quantisation"]
    if dense:
        kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in dense}))
        notes.append(
            f"quantisation: {len(dense)} layers stay dense ({kinds}): their inputs are no multiple of {NF4_BLOCK}, which "
            "bitsandbytes misreads on a CPU"
        )
    return settings, notes


def need_bitsandbytes(options: LoadOptions, config: Any) -> MissingExtraError | None:
    """An error where quantised weights are wanted or found and bitsandbytes is not installed."""
    wanted = options.quantization in ("nf4", "int8") or stored_quantization(config) in ("nf4", "fp4", "int8")
    if not wanted or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return MissingExtraError("Holding weights in 4 or 8 bits (load_in_4bit is on by default)", "bitsandbytes", "train")
