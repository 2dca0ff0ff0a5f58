"""Checks whether hasten works on this machine: `look` collects versions and hardware, `examine` finds the problems."""

import os
import platform
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

Level = Literal["ok", "note", "problem"]

NEEDED_DISK_GIB = 5.0
"""Disk space in GiB for a 16-bit merge of a 1B model (2.5 GiB), twice: the finished model and the one being written."""
OLDEST_CAPABILITY = (7, 5)
"""The oldest GPU generation (Turing) that the CUDA builds of torch 2.11 and later support."""
BF16_CAPABILITY = (8, 0)
DEVELOPMENT = "test"
WORTH_HAVING = ("triton", "vllm")


@dataclass(frozen=True)
class Need:
    """One requirement of hasten. extra: the extra that it belongs to; None = hasten does not work without it."""

    name: str
    versions: SpecifierSet
    extra: str | None


@dataclass(frozen=True)
class Gpu:
    """capability: CUDA compute capability (major, minor)."""

    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True)
class Machine:
    """Versions and hardware of a machine. installed: distribution name -> version. driver: an NVIDIA driver is loaded,
    whether or not torch sees a GPU.

    needs: None where hasten's own requirements could not be read (neither installed nor run from its source folder).
    """

    python: str
    python_versions: SpecifierSet
    needs: tuple[Need, ...] | None
    installed: dict[str, str]
    gpus: tuple[Gpu, ...]
    driver: bool
    free_disk_gib: float
    cache: Path
    cache_writable: bool


@dataclass(frozen=True)
class Finding:
    """One line of the result. fix: what to do; empty where nothing needs to be done."""

    subject: str
    level: Level
    found: str
    fix: str = ""


def look(folder: Path | None = None) -> Machine:
    """Collects versions and hardware of this machine. folder: where models are to be written (default: the working
    directory)."""
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    python_versions, needs = own_requirements()
    names = {*(need.name for need in needs or ()), *WORTH_HAVING}
    cache = Path(HF_HUB_CACHE)
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory / 2**30))
    return Machine(
        python=platform.python_version(),
        python_versions=python_versions,
        needs=needs,
        installed={name: version for name in sorted(names) if (version := _version(name)) is not None},
        gpus=tuple(gpus),
        driver=Path("/proc/driver/nvidia/version").exists(),
        free_disk_gib=shutil.disk_usage(folder or Path.cwd()).free / 2**30,
        cache=cache,
        cache_writable=_can_write(cache),
    )


def own_requirements() -> tuple[SpecifierSet, tuple[Need, ...] | None]:
    """Returns hasten's version bounds of Python and packages: from its metadata if installed, else from its
    pyproject.toml."""
    try:
        found = metadata.metadata("hasten")
        extras = found.get_all("Provides-Extra") or []
        needs = tuple(_need(line, extras) for line in metadata.requires("hasten") or [])
        return SpecifierSet(found["Requires-Python"]), _of_users(needs)
    except metadata.PackageNotFoundError:
        source = Path(__file__).parents[1] / "pyproject.toml"
    if not source.exists():
        return SpecifierSet(), None
    project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
    needs = [_need(line) for line in project["dependencies"]]
    for extra, lines in project.get("optional-dependencies", {}).items():
        needs += [replace(_need(line), extra=extra) for line in lines]
    return SpecifierSet(project["requires-python"]), _of_users(needs)


def examine(machine: Machine) -> list[Finding]:
    """Returns every finding, in the order of the checks. Depends only on `machine`."""
    findings = [_python(machine)]
    if machine.needs is None:
        findings.append(
            Finding("packages", "note", "hasten's own requirements cannot be read here", "pip install hasten")
        )
    findings += [_package(need, machine.installed.get(need.name)) for need in machine.needs or ()]
    return [*findings, *_gpus(machine), _disk(machine), _cache(machine)]


def problems(findings: Sequence[Finding]) -> list[Finding]:
    """Returns the findings that keep hasten from working."""
    return [finding for finding in findings if finding.level == "problem"]


def _python(machine: Machine) -> Finding:
    if machine.python in machine.python_versions:
        return Finding("python", "ok", machine.python)
    asked = machine.python_versions
    return Finding(
        "python", "problem", f"{machine.python}, needs {asked}", f"create a virtual environment with Python {asked}"
    )


def _package(need: Need, version: str | None) -> Finding:
    asked = f"{need.name}{need.versions}"
    if version is None and need.extra is None:
        return Finding(need.name, "problem", f"not installed, needs {need.versions}", f"pip install '{asked}'")
    if version is None:
        return Finding(need.name, "note", "not installed (optional)", f"pip install 'hasten[{need.extra}]'")
    if not need.versions.contains(version, prereleases=True):
        return Finding(need.name, "problem", f"{version}, needs {need.versions}", f"pip install -U '{asked}'")
    return Finding(need.name, "ok", version)


def _gpus(machine: Machine) -> list[Finding]:
    if not machine.gpus and machine.driver:
        fix = "install a CUDA build of torch (pytorch.org/get-started), and check CUDA_VISIBLE_DEVICES"
        return [Finding("gpu", "problem", "an NVIDIA driver is loaded, but torch sees no GPU", fix)]
    if not machine.gpus:
        return [Finding("gpu", "note", "none: everything runs on the CPU, in reference implementations")]
    findings = [_gpu(index, gpu) for index, gpu in enumerate(machine.gpus)]
    if "triton" not in machine.installed:
        findings.append(Finding("triton", "problem", "not installed: no kernels on the GPU", "pip install triton"))
    return findings


def _gpu(index: int, gpu: Gpu) -> Finding:
    major, minor = gpu.capability
    found = f"{gpu.name}, compute capability {major}.{minor}, {gpu.memory_gib:.0f} GiB"
    subject = f"gpu {index}"
    if gpu.capability < OLDEST_CAPABILITY:
        oldest = ".".join(map(str, OLDEST_CAPABILITY))
        return Finding(subject, "problem", found, f"hide it (CUDA_VISIBLE_DEVICES), or use a GPU of {oldest} or later")
    if gpu.capability < BF16_CAPABILITY:
        return Finding(subject, "note", f"{found}: no bfloat16", "models load in float16, Gemma in float32")
    return Finding(subject, "ok", found)


def _disk(machine: Machine) -> Finding:
    found = f"{machine.free_disk_gib:.1f} GiB free"
    if machine.free_disk_gib < NEEDED_DISK_GIB:
        return Finding("disk", "problem", found, f"free at least {NEEDED_DISK_GIB:.0f} GiB, or work in another folder")
    return Finding("disk", "ok", found)


def _cache(machine: Machine) -> Finding:
    if machine.cache_writable:
        return Finding("hub cache", "ok", str(machine.cache))
    return Finding(
        "hub cache", "problem", f"{machine.cache} is not writable", "set HF_HOME to a folder you can write to"
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _can_write(folder: Path) -> bool:
    """Returns whether files can be created under `folder`, which need not exist yet."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _need(line: str, extras: Sequence[str] = ()) -> Need:
    """Parses a requirement line. In installed metadata a marker (`extra == "train"`) says to which of `extras` it
    belongs."""
    requirement = Requirement(line)
    marker = requirement.marker
    belongs = None
    if marker is not None and not marker.evaluate({"extra": ""}):
        belongs = next((extra for extra in extras if marker.evaluate({"extra": extra})), None)
    return Need(requirement.name, requirement.specifier, belongs)


def _of_users(needs: Sequence[Need]) -> tuple[Need, ...]:
    """Drops the requirements of hasten's own tests."""
    return tuple(need for need in needs if need.extra != DEVELOPMENT)
