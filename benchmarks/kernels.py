"""Lists the Triton kernels that hasten launches, from the syntax tree."""

import ast
from pathlib import Path

import hasten

OPS = Path(hasten.__file__).parent / "ops"


def _is_jit(decorator: ast.expr) -> bool:
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(target) in ("triton.jit", "jit")


def launched_kernels() -> dict[str, Path]:
    """Name -> file of every `@triton.jit` function that is launched somewhere in hasten/ops as `name[grid](...)`."""
    jitted: dict[str, Path] = {}
    launched: set[str] = set()
    for path in sorted(OPS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(_is_jit(one) for one in node.decorator_list):
                jitted[node.name] = path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).split(".")[-1])
    return {name: path for name, path in jitted.items() if name in launched}
