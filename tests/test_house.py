"""The rules of the house, held by the syntax tree: who may import whom, and what nobody may write."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import hasten

ROOT = Path(hasten.__file__).parent
FLOORS = [
    {"families", "errors", "units", "suggest", "json_file"},
    {"schema", "ops"},
    {"weights"},
    {"options"},
    {"state"},
    {"overlays"},
    {"patching"},
    {"data"},
    {"loading", "inference", "export"},
    {"training"},
    {"methods", "estimation"},
    {"model"},
    {"testing", "doctor", "unsloth_compat", "demo", "serving"},
    {"cli"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
ONLY: dict[str, set[str]] = {"families": set(), "errors": set(), "units": set(), "suggest": set(), "json_file": set()}
FILES = sorted(ROOT.rglob("*.py"))
MAY_PRINT = {"cli", "demo"}
TESTS = Path(__file__).parent
NO_ROOMS = {"benchmarks", "campaign", "guarantees", "guard", "real", "seeds", "upstream"}
"""Folders of tests/ that mirror no room: tests of benchmarks/, the sandbox of the tests, scripts that tests run."""


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _is_kernel(path: Path) -> bool:
    return path.name == "kernel.py" or path.parent.name == "kernels"


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            yield from (f"hasten.{a.name}" for a in node.names) if module == "hasten" else (module,)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = _room(path)
    if room == "__init__":
        return
    for name in _imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "triton":
            assert _is_kernel(path), f"{path} imports triton; only kernel.py and kernels/*.py may"
        if parts[0] != "hasten" or len(parts) < 2:
            continue
        other = parts[1]
        if other == "__version__":
            continue
        assert other in FLOOR, f"{other} is a room without a floor"
        assert other == room or FLOOR[other] < FLOOR[room], f"{room} imports {other}"
        if other == "families" and name != "hasten.families.schema":
            assert room in {"patching", "families", "testing", "doctor", "cli"}, f"{room} imports families"
        if room in ONLY:
            assert other in ONLY[room] | {room}, f"{room} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_bans(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"exec", "eval", "inspect.getsource", "getsource"}, f"{path}: {name}"
            assert name != "print" or _room(path) in MAY_PRINT, f"{path} prints"
        assert not isinstance(node, ast.Global), f"{path}: global"
        if isinstance(node, ast.Attribute):
            assert node.attr not in DEPRECATED, (
                f"{path}:{node.lineno} uses {node.attr}, which warns in transformers 5.23"
            )
        if isinstance(node, ast.ExceptHandler):
            kind = "" if node.type is None else ast.unparse(node.type)
            assert kind, f"{path}: bare except"
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert kind not in {"Exception", "BaseException"} or raises, f"{path}:{node.lineno} swallows everything"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{path}: import *"
    for name in _imports(tree):
        assert name.split(".")[0] not in {"pickle", "dill", "joblib"}, f"{path} imports {name}"


DEPRECATED = {"is_gradient_checkpointing", "gradient_checkpointing_enable", "gradient_checkpointing_disable"}
"""Their warnings are ignored in the tests (pyproject.toml), since PEFT and TRL use them."""
MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"}


def _module_containers(tree: ast.Module) -> set[str]:
    """Names bound at module level to a list, dict or set (a literal, a comprehension or a constructor's result)."""
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    makers = {"list", "dict", "set", "defaultdict", "collections.defaultdict", "OrderedDict", "Counter", "deque"}
    makers |= {"weakref.WeakKeyDictionary", "weakref.WeakValueDictionary", "weakref.WeakSet"}
    found = set()
    for node in tree.body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(value, displays) or (isinstance(value, ast.Call) and ast.unparse(value.func) in makers):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # pyright: ignore
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def _mutations(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) where something is stored into, deleted from, or changed by a method of a plain name."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = node.targets
        for target in targets:
            if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
                yield target.value.id, node.lineno  # pyright: ignore
            if isinstance(node, ast.AugAssign) and isinstance(target, ast.Name):
                yield target.id, node.lineno
        method = node.func if isinstance(node, ast.Call) else None
        if isinstance(method, ast.Attribute) and method.attr in MUTATORS and isinstance(method.value, ast.Name):
            yield method.value.id, node.lineno  # pyright: ignore


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_hidden_state(path: Path) -> None:
    """A model's state is `hasten.state.ModelState` and nothing else: no hidden attribute, no mutable module global."""
    text = path.read_text()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_hasten"):
            assert _room(path) == "state", f"{path}:{node.lineno} names the attribute {node.value!r}; use state_of"
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_hasten"), f"{path}:{node.lineno} hides state in .{node.attr}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"locals", "globals"}, f"{path}:{node.lineno} harvests {called}()"
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).endswith("TypeAlias"):
            assert node.value is None or ast.unparse(node.value) != "Any", f"{path}:{node.lineno}: an alias of Any"
        if isinstance(node, ast.Assign) and _room(path) != "__init__":
            hides = ast.unparse(node.value) in {"Any", "typing.Any", "object"}
            assert not hides, f"{path}:{node.lineno}: an alias of Any hides a type, or an import cycle"
    containers = _module_containers(tree)
    changed = [f"{name} (line {line})" for name, line in _mutations(tree) if name in containers]
    assert not changed, f"{path} changes module globals: {', '.join(changed)}"


def test_no_family_is_named_in_code() -> None:
    """A new family is a data file: the rooms that run models never ask which one they have."""
    names = {path.stem for path in (ROOT / "families").glob("*.py")} - {"__init__"}
    for path in FILES:
        if _room(path) not in {"ops", "weights", "overlays", "patching", "training", "inference", "export"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {
                    c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)
                }
                assert not constants & names, f"{path}:{node.lineno} compares with a family's name"


def test_files_and_functions_stay_small() -> None:
    for path in FILES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 320, f"{path} has {len(lines)} lines"
        if _is_kernel(path):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = (node.end_lineno or 0) - node.lineno
                assert body <= 80, f"{path}: {node.name} has {body} lines"


def test_tests_mirror_the_package() -> None:
    """A folder of tests has its room's name, so that a room's tests are found; basenames are unique, as pytest imports by them."""
    for folder in (path for path in TESTS.rglob("*") if path.is_dir() and path.name != "__pycache__"):
        parts = folder.relative_to(TESTS).parts
        assert parts[0] in NO_ROOMS or (ROOT.joinpath(*parts) / "__init__.py").is_file(), f"hasten has no {folder.name}"
    names = Counter(path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1]
