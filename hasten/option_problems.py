"""Rules over the arguments of `from_pretrained` and `get_peft_model`: each problem names what was asked and what to do."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeAlias

import torch

from hasten.units import parse_bytes

LoadOptions: TypeAlias = Any  # of hasten.options, which imports this file
AdapterOptions: TypeAlias = Any

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLACEMENTS = ("sequential", "auto", "balanced", "balanced_low_0")
PLANNED = ("unsloth", "auto")
CHECKPOINTING = (False, True, "offload", *PLANNED)
BIASES = ("none", "all", "lora_only")

# Arguments of transformers' from_pretrained that have no argument of ours.
HUB_ARGUMENTS = frozenset({"cache_dir", "force_download", "local_files_only", "subfolder"})
MODEL_ARGUMENTS = frozenset(
    {
        "config",
        "disable_mmap",
        "generation_config",
        "key_mapping",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "quantization_config",
        "variant",
    }
)
REFUSED_ARGUMENTS = {
    "torch_dtype": "call it dtype",
    "ignore_mismatched_sizes": "it leaves weights uninitialised; use resize_model_vocab for another vocabulary",
    "output_loading_info": "from_pretrained returns (model, tokenizer), and a checkpoint that does not fit raises",
    "state_dict": "save the tensors as a checkpoint folder and pass that",
    "gguf_file": "GGUF checkpoints cannot be trained; pass the safetensors checkpoint it was made from",
    "distributed_config": "start one process per GPU with torchrun; each takes its own GPU",
    "tp_plan": "start one process per GPU with torchrun; each takes its own GPU",
    "tp_size": "start one process per GPU with torchrun; each takes its own GPU",
    "adapter_kwargs": "pass the adapter's folder or id as model_name",
    "proxies": "huggingface_hub reads proxies from its own settings",
}


def load_problems(o: LoadOptions) -> list[str]:
    """Every reason why a `from_pretrained` call cannot be done that shows without the checkpoint's config."""
    return [*_value_problems(o), *_storage_problems(o), *_later_problems(o), *_extra_problems(o)]


def adapter_problems(o: AdapterOptions) -> list[str]:
    """Every reason why a `get_peft_model` call cannot be done that shows without the model."""
    found = [*_rank_problems(o), *_name_list_problems(o), *_checkpointing_problems(o)]
    if o.bias not in BIASES:
        found.append(f"bias={o.bias!r} is not one of {', '.join(BIASES)}{_near(o.bias, BIASES)}")
    if o.init_lora_weights == "loftq":
        found.append(
            'init_lora_weights="loftq" is what loftq_config={"loftq_bits": 4, "loftq_iter": 1} asks for; pass that'
        )
    if o.loftq_config and o.init_lora_weights is not True:
        found.append(
            f"loftq_config initialises by LoftQ, but init_lora_weights={o.init_lora_weights!r} asks for another "
            "way; leave one of them out"
        )
    if o.qat_scheme is not None:
        found.append(_later(f"qat_scheme={o.qat_scheme!r}", "leave it out"))
    if o.extra:
        # PEFT takes about a second to import, so only a call that needs its names pays for that.
        from peft import LoraConfig

        known = {f.name for f in dataclasses.fields(LoraConfig) if f.init}
        found += _unknown(o.extra, known | set(o.__dataclass_fields__), known, "a LoraConfig field")
    return found


def _near(name: Any, known: Iterable[Any]) -> str:
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _unknown(given: Iterable[str], suggest: Set[str], known: Set[str], kind: str) -> list[str]:
    return [
        f"{name!r} is neither an argument nor {kind}{_near(name, suggest) or '; leave it out'}"
        for name in given
        if name not in known
    ]


def unknown_extra(options: LoadOptions, config_fields: Iterable[str]) -> list[str]:
    """A problem for each keyword argument that is no argument of transformers' and no field of the config."""
    known = HUB_ARGUMENTS | MODEL_ARGUMENTS | REFUSED_ARGUMENTS.keys() | set(config_fields) | {"low_cpu_mem_usage"}
    return _unknown(options.extra, known | set(options.__dataclass_fields__), set(known), "a field of the config")


def _later(asked: str, instead: str) -> str:
    return f"{asked} comes in a later version of hasten and cannot be done yet; {instead}"


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def bad_values(o: LoadOptions) -> dict[str, str]:
    """{argument: problem} for each argument whose value means nothing by itself."""
    found = {}
    if not isinstance(o.model_name, str) or not o.model_name.strip():
        found["model_name"] = "is no hub id and no folder; pass one of them as a string"
    if not _is_whole(o.max_seq_length, 1):
        found["max_seq_length"] = "is no positive whole number; pass the longest row in tokens"
    if o.dtype is not None and o.dtype not in DTYPES:
        found["dtype"] = f"is not None, {', '.join(map(str, DTYPES))}; pass one of these"
    if o.resize_model_vocab is not None and not _is_whole(o.resize_model_vocab, 1):
        found["resize_model_vocab"] = "is no positive number of rows; pass one, or None"
    if not _is_whole(o.random_state, 0):
        found["random_state"] = "is no whole number from 0 on; pass one"
    if not isinstance(o.gpu_memory_utilization, int | float) or not 0 < o.gpu_memory_utilization <= 1:
        found["gpu_memory_utilization"] = "is no share of memory; pass one in (0, 1]"
    if not _is_whole(o.max_lora_rank, 1):
        found["max_lora_rank"] = "is no positive whole number; pass one"
    if o.rope_scaling is not None and not isinstance(o.rope_scaling, Mapping):
        found["rope_scaling"] = "is no dict; pass e.g. {'rope_type': 'linear', 'factor': 2.0}"
    if o.attn_implementation is not None and not isinstance(o.attn_implementation, str):
        found["attn_implementation"] = "is no name; pass e.g. 'sdpa', 'eager' or 'flash_attention_2'"
    if not (
        isinstance(o.unsloth_tiled_mlp, bool) or o.unsloth_tiled_mlp == "auto" or _is_whole(o.unsloth_tiled_mlp, 16)
    ):
        found["unsloth_tiled_mlp"] = "is neither False, True, 'auto' nor a whole number of rows from 16 on; pass one"
    texts = {name: f"{name}={getattr(o, name)!r} {problem}" for name, problem in found.items()}
    places = _device_problems(o.device_map)
    return {**texts, "device_map": "; ".join(places)} if places else texts


def _value_problems(o: LoadOptions) -> list[str]:
    return [*bad_values(o).values(), *_checkpointing_problems(o)]


def _device_problems(device_map: Any) -> list[str]:
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    known = ("disk",) if isinstance(device_map, Mapping) else PLACEMENTS
    found = []
    for device in devices:
        if device in known:
            continue
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError):
            found.append(f"device_map={device!r} is no device and not one of {', '.join(known)}{_near(device, known)}")
            continue
        count = torch.cuda.device_count()
        if place.type == "cuda" and (place.index or 0) >= count:
            found.append(f"device_map={device!r} is not there: this machine has {count} CUDA devices; use 'auto'")
    return found


def _storage_problems(o: LoadOptions) -> list[str]:
    asked = o.asked_storage
    found = []
    if len(asked) > 1:
        found.append(f"{', '.join(asked)} were asked for together; weights are held in one way, so keep one of them")
    quantised = [name for name in asked if name != "load_in_16bit"]
    if o.full_finetuning and quantised:
        found.append(f"full_finetuning trains all weights, {', '.join(quantised)} cannot be trained; drop one of them")
    if o.load_in_16bit and o.dtype == torch.float32:
        found.append("load_in_16bit and dtype=torch.float32 contradict each other; drop one of them")
    if o.full_finetuning and o.offload_embedding:
        found.append("offload_embedding keeps a frozen embedding on the host, full_finetuning trains it; drop one")
    return found


def _later_problems(o: LoadOptions) -> list[str]:
    later = {
        "load_in_fp8": "use load_in_4bit, load_in_8bit or load_in_16bit",
        "fast_inference": "leave it out; model.generate runs transformers' own decoding",
        "float8_kv_cache": "leave it out",
        "qat_scheme": "leave it out",
    }
    asked = [name for name in later if getattr(o, name) not in (False, None)]
    return [_later(f"{name}={getattr(o, name)!r}", later[name]) for name in asked]


def _checkpointing_problems(o: Any) -> list[str]:
    mode = o.use_gradient_checkpointing
    if not isinstance(mode, bool | str) or mode not in CHECKPOINTING:
        known = "False, True, 'offload', 'unsloth', 'auto'"
        return [f"use_gradient_checkpointing={mode!r} is none of {known}{_near(mode, CHECKPOINTING)}"]
    if o.memory_budget is None:
        return []
    try:
        parse_bytes(o.memory_budget)
    except ValueError as error:
        return [f"memory_budget: {error}"]
    if mode not in PLANNED:
        return [
            f"memory_budget is what use_gradient_checkpointing='auto' plans for, and {mode!r} was asked; leave one of them out"
        ]
    return []


def _extra_problems(o: LoadOptions) -> list[str]:
    found = [f"{name} is not taken: {REFUSED_ARGUMENTS[name]}" for name in o.extra if name in REFUSED_ARGUMENTS]
    if o.extra.get("low_cpu_mem_usage", True) is not True:
        found.append("low_cpu_mem_usage=False is not taken: weights are always read shard by shard; leave it out")
    return found


def _rank_problems(o: AdapterOptions) -> list[str]:
    found = []
    if not _is_whole(o.r, 1):
        found.append(f"r={o.r!r} is no rank; pass a positive whole number")
    if isinstance(o.lora_alpha, bool) or not isinstance(o.lora_alpha, int | float) or o.lora_alpha <= 0:
        found.append(f"lora_alpha={o.lora_alpha!r} is no positive number; pass e.g. r or 2 * r")
    if not isinstance(o.lora_dropout, int | float) or not 0 <= o.lora_dropout < 1:
        found.append(f"lora_dropout={o.lora_dropout!r} is no probability; pass one from 0 up to 1, 1 excluded")
    if not _is_whole(o.random_state, 0):
        found.append(f"random_state={o.random_state!r} is no whole number from 0 on; pass one")
    return found


def _name_list_problems(o: AdapterOptions) -> list[str]:
    found = []
    targets, saved, layers = o.target_modules, o.modules_to_save, o.layers_to_transform
    if not targets or not (isinstance(targets, str) or all(isinstance(name, str) for name in targets)):
        found.append(f"target_modules={targets!r} names no modules; pass names, a regular expression or 'all-linear'")
    if saved is not None and (isinstance(saved, str) or not all(isinstance(name, str) for name in saved)):
        found.append(f"modules_to_save={saved!r} is no list of names; pass e.g. ['lm_head']")
    numbers = [layers] if isinstance(layers, int) else layers or []
    if isinstance(numbers, str) or not all(_is_whole(number, 0) for number in numbers):
        found.append(f"layers_to_transform={layers!r} are no layer numbers; pass e.g. [0, 1, 2]")
    return found
