"""FastLanguageModel: load, adapt, switch between training and inference. Orchestration only; the rooms do the work."""

from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hasten.errors import OptionError
from hasten.export.base import find_base
from hasten.inference import for_inference
from hasten.loading import load
from hasten.loading.adapter import attach
from hasten.loading.embedding import leave_out_of_ddp
from hasten.methods import CausalLMMethods, PeftMethods
from hasten.options import AdapterOptions, LoadOptions, none_if_left_out
from hasten.patching import apply, plan
from hasten.patching.apply import overlay_class
from hasten.state import causal_lm_of, state_of
from hasten.training import checkpointing, lora, tiling
from hasten.training.modes import for_training
from hasten.units import parse_bytes

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastLanguageModel:
    """Loads any causal language model of the Hugging Face ecosystem, with every overlay that applies to it."""

    model_type: ClassVar[str | None] = None

    @classmethod
    @none_if_left_out("load_in_4bit")
    def from_pretrained(  # noqa: PLR0913
        cls,
        model_name: str = "unsloth/Llama-3.2-1B-Instruct",
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
        """Loads a model and its tokenizer from a folder or the hub; from an adapter, its base with the adapter on it.

        Every argument takes effect or raises; docs/api.md says what each does. Returns a transformers model (a
        PeftModel where `model_name` holds an adapter) and a tokenizer. Raises OptionError with every problem of the
        call, CheckpointError or TokenizerError, all before a weight is read.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("cls", "kwargs")}
        options = LoadOptions.from_call(**arguments, expected_model_type=cls.model_type, extra=kwargs)
        loaded = load(options)
        model: Any = loaded.model
        planned = plan(model, max_seq_length=max_seq_length, attn_implementation=options.attn_implementation)
        apply(model, planned, methods=CausalLMMethods)
        state = state_of(model)
        state.notes = {"loading": loaded.notes, "tiled MLP": tiling.enable(model, unsloth_tiled_mlp)}
        state.load_options = options
        if loaded.adapter is not None:
            model = _wear_peft(attach(model, loaded.adapter, trainable=True), options)
        _note_checkpointing(model, use_gradient_checkpointing, options.memory_budget)
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
        arguments = {name: value for name, value in locals().items() if name not in ("cls", "model", "kwargs")}
        options = AdapterOptions.from_call(**arguments, extra=kwargs)
        options.validate()
        base = causal_lm_of(model)
        state = state_of(base)
        worn = state.adapter_options
        if base is not model:
            if worn == options:
                return model
            raise OptionError("get_peft_model", [_already(worn, options)])
        loaded = state.load_options
        if loaded is not None and loaded.full_finetuning:
            raise OptionError(
                "get_peft_model",
                [
                    "the model was loaded with full_finetuning=True, so all its weights train; load it without to add a LoRA"
                ],
            )
        if loaded is not None and loaded.offload_embedding and lora.trains_embedding(options):
            problem = "embed_tokens would train, and offload_embedding keeps it frozen on the host; drop one of them"
            raise OptionError("get_peft_model", [problem])
        dense = find_base(base) if options.loftq_config else None
        peft_model = _wear_peft(lora.build(base, options, dense.read if dense is not None else None), loaded)
        state.adapter_options = options
        _note_checkpointing(peft_model, use_gradient_checkpointing, options.memory_budget)
        return peft_model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Evaluation mode, caches on, checkpointing off. Returns the model."""
        return for_inference(model)

    @staticmethod
    def for_training(model: Any) -> Any:
        """Back to training after `for_inference`. Returns the model."""
        return for_training(model)


def _wear_peft(peft_model: Any, loaded: LoadOptions | None) -> Any:
    """Gives a PeftModel hasten's methods, and trained weights the dtype that was asked for."""
    peft_model.__class__ = overlay_class(type(peft_model), PeftMethods, None)
    wants_fp32 = loaded is None or loaded.float32_mixed_precision is not False
    state_of(peft_model).trained_dtypes = lora.set_dtypes(peft_model, wants_fp32)
    leave_out_of_ddp(peft_model)
    peft_model.train()
    return peft_model


def _note_checkpointing(model: Any, mode: bool | str, budget: int | str | None) -> None:
    """Switches checkpointing and records what that means in place of what was recorded before.

    A budget that was given when the model was loaded holds for its adapter too, unless that comes with its own.
    """
    state = state_of(model)
    loaded = state.load_options
    asked = loaded.memory_budget if budget is None and loaded is not None else budget
    said = checkpointing.enable(model, mode, None if asked is None else parse_bytes(asked))
    state.notes["checkpointing"] = [f"checkpointing: {note}" for note in said]


def _already(worn: AdapterOptions | None, asked: AdapterOptions) -> str:
    if worn is None:
        return "the model already has an adapter (loaded with it, or made by PEFT); load the base model to add another"
    changed = [name for name in worn.__dataclass_fields__ if getattr(worn, name) != getattr(asked, name)]
    differences = ", ".join(f"{name}={getattr(worn, name)!r}, now {getattr(asked, name)!r}" for name in changed)
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
