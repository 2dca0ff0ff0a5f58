"""Decides whether the decode engine serves a call of `generate`."""

from collections.abc import Collection
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn
from transformers.generation import GenerationMixin, MaxLengthCriteria
from transformers.integrations.fsdp import is_fsdp_managed_module

from hasten.errors import OptionError
from hasten.inference.decode.fingerprint import modules_of
from hasten.inference.decode.prefix import unserved_cache
from hasten.inference.generate import asked
from hasten.options.engine import FP8_CAPABILITY
from hasten.overlays import AttentionOverlay, BackboneOverlay, HeadOverlay
from hasten.overlays.base import runs_overlay
from hasten.overlays.cache_name import CACHE
from hasten.state import GenerateCall
from hasten.weights import hooks_on_every_module, needs_own_forward

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on how long the sequence is."""
MODES = {
    "num_beams": 1,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "is_assistant": False,
    "use_mtp": False,
    "penalty_alpha": None,
    "dola_layers": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "cache_implementation": "dynamic",
    "prefill_chunk_size": None,
    "constraints": None,
    "force_words_ids": None,
    "token_healing": False,
}
"""Generation parameters -> the value that the engine serves (None, False and 1 count as not asked for)."""
ARGUMENTS = frozenset(
    {
        "inputs",
        "input_ids",
        "attention_mask",
        "generation_config",
        "logits_processor",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "streamer",
        "tokenizer",
        CACHE,
    }
)
"""Arguments of `generate` that the engine serves, besides generation parameters."""
QUANTISED = {"hasten-int8": torch.int8, "hasten-fp8": torch.float8_e4m3fn}
"""Backends of `cache_implementation="quantized"` that the engine serves -> the dtype of its cache."""
PACKAGES = ("torch", "transformers", "peft", "hasten", "bitsandbytes")
"""Whose modules are captured: in a graph, Python code of a forward runs once."""
PREPARED = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


def unserved(model: Any, call: GenerateCall, devices: Collection[str], split: bool = False) -> str | None:
    """Returns why transformers' own loop must run, None if the engine serves the call. devices: kinds that it serves. split: whether it
    serves models on several of them."""
    if len(call.args) > 2:
        return "positional arguments beyond the prompt and the generation config were given"
    for name, value in call.kwargs.items():
        known = name in ARGUMENTS or name in vars(model.generation_config)
        if not known and value is not None and value is not False:
            return f"{name} was given"
    quantised = cache_dtype(model, call)
    is_fp8 = quantised is torch.float8_e4m3fn and model.device.type == "cuda"
    if is_fp8 and torch.cuda.get_device_capability(model.device) < FP8_CAPABILITY:
        return "its GPU has no FP8"
    for name, served in MODES.items():
        value = asked(model, call, name)
        if name == "cache_implementation" and quantised is not None:
            continue
        if value not in (None, False, served):
            return f"{name}={value!r} was asked for"
    if asked(model, call, "use_cache") is False:
        return "use_cache=False was asked for"
    if any(isinstance(one, MaxLengthCriteria) for one in call.kwargs.get("stopping_criteria") or ()):
        return "a MaxLengthCriteria was given"
    return unserved_model(model, devices, split) or _unserved_prefix(model, call)


def cache_dtype(model: Any, call: GenerateCall) -> torch.dtype | None:
    """Returns the dtype of the quantised cache that the call asks for by a backend of hasten, None without one. Raises
    OptionError for settings that the backend does not have."""
    config = asked(model, call, "cache_config") or {}
    backend = config.get("backend") if isinstance(config, dict) else None
    if asked(model, call, "cache_implementation") != "quantized" or backend not in QUANTISED:
        return None
    if others := sorted(set(config) - {"backend"}):
        raise OptionError(
            "generate", [f"cache_config={config!r}: backend {backend!r} has no {', '.join(others)}; leave it out"]
        )
    return QUANTISED[backend]


def unserved_model(model: Any, served: Collection[str], split: bool = False) -> str | None:
    """Returns why transformers' own loop must run in every call of this model as it is now, None where nothing does. served:
    kinds of devices. split: whether several of them are served."""
    if not isinstance(model, HeadOverlay) or not runs_overlay(model.model, BackboneOverlay):
        return "not every part of the model runs hasten's overlay"
    own = [
        name
        for name in PREPARED
        if name in vars(model) or getattr(type(model), name) is not getattr(GenerationMixin, name)
    ]
    if own:
        return f"the model has its own {own[0]}"
    if is_fsdp_managed_module(model) or hooks_on_every_module():
        return "FSDP manages the model" if is_fsdp_managed_module(model) else "hooks of all modules are registered"
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {
        str(one.get("rope_type", "default")) for one in (parameters, *parameters.values()) if isinstance(one, dict)
    }
    if not kinds <= set(ROPE_TYPES):
        return f"RoPE of type {', '.join(sorted(kinds - set(ROPE_TYPES)))} depends on the length"
    several, reason = _unserved_weights(model, served, split)
    return reason or _unserved_attention(model, several) or _unserved_module(model, several)


def _unserved_weights(model: Any, served: Collection[str], split: bool) -> tuple[bool, str | None]:
    """Returns whether the model is on several devices, and the reason."""
    devices, kinds = set(), set()
    for module in modules_of(model):
        for parameter in vars(module)["_parameters"].values():
            if parameter is not None:
                devices.add(parameter.device)
                kinds.add(type(parameter))
    several, reason = len(devices) > 1, None
    wrapped = sorted(kind.__name__ for kind in kinds if hasattr(kind, "__tensor_flatten__"))
    if several and not split:
        reason = f"the model is on {len(devices)} devices"
    elif any(device.type not in served for device in devices):
        reason = f"{'a part of ' if several else ''}the model is not on a GPU"
    elif wrapped:
        reason = f"weights are of type {wrapped[0]}"
    return several, reason


def _unserved_attention(model: Any, several: bool) -> str | None:
    shapes = set()
    for layer in model.model.layers:
        attention = layer.self_attn
        if not runs_overlay(attention, AttentionOverlay) or needs_own_forward(attention, moves_input=several):
            return "an attention does not run hasten's overlay"
        shapes.add((attention.k_proj.out_features, attention.v_proj.out_features, attention.head_dim))
    return "layers have keys of different shapes" if len(shapes) > 1 else None


def _unserved_module(model: Any, several: bool) -> str | None:
    """A graph runs the Python code of a forward once, so no code of the user may watch or replace one. several: of devices, between
    which accelerate's hooks move tensors."""
    known: set[type[nn.Module]] = set()
    for module in modules_of(model):
        kind, reason = type(module), None
        moves = several and _only_moves_tensors(vars(module).get("_hf_hook"))
        if _runs_more(module, module is model and not several, moves):
            reason = "has forward hooks or a forward of its own"
        elif kind not in known:
            known.add(kind)
            if any(package_of(one) not in PACKAGES for one in (kind.forward, kind.__call__)):
                reason = f"is a {kind.__name__}, a class of other code"
        if reason is not None:
            name = next(name for name, one in model.named_modules() if one is module)
            return f"{name or 'the model'} {reason}"
    return None


def package_of(code: Any) -> str:
    """Returns the name of the package that defines a function or a class, "" if it is unknown."""
    return (getattr(code, "__module__", None) or "").partition(".")[0]


def _only_moves_tensors(hook: Any) -> bool:
    return type(hook) is AlignDevicesHook and not hook.offload


def _runs_more(module: nn.Module, may_cast: bool, moves: bool) -> bool:
    """Returns whether a call of the module runs more than its class's forward. What trainers add does nothing here: hooks that ask
    for gradients of the embedding's output (activation checkpointing), hasten's counter of training tokens, and where `may_cast`,
    accelerate's mixed precision around the forward, which only casts. moves: the forward's hook only moves tensors between devices."""
    own = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
        if not all(_is_of_a_trainer(hook) for hook in hooks):
            return True
    if "forward" in own and not moves and not (may_cast and "_original_forward" in own):
        return True
    return "_call_impl" in own or own.get("_compiled_call_impl") is not None


def _is_of_a_trainer(hook: Any) -> bool:
    package = package_of(hook)
    asks_for_gradients = getattr(hook, "__name__", "").startswith("make_inputs_require_grad")
    return package == "hasten" or (package in ("transformers", "peft") and asks_for_gradients)


def _unserved_prefix(model: Any, call: GenerateCall) -> str | None:
    past = call.kwargs.get(CACHE)
    if past is None:
        return None
    ids = next(
        (v for v in (*call.args[:1], call.kwargs.get("inputs"), call.kwargs.get("input_ids")) if v is not None), None
    )
    mask = call.kwargs.get("attention_mask")
    if not isinstance(ids, torch.Tensor):
        return f"{CACHE} was given without a prompt"
    windows = [layer.self_attn.overlay_config.window for layer in model.model.layers]
    sequences = len(ids) * (asked(model, call, "num_return_sequences") or 1)
    if reason := unserved_cache(past, windows, sequences):
        return reason
    is_whole = mask is None or mask.shape == ids.shape
    if is_whole and ids.shape[1] <= int(past.get_seq_length()):
        return f"{CACHE} holds the whole prompt"
    padded_inside = mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any())
    return "there is padding between tokens" if padded_inside else None
