"""Reads config.json and generation_config.json: as JSON first, then through transformers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from hasten.errors import CheckpointError
from hasten.json_file import kind_of, read_object, shown
from hasten.loading.config_rules import Rule, between, config_problems, count, flag, positive, token_ids
from hasten.loading.foreign import parsing
from hasten.loading.shards import StoredTensor

CONFIG, GENERATION = "config.json", "generation_config.json"
SMALL = 4 * 2**20
"""The most bytes of a config file."""
UNBOUNDED = ("time_step_limit",)
"""Fields that published Mamba checkpoints set to infinity, as "no limit"."""

GENERATION_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), token_ids),
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams", "num_return_sequences"), count),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), between(0, math.inf)),
    **dict.fromkeys(("top_p", "min_p", "typical_p"), between(0, 1)),
    "temperature": between(0, math.inf),
    "repetition_penalty": positive,
    **dict.fromkeys(("do_sample", "use_cache"), flag),
}


def read_config(folder: Path, stored: Mapping[str, StoredTensor] | None = None, trust_remote_code: bool = False) -> Any:
    """Returns the config of the checkpoint in `folder`, without network access. Raises CheckpointError that names the
    fields which cannot be right.

    stored: the checkpoint's tensors, against which sizes are held; empty or None where they are not here yet.
    """
    path = folder / CONFIG
    raw = read_object(path, CheckpointError, SMALL, UNBOUNDED)
    if problems := config_problems(raw, stored or {}):
        raise CheckpointError(_listed(path, problems, "Use the config.json that belongs to these weights"))
    with parsing(f"The config.json in {folder}", CheckpointError, "Use the config.json of the original checkpoint"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Returns the checkpoint's generation config, None where it has no such file. Raises CheckpointError."""
    path = folder / GENERATION
    if not path.is_file():
        return None
    raw = read_object(path, CheckpointError, SMALL)
    problems = [
        f"{name}={shown(raw[name])} ({kind_of(raw[name])}): {problem}"
        for name, rule in GENERATION_RULES.items()
        if raw.get(name) is not None and (problem := rule(raw[name])) is not None
    ]
    if problems:
        raise CheckpointError(_listed(path, problems, "Correct it, or remove the file"))
    with parsing(f"The {GENERATION} in {folder}", CheckpointError, "Correct it, or remove the file"):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def _listed(path: Path, problems: list[str], instead: str, most: int = 20) -> str:
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    lines = "".join(f"\n  - {line}" for line in [*problems[:most], *more])
    return f"{path} has fields that cannot be right ({len(problems)}). {instead}.{lines}"
