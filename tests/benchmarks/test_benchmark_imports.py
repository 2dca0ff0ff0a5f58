"""Modules of benchmarks import each other one way only, in functions and for types too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(benchmarks.__file__).parent


def imports(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package `root` that it imports anywhere."""
    modules = {".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in root.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                named |= {str(node.module), *(f"{node.module}.{one.name}" for one in node.names)}
            elif isinstance(node, ast.Import):
                named |= {one.name for one in node.names}
        found[module] = named & set(modules)
    return found


def test_there_is_no_cycle() -> None:
    found = imports(ROOT)
    assert "benchmarks.harness.steps" in found["benchmarks.harness.serve"]
    TopologicalSorter(found).prepare()


def test_a_cycle_is_found_in_functions_too(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(f"from {tmp_path.name} import b\n")
    (tmp_path / "b.py").write_text(f"def f():\n    from {tmp_path.name}.a import g\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imports(tmp_path)).prepare()
