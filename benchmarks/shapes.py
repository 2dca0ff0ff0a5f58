"""The real shapes that are measured, as transformers configs, and random-weight checkpoints of them on disk."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hasten.testing import tiny_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "llama-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "max_position_embeddings": 131072,
    },
    "gemma-2b": {
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
    },
    "command-r-slice": {
        "model_type": "cohere", "vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528,
        "num_hidden_layers": 6, "num_attention_heads": 64, "num_key_value_heads": 64, "logit_scale": 0.0625,
        "use_qk_norm": False,
    },
}  # fmt: skip


def config_of(name: str) -> Any:
    shape = dict(SHAPES[name])
    return AutoConfig.for_model(shape.pop("model_type"), **shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def checkpoint(name: str, folder: Path) -> Path:
    """Writes a bf16 checkpoint with random weights once, drawn on the GPU, and returns its folder."""
    target = folder / name
    if (target / "config.json").exists():
        return target
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size="4GB")
    tiny_tokenizer().save_pretrained(target)
    del model
    torch.cuda.empty_cache()
    return target
