"""A training job: the five sections of a job file, checked and turned into the arguments of the calls that take them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.errors import OptionError
from hasten.export import exporters
from hasten.options import AdapterOptions, DataOptions, LoadOptions, SaveOptions
from hasten.schema.job_file import read_sections
from hasten.suggest import did_you_mean


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

    Raises OptionError with every problem found: those of `schema.job_file.read_sections`, else values that the calls would
    refuse. Raises MissingExtraError without TRL.
    """
    path = Path(path)
    parts = read_sections(path)
    home = path.resolve().parent
    model, data, train = parts["model"], parts["data"], parts.get("train", {})
    model["model_name"] = _local(model["model_name"], home)
    if model.get("dtype") is not None:
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
    if problems := _problems(model, adapter, save):
        raise OptionError(f"train {path}", problems)
    return Job(model, adapter, DataOptions(**data), train, SaveOptions(**save), output)


def _problems(model: Mapping[str, Any], adapter: Mapping[str, Any] | None, save: Mapping[str, Any]) -> list[str]:
    """What the calls that take the sections find in them."""
    problems = [f"model: {problem}" for problem in LoadOptions.from_call(**model).problems()]
    if adapter is not None:
        problems += [f"adapter: {problem}" for problem in AdapterOptions.from_call(**adapter).problems()]
    method = save.get("method")
    if method is not None and method not in exporters.names():
        choices = ", ".join(exporters.names())
        problems.append(f"save.method={method!r}: must be one of {choices}{did_you_mean(method, exporters.names())}")
    return problems


def _local(name: str, home: Path) -> str:
    """`name` as a path relative to the job file's folder if that exists, else unchanged."""
    return str(home / name) if (home / name).exists() else name
