"""Reads a training job from YAML: five sections, every key of which takes effect or is named in one error."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from hasten.errors import MissingExtraError, OptionError
from hasten.export import exporters
from hasten.options import HUB_ARGUMENTS, MODEL_ARGUMENTS, AdapterOptions, DataOptions, LoadOptions, SaveOptions
from hasten.options.data import TooLong
from hasten.suggest import did_you_mean
from hasten.weights.formats import load_arguments

INSTEAD = {
    "max_length": "use model.max_seq_length",
    "model_init_kwargs": "use the model section",
    "trust_remote_code": "use model.trust_remote_code",
    "gradient_checkpointing": "use model.use_gradient_checkpointing (or the adapter section's)",
    "gradient_checkpointing_kwargs": "use model.use_gradient_checkpointing (or the adapter section's)",
    "truncation_mode": "use data.too_long",
    "dataset_text_field": "use data.text_field",
    "dataset_kwargs": "use the data section",
    "resume_from_checkpoint": "use hasten train --resume",
    "disable_tqdm": "leave it out, hasten shows its own progress line",
}
"""Fields of SFTConfig that a job file sets elsewhere -> where."""


@dataclass(frozen=True)
class Job:
    """A checked job file. adapter: None = no such section. output: the folder of metrics, loss curve and checkpoints."""

    model: Mapping[str, Any]
    adapter: Mapping[str, Any] | None
    data: DataOptions
    train: Mapping[str, Any]
    save: SaveOptions
    output: Path

    @property
    def saved(self) -> Path:
        """The folder that the trained model is written to."""
        return Path(self.save.folder) if self.save.folder else self.output / "model"


def read_job(path: str | Path) -> Job:
    """Reads a job file. Relative paths in it are relative to its folder, or hub ids where no such path exists.

    Raises OptionError with every problem found: not YAML, missing or unknown sections and keys (with the names that may
    have been meant), values that are none of their choices. Raises MissingExtraError without TRL.
    """
    path = Path(path)
    call = f"train {path}"
    sections = _read_yaml(path, call)
    problems = _unknown("section", sections, ("model", "adapter", "data", "train", "save"))
    problems += [f"section {name!r} is missing" for name in ("model", "data") if name not in sections]
    for name, value in sections.items():
        if value is not None and not isinstance(value, dict):
            problems.append(f"section {name!r} must be a mapping of names to values, found {value!r}")
    if problems:
        raise OptionError(call, problems)
    parts: dict[str, dict[str, Any]] = {name: dict(value or {}) for name, value in sections.items()}
    train = {name: _number(value) for name, value in parts.get("train", {}).items()}
    fields = _fields(LoadOptions, "extra", "expected_model_type")
    load = (*fields, *load_arguments(), *HUB_ARGUMENTS, *MODEL_ARGUMENTS)
    problems += _unknown("model", parts["model"], load)
    problems += _unknown("adapter", parts.get("adapter", {}), (*_fields(AdapterOptions, "extra"), *_lora_fields()))
    problems += _unknown("data", parts["data"], _fields(DataOptions))
    problems += _unknown("train", train, (*_sft_fields(), *INSTEAD))
    problems += _unknown("save", parts.get("save", {}), _fields(SaveOptions))
    problems += [f"train.{name} cannot be set here; {INSTEAD[name]}" for name in train if name in INSTEAD]
    problems += _values(parts)
    if problems:
        raise OptionError(call, problems)
    return _job(path, parts, train)


def _job(path: Path, parts: Mapping[str, dict[str, Any]], train: dict[str, Any]) -> Job:
    home = path.resolve().parent
    model, data = parts["model"], parts["data"]
    model["model_name"] = _local(model["model_name"], home)
    if "dtype" in model and model["dtype"] is not None:
        model["dtype"] = getattr(torch, model["dtype"])
    for name in ("path", "eval_path"):
        if data.get(name):
            data[name] = _local(data[name], home)
    output = home / (train.pop("output_dir", None) or f"runs/{path.stem}")
    adapter, save = parts.get("adapter"), parts.get("save", {})
    if adapter is not None and "use_gradient_checkpointing" in model:
        adapter.setdefault("use_gradient_checkpointing", model["use_gradient_checkpointing"])
    if save.get("folder"):
        save["folder"] = str(home / save["folder"])
    return Job(model, adapter, DataOptions(**data), train, SaveOptions(**save), output)


def _read_yaml(path: Path, call: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(call, [f"the file cannot be read: {error.strerror}; pass the path of a YAML file"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(call, [f"the file is not YAML: {error}"]) from error
    if not isinstance(found, dict):
        raise OptionError(call, ["the file has no sections; it needs at least model: and data:"])
    return found


def _values(parts: Mapping[str, dict[str, Any]]) -> list[str]:
    """Problems with values that only a job file has; the others are checked by the calls that take them."""
    problems = []
    model, data = parts["model"], parts["data"]
    problems += [
        f"{name} is missing; it must name {what}"
        for name, value, what in (
            ("model.model_name", model.get("model_name"), "a hub id or a folder"),
            ("data.path", data.get("path"), "a file, a folder or a hub id"),
        )
        if not isinstance(value, str) or not value
    ]
    dtype = model.get("dtype")
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        problems.append(f"model.dtype={dtype!r}: must be bfloat16, float16 or float32")
    policy = data.get("too_long", "truncate")
    if policy not in get_args(TooLong):
        choices = ", ".join(get_args(TooLong))
        problems.append(f"data.too_long={policy!r}: must be one of {choices}{did_you_mean(policy, get_args(TooLong))}")
    if model.get("full_finetuning") and "adapter" in parts:
        problems.append("model.full_finetuning trains all weights, and there is an adapter section; remove one of them")
    method = parts.get("save", {}).get("method")
    if method is not None and method not in exporters.names():
        choices = ", ".join(exporters.names())
        problems.append(f"save.method={method!r}: must be one of {choices}{did_you_mean(method, exporters.names())}")
    if method == "lora" and model.get("full_finetuning"):
        problems.append("save.method='lora' saves an adapter, and full fine-tuning has none; use merged_16bit")
    return problems


def _unknown(section: str, found: Iterable[Any], known: Iterable[str]) -> list[str]:
    known = sorted(set(known))
    where = "section" if section == "section" else f"key of {section}:"
    listed = f"; known: {', '.join(known)}" if len(known) < 12 else ""
    return [f"unknown {where} {name!r}{did_you_mean(name, known) or listed}" for name in found if name not in known]


def _fields(kind: type, *without: str) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind) if f.name not in without)


def _lora_fields() -> tuple[str, ...]:
    from peft import LoraConfig

    return _fields(LoraConfig)


def _sft_fields() -> tuple[str, ...]:
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise MissingExtraError("hasten train", "trl", "train") from error
    return tuple(f.name for f in dataclasses.fields(SFTConfig) if f.init)


def _number(value: Any) -> Any:
    """A number that YAML reads as text: YAML 1.1 takes 2.0e-4 for a number and the common 2e-4 for a string."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _local(name: str, home: Path) -> str:
    """`name` as a path relative to the job file's folder if that exists, else unchanged."""
    return str(home / name) if (home / name).exists() else name
