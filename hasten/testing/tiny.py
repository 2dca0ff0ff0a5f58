"""Makes tiny models of every family, amplified so that a wrong factor or cast is visible, and a byte tokenizer for
them.

On a plain tiny random model a missing factor can shift logits by as little as 1e-7. So matrices are scaled up and
vectors get noise, until every field of the data file changes the output measurably.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL = [PAD, BOS, EOS, "<|user|>", "<|assistant|>", "<|end|>"]
VOCABULARY = 288

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8, "head_dim": 32},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"head_dim": 32, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "gemma": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 8,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {
        "head_dim": 32,
        "final_logit_softcapping": 4.0,
        "sliding_window": 8,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "cohere": {"use_qk_norm": True, "logit_scale": 0.25, "attention_bias": True},
    "cohere2": {
        "sliding_window": 8,
        "logit_scale": 0.25,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Returns a config of 4 layers with hidden size 64, and every field of the family at a value that changes the
    output."""
    return AutoConfig.for_model(model_type, **{**COMMON, **FAMILY_CONFIGS.get(model_type, {}), **changes})


def tiny_model(
    model_type: str, seed: int = 0, amplify: float = 8.0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Returns a stock transformers model from `tiny_config`, weights drawn from `seed`, matrices times `amplify`, in
    eval mode."""
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = tiny_config(model_type, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **_exact_attention(config, changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "norm" not in name:
                parameter.mul_(amplify)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    torch.random.set_rng_state(generator_state)
    return model.to(dtype).eval()


def _exact_attention(config: Any, changes: dict[str, Any]) -> dict[str, str]:
    """Selects eager attention for a softcap on scores: older transformers choose sdpa by default, which ignores it."""
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    chosen = changes.get("attn_implementation", "eager" if softcapped else None)
    return {"attn_implementation": chosen} if chosen is not None else {}


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer without merges: one id per byte after the special tokens; a BOS is added by
    post-processing."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    fast.chat_template = chat_template
    return fast


def save_tiny(folder: Path | str, model_type: str = "llama", max_shard_size: str = "5GB", **kwargs: Any) -> Path:
    """Writes a tiny checkpoint (config, safetensors, tokenizer, generation config) and returns its folder.

    `kwargs` go to `tiny_model`.
    """
    folder = Path(folder)
    tiny_model(model_type, **kwargs).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder
