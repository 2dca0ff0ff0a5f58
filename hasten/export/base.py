"""Reads the base checkpoint of a model, tensor by tensor, and maps its tensor names to the model's."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from hasten.errors import ExportError
from hasten.json_file import read_object
from hasten.state import find_state

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class BaseCheckpoint:
    """Lazy view of a safetensors checkpoint. `names`: tensor names in the order of the files; `config`: its
    config.json."""

    def __init__(self, origin: str, config: dict[str, Any], files: dict[str, Path]) -> None:
        self.origin = origin
        self.config = config
        self._files = files
        self._open: tuple[Path, Any] | None = None

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> torch.Tensor:
        """Returns the tensor `name` on the CPU, in its own dtype; memory-mapped, so read only. Raises ExportError if
        damaged."""
        path = self._files[name]
        try:
            if self._open is None or self._open[0] != path:
                self._open = (path, safe_open(path, framework="pt"))
            return self._open[1].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{path}, a shard of the base model, cannot be read ({error}); fetch it again") from error


def find_base(model: Any) -> BaseCheckpoint | None:
    """Returns the dense checkpoint that the causal LM `model` was loaded from, or None where there is none to read.

    Uses `config._name_or_path` at the commit that was loaded; files come from the local cache, and from the hub if they
    are missing there. None for models built in memory, checkpoints that are themselves quantised, and moved folders.
    """
    state = find_state(model)
    options = None if state is None else state.load_options
    origin = model.config._name_or_path or getattr(options, "model_name", "")
    revision = getattr(model.config, "_commit_hash", None) or getattr(options, "revision", None)
    if not origin:
        return None
    extra = {name: value for name, value in getattr(options, "extra", {}).items() if name in ("subfolder", "cache_dir")}
    source = _Source(origin, {"revision": revision, "token": getattr(options, "token", None), **extra})
    config_path = source.find("config.json")
    if config_path is None:
        return None
    config = read_object(config_path, ExportError, unbounded=("time_step_limit",))
    files = _files(source)
    if config.get("quantization_config") is not None or not files:
        return None
    return BaseCheckpoint(origin, config, files)


class _Source:
    """A folder, or a hub repository at one revision."""

    def __init__(self, origin: str, where: dict[str, Any]) -> None:
        self.origin, self.where = origin, where

    def find(self, name: str) -> Path | None:
        if Path(self.origin).is_dir():
            found = Path(self.origin) / name
            return found if found.is_file() else None
        for local in (True, False):
            try:
                found = cached_file(
                    self.origin,
                    name,
                    **self.where,
                    local_files_only=local,
                    _raise_exceptions_for_missing_entries=False,
                    _raise_exceptions_for_connection_errors=False,
                    _raise_exceptions_for_gated_repo=False,
                )
            except (OSError, ValueError):  # neither a folder nor the name of a repository
                return None
            if found is not None:
                return Path(found)
        return None


def _files(source: _Source) -> dict[str, Path]:
    index = source.find(INDEX)
    if index is not None:
        shards: dict[str, list[str]] = {}
        mapped = read_object(index, ExportError).get("weight_map")
        if not isinstance(mapped, dict) or not all(isinstance(f, str) and Path(f).name == f for f in mapped.values()):
            raise ExportError(f"{index} does not list tensors and their files in its folder; fetch it again")
        for name, file in mapped.items():
            shards.setdefault(file, []).append(name)
        paths = {file: source.find(file) for file in sorted(shards)}
        missing = [file for file, path in paths.items() if path is None]
        if missing:
            raise ExportError(f"the base model {source.origin} lacks {', '.join(missing)}, which its index lists")
        return {name: paths[file] for file in sorted(shards) for name in shards[file]}  # pyright: ignore[reportReturnType]
    single = source.find(WEIGHTS)
    if single is None:
        return {}
    try:
        with safe_open(single, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), single)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{single}, the base model, cannot be read ({error}); fetch it again") from error


def slots_of(model: Any, names: Iterable[str], slots: Iterable[str]) -> tuple[dict[str, str | None], list[str]]:
    """Returns ({tensor name on disk: name in the model, None where the model has no such tensor}, names stored in
    another layout).

    Follows transformers' own conversions when loading (core_model_loading.py): renamings, then the base model's prefix.
    Tensors in another layout (say, experts one by one on disk and stacked in the model) cannot be mapped one to one.
    """
    known = dict.fromkeys(slots, True)
    rules = get_model_conversion_mapping(model)
    renamings: list[Any] = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters: list[Any] = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: dict[str, str | None] = {}
    converted = []
    for name in names:
        slot, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if slot not in known and name in known:
            slot, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        if pattern is not None:
            converted.append(name)
        found[name] = slot if slot in known and pattern is None else None
    return found, converted


def disk_names_of(model: Any, slots: Iterable[str]) -> dict[str, str]:
    """Returns {tensor name as transformers writes it: name in the model}, for a model without a base checkpoint to
    copy.

    Applies the renamings of loading in reverse. Raises ExportError for models whose tensors are stored in another
    layout.
    """
    rules = get_model_conversion_mapping(model, add_legacy=False)
    layouts: list[Any] = [rule.reverse_transform() for rule in rules if isinstance(rule, WeightConverter)]
    used = getattr(
        model, "_weight_conversions", None
    )  # the conversions that loading applied; a prefix is removed only if it was added
    if used is None:
        used = [rule for rule in rules if not isinstance(rule, PrefixChange)]
    renamings: list[Any] = [rule.reverse_transform() for rule in used[::-1] if isinstance(rule, WeightRenaming)]
    found = {}
    for slot in slots:
        if any(layout.rename_source_key(slot)[1] is not None for layout in layouts):
            raise ExportError(
                f"{type(model).__name__} stores {slot} in another layout than it runs it in, and its base checkpoint "
                "cannot be read; merge with PEFT's merge_and_unload() and save with transformers' save_pretrained()"
            )
        name = slot
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        found[name] = slot
    return found
