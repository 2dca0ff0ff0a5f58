"""The JSON of a measurement: one file per GPU and date, merged from calls that each measured some parts.

{"date", "versions", "ceilings", "ops", "train", "fixed_costs", "curves", "packing", "budget", "longest", "linearity",
"sanitize", "tests"}; every part may be missing. "train": one row per job, mode, group that ran side by side, and library.
"""

import datetime
import importlib.metadata
import json
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "results"
PACKAGES = ["torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth", "trl", "accelerate"]
ABSENT = "not installed"
WHOLE = ("ceilings", "curves", "packing", "linearity", "tests")
KEYS = {
    "ops": ("op",), "sanitize": ("tool", "calls"), "train": ("job", "mode", "group", "variant"),
    "budget": ("job", "mode", "times"), "longest": ("variant", "cap_gib", "length", "offload_embedding"),
}  # fmt: skip


class Record:
    """A result that is written to `path` whenever a part or a row is added. begin: when it was made, by time.perf_counter."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.begin = path, time.perf_counter()
        self.result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "versions": versions()}

    def put(self, part: str, value: Any, *lines: str) -> None:
        """Sets a part and prints `lines`."""
        self.result[part] = value
        write(self.result, self.path)
        for line in lines:
            print(line, flush=True)

    def rows(self, part: str, rows: Iterable[Mapping[str, Any]], sound: str = "ok") -> bool:
        """Adds each row as it comes and prints it. Returns whether `sound`, a key, is true in all of them."""
        well = True
        for row in rows:
            self.put(part, [*self.result.get(part, []), row], line_of(row, sound))
            well = well and row[sound]
        return well


def line_of(row: Mapping[str, Any], sound: str = "ok") -> str:
    """One printed line: names and values of the row that are neither None nor collections. A row whose `sound` is false says so."""
    plain = {name: value for name, value in row.items() if isinstance(value, str | int | float) and name != sound}
    said = (f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}" for name, value in plain.items())
    return "  ".join([*said, *(["NOT OK"] if not row.get(sound, True) else [])])


def versions() -> dict[str, str]:
    """The GPU's name and the versions of every package whose speed is compared."""
    import torch

    found = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ABSENT
    return found


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Merges results of the same GPU, versions and date, given oldest first. Raises ValueError if these differ.

    A later row replaces an earlier one with the same KEYS, a later part without rows the earlier one.
    """
    dates = {result["date"] for result in results}
    if len(dates) != 1:
        raise ValueError(f"results of different dates cannot be merged: {sorted(dates)}")
    merged: dict[str, Any] = {"date": dates.pop(), "versions": {}, "fixed_costs": {}}
    for result in results:
        for name, version in result["versions"].items():
            known = merged["versions"].get(name, ABSENT)
            if ABSENT not in (known, version) and known != version:
                raise ValueError(f"results of different machines cannot be merged: {name} is {known} and {version}")
            merged["versions"][name] = version if known == ABSENT else known
        merged |= {part: result[part] for part in WHOLE if part in result}
        merged["fixed_costs"].update(result.get("fixed_costs", {}))
        for part, keys in KEYS.items():
            both = [*merged.get(part, []), *result.get(part, [])]
            if both:
                merged[part] = list({tuple(row[key] for key in keys): row for row in both}.values())
    return merged


def file_name(result: Mapping[str, Any]) -> str:
    """Such as h200-2026-11-21.json: the GPU's last word and the date."""
    gpu = re.sub(r"[^a-z0-9]+", "-", result["versions"]["gpu"].lower().split()[-1]).strip("-")
    return f"{gpu}-{result['date']}.json"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write(result: Mapping[str, Any], path: Path) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.rename(path)


def newest(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The latest result of each GPU, by file name. Raises FileNotFoundError if there is none."""
    latest = {path.stem[:-11]: path for path in sorted(folder.glob("*-????-??-??.json"))}
    if not latest:
        raise FileNotFoundError(f"no results in {folder}")
    return [read(path) for path in latest.values()]
