"""A tiny model of any causal-LM `model_type` that transformers knows, from its default config with sizes made small."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hasten.testing.tiny import VOCABULARY

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LARGEST = 40_000_000

SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "n_inner": 128,
    "d_ff": 128,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_sequence_length": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "sliding_window": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "image_size": 32,
    "patch_size": 16,
    "embedding_size": 64,
    "decoder_start_token_id": 1,
    "ffn_hidden_size": 128,
    "attention_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "aux_loss_coef": 0.5,
    "final_logit_softcapping": 3.0,
    "logits_scaling": 2.0,
    "logit_scale": 0.25,
    "lm_head_multiplier": 2.0,
    "residual_dropout": 0.1,
    "attention_dropout": 0.1,
}
"""Fields that configs name sizes by, and values of others that change the output. Fields that a config lacks, or that are
None by default, are left out."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": {"head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 8, "num_key_value_heads": 4},
    "longcat_flash": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "num_layers": 2,
    },
    "youtu": {"head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v32": {"head_dim": 8, "num_key_value_heads": 4},
    "glm4_moe_lite": {"head_dim": 8, "num_key_value_heads": 4},
    "glm_moe_dsa": {"head_dim": 8, "num_key_value_heads": 4},
    "minicpm3": {"head_dim": 8, "num_key_value_heads": 4},
    "axk2": {"head_dim": 8, "num_key_value_heads": 4},
    "dots3_note": {
        "text_config": {
            "num_key_value_heads": 4,
            "shared_experts_intermediate_size": 32,
            "layer_types": ["indexed_attention", "sliding_attention"],
            "num_hidden_layers": 2,
        }
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "shared_experts_intermediate_size": 32,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "num_hidden_layers": 2,
    },
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [8, 16],
        "attention_head_size": 16,
        "feed_forward_size": 128,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
        "num_hidden_layers": 2,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 2, "chunk_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "bamba": {
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_chunk_size": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_group": 1,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 288,
        "intermediate_size": [128, 128, 128, 128],
        "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 288,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 16,
    },
    "xlm": {"n_words": 288, "emb_dim": 64},
    "cpmant": {"prompt_types": 4, "prompt_length": 4, "segment_types": 4, "dim_head": 16, "dim_ff": 128},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 512,
        "split_ngram_parts": 4,
        "heads_per_ngram": 2,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "adapter_rank": 8,
        "mamba_headdim": 16,
        "chunk_size": 8,
    },
    "bailing_hybrid": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "layer_group_size": 2,
        "num_experts_per_token": 2,
        "num_expert_group": 2,
        "topk_group": 1,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "first_k_dense_replace": 1,
    },
    "kimi_linear": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "num_experts_per_token": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "xlstm": {
        "embedding_dim": 64,
        "num_blocks": 2,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "chunk_size": 4,
        "mode": "train",
        "return_last_states": False,
        "chunkwise_kernel": "chunkwise--native_autograd",
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_dt_rank": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32},
    },
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_chunk_size": 8,
        "mamba_d_state": 8,
    },
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "cross_attn_k": 1,
        "patcher_config": {"hidden_size": 64, "num_key_value_heads": 4},
        "encoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
        "decoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
        "global_config": {"num_key_value_heads": 4},
    },
    "gemma4": {
        "text_config": {
            "vocab_size_per_layer_input": 288,
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "global_head_dim": 16,
        }
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 8,
            "ple_embed_dim": 32,
            "ngram_vocab_size_base": 512,
            "split_ngram_parts": 4,
            "heads_per_ngram": 2,
        }
    },
    "diffllama": {"attention_dropout": 0.0},
}
"""Fields by `model_type` where small sizes alone do not fit together; a dict is for the nested config of that name."""


FOREIGN_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError),
)
"""What transformers, PEFT and torch raise where a tiny model cannot be made or run."""


class NotBuildable(Exception):
    """transformers makes no tiny model of this type, for the reason that the message gives."""


def tiny_config_of(model_type: str) -> PreTrainedConfig:
    """The type's default config with small sizes. Raises what the config's own checks raise."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_shrunk(kind(), OVERRIDES.get(model_type, {})))


def _shrunk(config: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make this config small, nested ones as dicts."""
    present = config.__dict__
    special = {name: SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {**{name: value for name, value in SIZES.items() if present.get(name) is not None}, **special}
    for name, value in present.items():
        if isinstance(value, PreTrainedConfig):
            nested = changes.get(name, {})
            sizes[name] = _shrunk(value, nested) if isinstance(nested, dict) else nested
    return {**sizes, **{name: value for name, value in changes.items() if not isinstance(sizes.get(name), dict)}}


def tiny_model_of(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A stock model of random fp32 weights, norms included, in evaluation mode. Raises NotBuildable."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        config = tiny_config_of(model_type)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if parameters > LARGEST:
            raise NotBuildable(f"{parameters:,} parameters with the smallest sizes")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (*FOREIGN_ERRORS, StrictDataclassError) as error:
        raise NotBuildable(f"{type(error).__name__}: {' '.join(str(error).split())[:80]}") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.get_output_embeddings().weight.mul_(8.0)
    torch.random.set_rng_state(state)
    return model.eval()


assert SIZES["vocab_size"] == VOCABULARY
