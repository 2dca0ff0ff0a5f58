"""MkDocs hook: expands `{{ public names }}` and `{{ modules PACKAGE }}` into mkdocstrings directives.

Both lists are read from the source with `ast`, so the reference follows the package and nothing of it is imported.
"""

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hasten"


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Replaces the placeholders of a page under reference/; other pages stay as they are."""
    if not page.file.src_uri.startswith("reference/"):
        return markdown
    lines = []
    for line in markdown.splitlines():
        words = line.removeprefix("{{ ").removesuffix(" }}").split()
        if line == "{{ public names }}":
            lines += [directive for name in public_names() for directive in (f"::: {name}", "")]
        elif line.startswith("{{ modules ") and len(words) == 2:
            lines += [directive for name in modules(words[1]) for directive in (f"::: {name}", "")]
        else:
            lines.append(line)
    return "\n".join(lines)


def public_names() -> list[str]:
    """The dotted path of each public name's definition, from `_HOMES` in hasten/__init__.py."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    homes = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    )
    found = [(home, name) for name, home in homes.items() if home != "errors"]
    return [definition(f"hasten.{home}", name) for home, name in sorted(found)]


def definition(module: str, name: str) -> str:
    """`module.name`, or where the module imports the name from."""
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return definition(node.module, name)
    return f"{module}.{name}"


def modules(package: str) -> list[str]:
    """`package` and its modules that have public members, kernels left out, in alphabetical order."""
    base = source(package)
    paths = [base] if base.name != "__init__.py" else sorted(base.parent.rglob("*.py"))
    return [dotted(path) for path in paths if not is_kernel(path) and has_public_members(path)]


def source(module: str) -> Path:
    """The file of a module or package. Raises FileNotFoundError if there is none."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"docs/reference names the module {module}, and there is no such file")


def dotted(path: Path) -> str:
    """The module's name of a file below the repository's root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_kernel(path: Path) -> bool:
    """Whether the file holds Triton kernels, which have launchers for their op alone and no public interface."""
    return path.name == "kernel.py" or path.parent.name == "kernels"


def has_public_members(path: Path) -> bool:
    """Whether the file defines a documented public class or function, so that a page about it says something."""
    return any(
        isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )
