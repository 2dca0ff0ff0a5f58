"""The fields of a dataclass, read from its source: importing TRL, transformers or torch would take seconds."""

import ast
import functools
import importlib.util
from pathlib import Path

from hasten.schema.expected import Expected, parse

HOMES = {
    ("transformers", "TrainingArguments"): "transformers.training_args",
    ("trl", "SFTConfig"): "trl.trainer.sft_config",
    ("peft", "LoraConfig"): "peft.tuners.lora.config",
}
"""Classes that a package's `__init__` hands on -> the module that defines them."""


def fields_of(module: str, name: str) -> dict[str, Expected]:
    """{field: what it takes} of the dataclass `name`, its bases' fields first.

    module: where it is defined, or the package that hands it on (`HOMES`). Raises ModuleNotFoundError where the package is not
    installed, and LookupError where its source has no such class.
    """
    return dict(_fields(module, name))


@functools.cache
def _fields(module: str, name: str) -> tuple[tuple[str, Expected], ...]:
    module = HOMES.get((module, name), module)
    tree = _parse(module)
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        raise LookupError(f"{module} has no class {name}")
    aliases = {
        target.id: node.value for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
        if isinstance(target, ast.Name)
    }  # fmt: skip
    fields: dict[str, Expected] = {}
    for base in found.bases:
        home = _home(tree, module, ast.unparse(base))
        if home is not None:
            fields.update(_fields(*home))
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_argument(node):
            fields[node.target.id] = parse(node.annotation, aliases)
    return tuple(fields.items())


def _is_argument(node: ast.AnnAssign) -> bool:
    if ast.unparse(node.annotation).startswith(("ClassVar", "typing.ClassVar")):
        return False
    keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
    return not any(k.arg == "init" and ast.unparse(k.value) == "False" for k in keywords)


def _home(tree: ast.Module, module: str, name: str) -> tuple[str, str] | None:
    """(module, class) of a base class; None for classes without fields, such as mixins of other packages."""
    if any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body):
        return module, name
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            parents = module.split(".")[: -node.level] if node.level else []
            home = ".".join([*parents, *([node.module] if node.module else [])])
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            try:
                _fields(home, original)
            except (LookupError, ModuleNotFoundError):
                return None
            return home, original
    return None


def _parse(module: str) -> ast.Module:
    return ast.parse(_source(module).read_text(encoding="utf-8"))


def _source(module: str) -> Path:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    place = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    for path in (place.with_suffix(".py") if rest else place / "__init__.py", place / "__init__.py"):
        if path.is_file():
            return path
    raise LookupError(f"{module} has no source file")
