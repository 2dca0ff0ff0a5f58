"""The JSON of a measurement: one file per GPU and date, put together from calls that each did a part.

{"date", "versions", "ceilings", "ops", "train", "fixed_costs", "curves", "packing", "budget",
"longest", "linearity", "sanitize", "tests"}; every part may be missing.
"train": one row per job, mode, group of libraries that ran side by side, and library.
"""

import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
PACKAGES = ["torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth", "trl", "accelerate"]
ABSENT = "not installed"
WHOLE = ("ceilings", "curves", "packing", "linearity", "tests")
KEYS = {
    "ops": ("op",), "sanitize": ("tool", "calls"), "train": ("job", "mode", "group", "variant"),
    "budget": ("job", "mode", "times"), "longest": ("variant", "cap_gib", "length", "offload_embedding"),
}  # fmt: skip


def versions() -> dict[str, str]:
    """The GPU's name and the versions of everything whose speed is compared."""
    import torch

    found = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ABSENT
    return found


def _merged_versions(files: Iterable[Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in files:
        for name, version in one.items():
            known = found.get(name, ABSENT)
            if ABSENT not in (known, version) and known != version:
                raise ValueError(f"results of different machines cannot be merged: {name} is {known} and {version}")
            found[name] = version if known == ABSENT else known
    return found


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result out of several of the same GPU, versions and date, oldest first.

    Of two rows about the same thing (KEYS) the later one stays, and likewise of two parts that are not rows. A later race
    of one group replaces all rows of that group. Raises ValueError where GPU, versions or date differ.
    """
    dates = {result["date"] for result in results}
    if len(dates) != 1:
        raise ValueError(f"results of different dates cannot be merged: {sorted(dates)}")
    merged: dict[str, Any] = {"date": dates.pop(), "versions": _merged_versions(r["versions"] for r in results)}
    for result in results:
        for part in WHOLE:
            if part in result:
                merged[part] = result[part]
        merged.setdefault("fixed_costs", {}).update(result.get("fixed_costs", {}))
        for part, keys in KEYS.items():
            rows = {tuple(row[key] for key in keys): row for row in merged.get(part, [])}
            rows.update({tuple(row[key] for key in keys): row for row in result.get(part, [])})
            if rows:
                merged[part] = list(rows.values())
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
    """The latest result of each GPU, by file name. Raises FileNotFoundError where there is none."""
    latest: dict[str, Path] = {}
    for path in sorted(folder.glob("*-????-??-??.json")):
        latest[path.stem[:-11]] = path
    if not latest:
        raise FileNotFoundError(f"no results in {folder}")
    return [read(path) for path in latest.values()]
