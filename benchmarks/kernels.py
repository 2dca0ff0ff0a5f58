"""Lists the Triton kernels that hasten launches, from the syntax tree: importing hasten would change another library's worker."""

import ast
from importlib.util import find_spec
from pathlib import Path


def launched_kernels() -> dict[str, Path]:
    """Name -> file of every `@triton.jit` function that is launched somewhere in hasten/ops as `name[grid](...)`."""
    spec = find_spec("hasten")
    assert spec is not None and spec.origin is not None
    jitted: dict[str, Path] = {}
    launched: set[str] = set()
    for path in sorted(Path(spec.origin).with_name("ops").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                if any(ast.unparse(one).split("(")[0] in ("triton.jit", "jit") for one in node.decorator_list):
                    jitted[node.name] = path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).split(".")[-1])
    return {name: path for name, path in jitted.items() if name in launched}
