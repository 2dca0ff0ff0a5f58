"""The name of a storage format, or of its library, occurs in `weights/formats` and in few other files, all listed here."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hasten

ROOT = Path(hasten.__file__).parent
NAMES = re.compile(
    r"nf4|int8|fp4|(?<!adamw_)(?<!adamw_bnb_)4bit|(?<!adamw_)8bit|params4bit|bitsandbytes|quant_state", re.I
)
OPTIMIZERS = re.compile(r"(paged_)?adamw(_\w+)?_(4|8|32)bit")
ALLOWED = {
    "model.py": "the public signature",
    "estimation.py": "the public signature",
    "training/optimizers.py": "the package of transformers' optimizers",
    "demo/pipeline.py": "calls the public signature",
    "testing/type_checks.py": "calls the public signature",
    "inference/decode/servable.py": "quantised KV caches, and packages whose forwards are known",
    "schema/near.py": "arguments of other libraries and what they are called here",
}
"""Files outside `weights/formats`, `ops/nf4` and the options -> why a format is named there."""
ROOMS = ("weights/formats/", "ops/nf4/", "option")


def _docstrings(tree: ast.AST) -> set[int]:
    """Nodes of strings that are only prose: an expression statement by themselves."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def _named(tree: ast.AST) -> Iterator[str]:
    prose = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        elif isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id == "torch"):  # torch.int8 is a dtype
                yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.name for alias in node.names)
            yield getattr(node, "module", None) or ""


def test_only_the_registry_knows_a_format_by_name() -> None:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        file = str(path.relative_to(ROOT))
        names = {OPTIMIZERS.sub("", name) for name in _named(ast.parse(path.read_text()))}
        hits = sorted(name for name in names if NAMES.search(name))
        if hits and not file.startswith(ROOMS):
            found[file] = hits
    assert not found.keys() - ALLOWED.keys(), {file: found[file] for file in found.keys() - ALLOWED.keys()}
