"""Writes the adapter alone, as PEFT does, with the base's name and revision."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from hasten.errors import ExportError
from hasten.export.active import peft_model_of
from hasten.export.base import find_base
from hasten.export.folder import new_folder
from hasten.export.shards import write_safetensors
from hasten.state import causal_lm_of


def write_adapter(model: Any, target: Path, tokenizer: Any) -> int:
    """Writes adapter_model.safetensors and adapter_config.json, and returns the bytes of the weights.

    Raises ExportError if the model has no adapter or several active ones (a folder holds one).
    """
    model = peft_model_of(model)
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    if len(active) != 1:
        found = f"{len(active)} active adapters ({', '.join(active)})" if active else "no adapter"
        raise ExportError(f'save_method="lora" writes one adapter, and this model has {found}; activate one of them')
    config = copy.deepcopy(model.peft_config[active[0]])
    causal_lm = causal_lm_of(model)
    origin = causal_lm.config._name_or_path
    config.base_model_name_or_path = os.path.abspath(origin) if os.path.isdir(origin) else origin
    config.revision = getattr(causal_lm.config, "_commit_hash", None) or config.revision
    config.inference_mode = True
    tensors = get_peft_model_state_dict(model, adapter_name=active[0], save_embedding_layers=_grown(causal_lm))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_folder(target, size, "lora") as work:
        write_safetensors(work / "adapter_model.safetensors", tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        config.save_pretrained(str(work))
    return size


def _grown(causal_lm: Any) -> bool:
    """Returns whether the vocabulary was resized after loading, so that the adapter must contain the embedding.

    A fully trained embedding is in the adapter anyway, as `modules_to_save`.
    """
    embedding = causal_lm.get_input_embeddings()
    base = find_base(causal_lm)
    if base is None or hasattr(embedding, "modules_to_save"):
        return False
    rows = base.config.get("vocab_size")
    weight: torch.Tensor = embedding.weight
    return rows is not None and rows != len(weight)
