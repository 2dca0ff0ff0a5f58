"""Checks arguments against the checkpoint's config, its model class and its tokenizer."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hasten.errors import HastenError, OptionError, TokenizerError
from hasten.families.schema import Family
from hasten.json_file import shown
from hasten.loading import config_file
from hasten.loading.config_rules import config_problems as config_problems_of
from hasten.loading.resolve import Source
from hasten.loading.shards import StoredTensor
from hasten.options import HUB_ARGUMENTS, MODEL_ARGUMENTS, LoadOptions, unknown_extra
from hasten.weights import formats


class Findings:
    """Every problem of a call so far. `refuse` raises them as one error."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        self.errors: list[HastenError] = []

    def add(self, error: HastenError) -> None:
        """Adds a problem of the checkpoint or tokenizer. If it stays the only one, this error itself is raised."""
        self.errors.append(error)

    def refuse(self) -> None:
        """Raises all problems: a single checkpoint or tokenizer error itself, anything else as one OptionError."""
        if not self.problems and len(self.errors) == 1:
            raise self.errors[0]
        if self.problems or self.errors:
            raise OptionError("from_pretrained", [*self.problems, *map(str, self.errors)])


def config_fields(options: LoadOptions) -> dict[str, Any]:
    """Returns the keyword arguments that name fields of the config, without low_cpu_mem_usage, which is always on
    here."""
    known = HUB_ARGUMENTS | MODEL_ARGUMENTS | {"low_cpu_mem_usage", *formats.load_arguments()}
    return {name: value for name, value in options.extra.items() if name not in known}


def read_config(source: Source, options: LoadOptions, stored: Mapping[str, StoredTensor]) -> Any:
    """Returns the checkpoint's config, or the caller's own. Raises CheckpointError where it cannot be read.

    stored: the checkpoint's tensors, empty where they are not here yet.
    """
    own = options.extra.get("config")
    if own is not None:
        return copy.deepcopy(own)
    return config_file.read_config(source.folder, stored, bool(options.trust_remote_code))


def set_fields(config: Any, options: LoadOptions) -> list[str]:
    """Sets the config fields among the caller's keyword arguments; returns the problems with unknown names and with values that
    cannot be right, which are not set: the model is built with the checkpoint's, so that all other problems are found too."""
    known = set(config.to_dict()) | set(config.get_text_config().to_dict()) | set(config.attribute_map)
    found = [*unknown_extra(options, known), *config_problems_of(config_fields(options), {})]
    for name, value in config_fields(options).items():
        if name in known and not config_problems_of({name: value}, {}):
            holder = config if name in config.to_dict() or name in config.attribute_map else config.get_text_config()
            setattr(holder, name, value)
    return found


def build_empty(config: Any, options: LoadOptions, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model without weights (meta device). Raises CheckpointError or OptionError where transformers has no
    class."""
    attention = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=options.trust_remote_code, **attention
            )
    except Exception as error:  # whichever line of the model's class stumbles over a value of the config
        asked = f"attn_implementation={options.attn_implementation!r}, " if attention else ""
        why = (
            f"{asked}model type {shown(config.model_type)!r}: transformers cannot build the model that its "
            f"config.json describes ({type(error).__name__}: {shown(error)})"
        )
        raise OptionError("from_pretrained", [why]) from error


def config_problems(config: Any, family: Family | None, options: LoadOptions) -> list[str]:
    """Returns the problems of arguments that do not fit this checkpoint."""
    found = []
    expected = options.expected_model_type
    if expected is not None and config.model_type != expected:
        found.append(
            f"this class loads {expected!r} models, the checkpoint is a {config.model_type!r}; use FastLanguageModel"
        )
    if options.revision is not None and Path(options.model_name).expanduser().is_dir():
        found.append(
            f"revision={options.revision!r} names a commit of a hub repository, {options.model_name!r} is a local folder; "
            "leave it out"
        )
    if options.dtype == torch.float16 and family is not None and not family.fp16_safe:
        found.append(f"dtype=torch.float16: activations of {config.model_type} overflow fp16; use bfloat16 or float32")
    if options.offload_embedding and getattr(config.get_text_config(), "tie_word_embeddings", False):
        found.append("offload_embedding: the embedding is tied to the head, whose weight the GPU needs; leave it out")
    if softcapped(config, family) and options.attn_implementation == "sdpa":
        found.append("attn_implementation='sdpa' ignores this model's softcap on scores; use 'eager', or leave it out")
    return found


def softcapped(config: Any, family: Family | None) -> bool:
    """Returns whether scores are softcapped, which torch's fused attention cannot do (older transformers drop it
    silently)."""
    field = family.attention.softcap if family is not None else None
    return field is not None and getattr(config, field) is not None


def vocabulary_error(
    needed: int, tokenizer: PreTrainedTokenizerBase, rows: int, options: LoadOptions
) -> HastenError | None:
    """Returns an error if the tokenizer needs more embedding rows than the model has. needed: rows for every id of the
    tokenizer, after its fixes; rows: the model's."""
    asked, base = options.resize_model_vocab, tokenizer.vocab_size
    if asked is not None and asked < needed:
        return OptionError(
            "from_pretrained",
            [
                f"resize_model_vocab={asked} is smaller than the tokenizer, which needs {needed} rows; pass {needed} or more"
            ],
        )
    if asked is not None or needed <= rows:
        return None
    if needed > len(tokenizer) + 1:  # one for a new pad token
        return TokenizerError(
            f"The tokenizer has {len(tokenizer)} tokens, and ids up to {needed - 1}: an id in its files is wrong. Use the "
            f"model's own tokenizer, or pass resize_model_vocab={needed} to give the model rows for ids without a token"
        )
    if options.fix_tokenizer and base <= rows:
        return None
    return TokenizerError(
        f"The tokenizer needs {needed} embedding rows, the model has {rows}: it belongs to another model, or tokens were "
        f"added to it. Use the model's own tokenizer, or pass resize_model_vocab={needed}"
    )
