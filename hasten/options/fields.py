"""The arguments of `from_pretrained` and `get_peft_model`, their order and defaults. The checks are elsewhere, since
they import this file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoadFields:
    """Every argument of `from_pretrained`; docs/api.md says what each does.

    load_in_4bit: None = the default, which is on unless another weight format is asked for.
    expected_model_type: the family that a family-bound class loads. extra: keyword arguments for transformers'
    `from_pretrained`: `HUB_ARGUMENTS`, `MODEL_ARGUMENTS`, and fields of the checkpoint's config.
    """

    model_name: str = "unsloth/Llama-3.2-1B-Instruct"
    max_seq_length: int = 2048
    dtype: torch.dtype | None = None
    load_in_4bit: bool | None = None
    load_in_8bit: bool = False
    load_in_16bit: bool = False
    full_finetuning: bool = False
    token: str | bool | None = None
    device_map: Any = "sequential"
    rope_scaling: Mapping[str, Any] | None = None
    fix_tokenizer: bool = True
    trust_remote_code: bool = False
    use_gradient_checkpointing: bool | Literal["offload", "unsloth", "auto"] = "unsloth"
    resize_model_vocab: int | None = None
    revision: str | None = None
    use_exact_model_name: bool = False
    offload_embedding: bool = False
    float32_mixed_precision: bool | None = None
    fast_inference: bool = False
    gpu_memory_utilization: float = 0.5
    float8_kv_cache: bool = False
    random_state: int = 3407
    max_lora_rank: int = 64
    disable_log_stats: bool = True
    qat_scheme: Any = None
    load_in_fp8: bool | str = False
    unsloth_tiled_mlp: bool | int | str = False
    memory_budget: int | str | None = None
    attn_implementation: str | None = None
    use_safetensors: bool | None = None
    expected_model_type: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterFields:
    """Every argument of `get_peft_model`. extra: further fields of PEFT's LoraConfig."""

    r: int = 16
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    lora_alpha: int = 16
    lora_dropout: float = 0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_gradient_checkpointing: bool | Literal["offload", "unsloth", "auto"] = "unsloth"
    random_state: int = 3407
    use_rslora: bool = False
    loftq_config: Mapping[str, Any] | None = None
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: list[int] | int | None = None
    use_dora: bool = False
    init_lora_weights: bool | str = True
    qat_scheme: Any = None
    memory_budget: int | str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
