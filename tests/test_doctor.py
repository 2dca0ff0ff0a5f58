"""Each fault that the doctor knows is seeded into a healthy machine; each must be found, alone, with its mend."""

from dataclasses import replace
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from hasten import doctor
from hasten.doctor import Finding, Gpu, Machine, Need

HEALTHY = Machine(
    python="3.12.1",
    python_versions=SpecifierSet(">=3.11"),
    needs=(
        Need("torch", SpecifierSet(">=2.11"), None),
        Need("transformers", SpecifierSet(">=5.17"), None),
        Need("trl", SpecifierSet(">=1.15"), "train"),
    ),
    installed={"torch": "2.13.0+cpu", "transformers": "5.23.0", "trl": "1.16.0", "triton": "3.6.0"},
    gpus=(Gpu("H200", (9, 0), 139.0),),
    driver=True,
    free_disk_gib=100.0,
    cache=Path("/home/someone/.cache/huggingface/hub"),
    cache_writable=True,
)


def without(name: str) -> dict[str, str]:
    return {key: version for key, version in HEALTHY.installed.items() if key != name}


FAULTS = {
    "old python": (replace(HEALTHY, python="3.10.4"), "python", ">=3.11"),
    "package missing": (replace(HEALTHY, installed=without("torch")), "torch", "pip install 'torch>=2.11'"),
    "package too old": (
        replace(HEALTHY, installed={**HEALTHY.installed, "transformers": "4.57.0"}),
        "transformers",
        "pip install -U 'transformers>=5.17'",
    ),
    "optional part too old": (
        replace(HEALTHY, installed={**HEALTHY.installed, "trl": "0.9.0"}),
        "trl",
        "pip install -U 'trl>=1.15'",
    ),
    "driver, but torch sees no gpu": (replace(HEALTHY, gpus=()), "gpu", "CUDA build"),
    "gpu too old": (replace(HEALTHY, gpus=(Gpu("GTX 1080", (6, 1), 8.0),)), "gpu 0", "7.5"),
    "gpu without triton": (replace(HEALTHY, installed=without("triton")), "triton", "pip install triton"),
    "disk full": (replace(HEALTHY, free_disk_gib=0.3), "disk", "free at least"),
    "cache read-only": (replace(HEALTHY, cache_writable=False), "hub cache", "HF_HOME"),
}


def test_a_healthy_machine_has_no_fault() -> None:
    findings = doctor.examine(HEALTHY)
    assert [f.level for f in findings] == ["ok"] * len(findings)
    assert {f.subject for f in findings} >= {"python", "torch", "trl", "gpu 0", "disk", "hub cache"}


@pytest.mark.parametrize("name", FAULTS)
def test_each_seeded_fault_is_found_alone_with_its_mend(name: str) -> None:
    machine, subject, mend = FAULTS[name]
    found = doctor.problems(doctor.examine(machine))
    assert [f.subject for f in found] == [subject]
    assert mend in found[0].fix


@pytest.mark.parametrize(
    ("machine", "subject"),
    [
        (replace(HEALTHY, gpus=(), driver=False), "gpu"),
        (replace(HEALTHY, installed=without("trl")), "trl"),
        (replace(HEALTHY, gpus=(Gpu("T4", (7, 5), 15.0),)), "gpu 0"),
        (replace(HEALTHY, needs=None), "packages"),
    ],
    ids=["no gpu", "optional part absent", "no bfloat16", "requirements unreadable"],
)
def test_what_is_merely_absent_is_a_note(machine: Machine, subject: str) -> None:
    findings = doctor.examine(machine)
    assert [f.subject for f in findings if f.level != "ok"] == [subject]
    assert not doctor.problems(findings)


def test_this_machine_meets_hastens_own_requirements() -> None:
    machine = doctor.look()
    assert machine.needs is not None
    extras = {need.name: need.extra for need in machine.needs}
    assert extras["torch"] is None and extras["trl"] == "train" and "pytest" not in extras
    packages: list[Finding] = [f for f in doctor.examine(machine) if f.subject in extras]
    assert len(packages) == len(extras) and not doctor.problems(packages)
