"""Checks an adapter against a base model that has not been loaded: from configs, headers and tokenizer files alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.errors import CheckpointError
from hasten.loading import adapter, checks
from hasten.loading.adapter_files import check_adapter_files
from hasten.loading.resolve import has_tokenizer, resolve
from hasten.loading.tokenizer import read_tokenizer
from hasten.options import LoadOptions


@dataclass(frozen=True)
class CheckedAdapter:
    """folder: on this machine. tokenizer: the adapter's own, whose vocabulary is the base's; None = it has none."""

    folder: Path
    tokenizer: Any


def preflight(folder_or_id: str, options: LoadOptions) -> CheckedAdapter:
    """Returns the adapter of a folder or hub repository once it fits the base that `options` name.

    Raises CheckpointError for missing, unexpected or misshapen tensors, for another vocabulary than the base's, and
    where the base is an adapter itself."""
    folder = adapter.fetch(folder_or_id, options.token, None)
    check_adapter_files(folder)
    base = resolve(options)
    if base.adapter is not None:
        raise CheckpointError(
            f"{folder_or_id} was given as an adapter for {options.model_name}, which is an adapter itself; pass its base, "
            f"{base.name}, as the model"
        )
    empty = checks.build_empty(checks.read_config(base, options, {}), options, torch.float32)
    adapter.check_fits(empty, folder)
    tokenizer = None
    if has_tokenizer(folder):
        tokenizer = read_tokenizer(folder, False)
        if tokenizer.get_vocab() != read_tokenizer(base.tokenizer, False).get_vocab():
            raise CheckpointError(
                f"the adapter in {folder} has a tokenizer with another vocabulary than {options.model_name}. Pass the adapter as the model: "
                "its base is then loaded with its tokenizer"
            )
    return CheckedAdapter(folder, tokenizer)
