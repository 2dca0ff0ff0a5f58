"""Defines FastLanguageModel: load a model, add a LoRA, switch between training and inference. Orchestration only."""

import os
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hasten.errors import OptionError
from hasten.export.base import find_base
from hasten.inference import engine_of, for_inference
from hasten.loading import load
from hasten.loading.adapter import attach
from hasten.loading.embedding import exclude_from_ddp
from hasten.methods import CausalLMMethods, PeftMethods
from hasten.options import ALL_LINEAR, AdapterOptions, LoadOptions, none_if_left_out
from hasten.patching import apply, plan
from hasten.patching.apply import overlay_class
from hasten.state import causal_lm_of, state_of
from hasten.training import checkpointing, lora, tiling
from hasten.training.modes import for_training
from hasten.units import parse_bytes


class FastLanguageModel:
    """A loader of Hugging Face causal language models, with every overlay that applies."""

    model_type: ClassVar[str | None] = None

    @classmethod
    @none_if_left_out("load_in_4bit")
    def from_pretrained(  # noqa: PLR0913
        cls,
        model_name: str | os.PathLike[str] = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int = 2048,
        dtype: torch.dtype | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: Any = "sequential",
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        use_exact_model_name: bool = False,
        offload_embedding: bool = False,
        float32_mixed_precision: bool | None = None,
        fast_inference: bool = False,
        gpu_memory_utilization: float = 0.5,
        float8_kv_cache: bool = False,
        random_state: int = 3407,
        max_lora_rank: int = 64,
        disable_log_stats: bool = True,
        qat_scheme: Any = None,
        load_in_fp8: bool | str = False,
        unsloth_tiled_mlp: bool | int | str = False,
        **kwargs: Any,
    ) -> tuple[Any, PreTrainedTokenizerBase]:
        """Loads a model and its tokenizer from a folder or the hub; an adapter is loaded with its base model.

        Every argument takes effect or raises; docs/api.md says what each does. Returns a transformers model (a
        PeftModel where `model_name` is an adapter) and a tokenizer. Raises OptionError with every problem of the
        call, CheckpointError or TokenizerError, all before a weight is read, except for what the model's engine cannot do.
        """
        options = LoadOptions.from_call(
            model_name=model_name,
            max_seq_length=max_seq_length,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            load_in_16bit=load_in_16bit,
            full_finetuning=full_finetuning,
            token=token,
            device_map=device_map,
            rope_scaling=rope_scaling,
            fix_tokenizer=fix_tokenizer,
            trust_remote_code=trust_remote_code,
            use_gradient_checkpointing=use_gradient_checkpointing,
            resize_model_vocab=resize_model_vocab,
            revision=revision,
            use_exact_model_name=use_exact_model_name,
            offload_embedding=offload_embedding,
            float32_mixed_precision=float32_mixed_precision,
            fast_inference=fast_inference,
            gpu_memory_utilization=gpu_memory_utilization,
            float8_kv_cache=float8_kv_cache,
            random_state=random_state,
            max_lora_rank=max_lora_rank,
            disable_log_stats=disable_log_stats,
            qat_scheme=qat_scheme,
            load_in_fp8=load_in_fp8,
            unsloth_tiled_mlp=unsloth_tiled_mlp,
            expected_model_type=cls.model_type,
            extra=kwargs,
        )
        return cls._load(options)

    @classmethod
    def _load(cls, options: LoadOptions) -> tuple[Any, PreTrainedTokenizerBase]:
        loaded = load(options)
        model: Any = loaded.model
        planned = plan(model, max_seq_length=options.max_seq_length, attn_implementation=options.attn_implementation)
        apply(model, planned, methods=CausalLMMethods)
        state = state_of(model)
        state.notes = {"loading": loaded.notes, "tiled MLP": tiling.enable(model, options.unsloth_tiled_mlp)}
        state.load_options = options
        if loaded.adapter is not None:
            model = _with_peft_methods(attach(model, loaded.adapter, trainable=True), options)
        if problems := engine_of(model).check(causal_lm_of(model), options):
            raise OptionError("from_pretrained", problems)
        _enable_checkpointing(model, options.use_gradient_checkpointing, options.memory_budget)
        return model, loaded.tokenizer

    @classmethod
    def get_peft_model(  # noqa: PLR0913
        cls,
        model: PreTrainedModel,
        r: int = 16,
        target_modules: Any = ALL_LINEAR,
        lora_alpha: int = 16,
        lora_dropout: float = 0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        loftq_config: dict[str, Any] | None = None,
        modules_to_save: list[str] | None = None,
        layers_to_transform: Any = None,
        use_dora: bool = False,
        init_lora_weights: Any = True,
        qat_scheme: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Adds a trainable LoRA (Hu et al. 2021, arXiv:2106.09685) and returns a PEFT model.

        `kwargs`: any field of PEFT's LoraConfig. Called again with the same arguments it returns the model; with others
        it raises. Raises OptionError with every problem of the call before the model is touched.
        """
        options = AdapterOptions.from_call(
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            use_gradient_checkpointing=use_gradient_checkpointing,
            random_state=random_state,
            use_rslora=use_rslora,
            loftq_config=loftq_config,
            modules_to_save=modules_to_save,
            layers_to_transform=layers_to_transform,
            use_dora=use_dora,
            init_lora_weights=init_lora_weights,
            qat_scheme=qat_scheme,
            extra=kwargs,
        )
        options.validate()
        base = causal_lm_of(model)
        state = state_of(base)
        if base is not model and state.adapter_options == options:
            return model
        if problem := _adapter_problem(model, options):
            raise OptionError("get_peft_model", [problem])
        dense = find_base(base) if options.loftq_config else None
        peft_model = lora.build(base, options, dense.read if dense is not None else None)
        peft_model = _with_peft_methods(peft_model, state.load_options)
        state.adapter_options = options
        _enable_checkpointing(peft_model, options.use_gradient_checkpointing, options.memory_budget)
        return peft_model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Sets evaluation mode, KV caches on, activation checkpointing off. Returns the model."""
        return for_inference(model)

    @staticmethod
    def for_training(model: Any) -> Any:
        """Sets training mode, with the checkpointing that was on before `for_inference`. Returns the model."""
        return for_training(model)


def _with_peft_methods(peft_model: Any, loaded: LoadOptions | None) -> Any:
    """Gives a PeftModel hasten's methods, and trained weights the dtype that was asked for."""
    peft_model.__class__ = overlay_class(type(peft_model), PeftMethods, None)
    wants_fp32 = loaded is None or loaded.float32_mixed_precision is not False
    state_of(peft_model).trained_dtypes = lora.set_dtypes(peft_model, wants_fp32)
    exclude_from_ddp(peft_model)
    peft_model.train()
    return peft_model


def _enable_checkpointing(model: Any, mode: bool | str, budget: int | str | None) -> None:
    """Sets activation checkpointing and replaces its note in the report.

    The memory budget given at loading also holds for the adapter, unless `get_peft_model` got its own.
    """
    state = state_of(model)
    loaded = state.load_options
    asked = loaded.memory_budget if budget is None and loaded is not None else budget
    notes = checkpointing.enable(model, mode, None if asked is None else parse_bytes(asked))
    state.notes["checkpointing"] = [f"checkpointing: {note}" for note in notes]


def _adapter_problem(model: Any, options: AdapterOptions) -> str | None:
    """Returns why this model cannot get this adapter, if so."""
    state = state_of(model)
    loaded = state.load_options
    if causal_lm_of(model) is not model:
        return _second_adapter(state.adapter_options, options)
    if loaded is not None and loaded.full_finetuning:
        return "the model was loaded with full_finetuning=True, so all its weights train; load it without full_finetuning to add a LoRA"
    if loaded is not None and loaded.offload_embedding and lora.trains_embedding(options):
        return "embed_tokens would train, and offload_embedding keeps it frozen in CPU memory; drop one of them"
    return None


def _second_adapter(present: AdapterOptions | None, asked: AdapterOptions) -> str:
    if present is None:
        return "the model already has an adapter (loaded with it, or made by PEFT); load the base model to add another"
    changed = [name for name in present.__dataclass_fields__ if getattr(present, name) != getattr(asked, name)]
    differences = ", ".join(f"{name}={getattr(present, name)!r}, now {getattr(asked, name)!r}" for name in changed)
    return f"the model already has an adapter made with other arguments ({differences}); load the base model again"


class FastLlamaModel(FastLanguageModel):
    model_type = "llama"


class FastMistralModel(FastLanguageModel):
    model_type = "mistral"


class FastQwen2Model(FastLanguageModel):
    model_type = "qwen2"


class FastQwen3Model(FastLanguageModel):
    model_type = "qwen3"


class FastGemmaModel(FastLanguageModel):
    model_type = "gemma"


class FastGemma2Model(FastLanguageModel):
    model_type = "gemma2"


class FastGemma3Model(FastLanguageModel):
    model_type = "gemma3_text"


class FastCohereModel(FastLanguageModel):
    model_type = "cohere"


class FastCohere2Model(FastLanguageModel):
    model_type = "cohere2"


class FastGraniteModel(FastLanguageModel):
    model_type = "granite"
