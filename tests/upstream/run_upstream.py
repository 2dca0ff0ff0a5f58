"""`python tests/upstream/run_upstream.py SDIST`: runs transformers' common model tests on the ten families, stock and with hasten's
overlays on every causal LM that a test makes, and prints which outcomes differ.

SDIST is the source package of the installed transformers (`pip download --no-deps --no-binary :all:
transformers==VERSION`), which holds the common tests. The tests need `parameterized`.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from rich.console import Console  # noqa: E402

from hasten.families import FAMILIES  # noqa: E402

MISSING = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}
"""Modules that the common tests import and the source package lacks -> the class that is imported. An empty one takes
its place."""


@dataclass(frozen=True)
class Run:
    """tests: name -> (outcome, the first line of its message). models: how many got overlays."""

    tests: dict[str, tuple[str, str]]
    models: int


def unpack(sdist: Path, out: Path) -> None:
    """Unpacks the tests' folder of transformers' source package, and writes what it lacks."""
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            top, _, name = member.name.partition("/")
            if name.startswith("tests/") and member.isfile():
                member.name = name
                archive.extract(member, out, filter="data")
    for name, kind in MISSING.items():
        path = out / "tests" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"class {kind}:\n    pass\n", encoding="utf-8")


def run(family: str, overlays: bool, folder: Path, chosen: str) -> Run:
    """Runs the tests of one family."""
    record = folder / f"{family}-{'hasten' if overlays else 'stock'}.xml"
    paths = [str(folder), str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "RUN_TRAINING_TESTS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder)]
    command += ["-p", "no:cacheprovider", "--tb=short", f"--junitxml={record}", "-k", chosen]
    command += ["-p", "upstream_overlays"] if overlays else []
    command += [f"{HERE / 'upstream_cases.py'}::Test_{family}"]
    with (folder / f"{record.stem}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=False, cwd=folder)
    if not record.exists():
        raise SystemExit(f"no test of {family} ran; see {folder / record.stem}.log")
    tree = ET.parse(record)  # noqa: S314
    models = sum(int(one.attrib["value"]) for one in tree.iter("property") if one.attrib["name"] == "models")
    return Run({case.attrib["name"]: _outcome(case) for case in tree.iter("testcase")}, models)


def _outcome(case: ET.Element) -> tuple[str, str]:
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            lines = (found.attrib.get("message") or "").splitlines()
            return kind, lines[0][:200] if lines else ""
    return "passed", ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="run_upstream.py", description=__doc__)
    parser.add_argument("sdist", type=Path)
    parser.add_argument("--families", default=",".join(FAMILIES), help="separated by commas")
    parser.add_argument("-k", dest="chosen", default="", help="only tests that match, as in pytest")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "build/upstream")
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    unpack(asked.sdist, out)
    console, worse, notes = Console(width=1000, highlight=False, markup=False), 0, list[str]()
    console.print("| family | tests | skipped | passed stock | passed with hasten | models with overlays |")
    console.print("|---|---|---|---|---|---|")
    for family in asked.families.split(","):
        stock, ours = (run(family, overlays, out, asked.chosen) for overlays in (False, True))
        skipped, *passed = (
            sum(kind == wanted for kind, _ in one.tests.values())
            for one, wanted in ((stock, "skipped"), (stock, "passed"), (ours, "passed"))
        )
        console.print(f"| {family} | {len(stock.tests)} | {skipped} | {passed[0]} | {passed[1]} | {ours.models} |")
        for name, (kind, message) in stock.tests.items():
            other, why = ours.tests.get(name, ("missing", ""))
            worse += kind == "passed" != other
            if kind != other or kind in ("failure", "error"):
                notes.append(f"{family} {name}: stock {kind}, with hasten {other}: {why or message}")
    console.print("\n".join(notes))
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
