"""Decides whether the decode engine serves a call of `generate`, and what a captured graph depends on."""

from collections.abc import Collection
from typing import Any

from hasten.inference.generate import asked
from hasten.overlays import AttentionOverlay, BackboneOverlay, HeadOverlay
from hasten.overlays.base import runs_overlay
from hasten.state import GenerateCall
from hasten.weights.own_forward import needs_own_forward

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on how long the sequence is."""
MODES = {
    "num_beams": 1,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict_in_generate": False,
    "cache_implementation": None,
    "prefill_chunk_size": None,
    "constraints": None,
    "force_words_ids": None,
}
"""Generation parameters -> the value that the engine serves (None, False and 1 count as not asked for)."""
ARGUMENTS = (
    "past_key_values",
    "assistant_model",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_ids",
    "token_type_ids",
    "synced_gpus",
)
"""Arguments of `generate` that transformers' own loop serves."""


def unserved(model: Any, call: GenerateCall, devices: Collection[str]) -> str | None:
    """Returns why transformers' own loop must run, None if the engine serves the call. devices: kinds that it serves."""
    for name in ARGUMENTS:
        if call.kwargs.get(name) is not None:
            return f"{name} was given"
    if len(call.args) > 2:
        return "positional arguments beyond the prompt and the generation config were given"
    for name, served in MODES.items():
        value = asked(model, call, name)
        if value not in (None, False, served):
            return f"{name}={value!r} was asked for"
    if asked(model, call, "use_cache") is False:
        return "use_cache=False was asked for"
    return _unserved_model(model, devices)


def _unserved_model(model: Any, served: Collection[str]) -> str | None:
    if not isinstance(model, HeadOverlay) or not runs_overlay(model.model, BackboneOverlay):
        return "not every part of the model runs hasten's overlay"
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {
        str(one.get("rope_type", "default")) for one in (parameters, *parameters.values()) if isinstance(one, dict)
    }
    if not kinds <= set(ROPE_TYPES):
        return f"RoPE of type {', '.join(sorted(kinds - set(ROPE_TYPES)))} depends on the length"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model is on {len(devices)} devices"
    if devices and next(iter(devices)).type not in served:
        return "the model is not on a GPU"
    for layer in model.model.layers:
        attention = layer.self_attn
        if not runs_overlay(attention, AttentionOverlay) or needs_own_forward(attention):
            return "an attention does not run hasten's overlay"
    hooked = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    return f"{hooked[0] or 'the model'} has forward hooks" if hooked else None


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything that a captured step has baked in: addresses and layouts of the weights, the classes that run, the adapters
    that are active and their scales."""
    weights = tuple((p.data_ptr(), p.dtype, p.shape) for p in model.parameters())
    buffers = tuple(b.data_ptr() for b in model.buffers())
    adapters = tuple(
        (tuple(m.active_adapters), tuple(sorted(m.scaling.items())), m.disable_adapters, tuple(m.merged_adapters))
        for m in model.modules()
        if hasattr(m, "active_adapters") and hasattr(m, "scaling")
    )
    return weights, buffers, adapters, tuple(map(type, model.modules()))
