"""docs/guarantees.md, from the docstrings of the tests: `python tests/guarantees/guarantee_page.py` writes it."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/guarantees.md"
NUMBERS = (*range(1, 44), 47, 48, 49)
"""Of the complaints about fine-tuning libraries that hasten must not give reason for; 44 to 46 are about vLLM engines."""
HEAD = """# Guarantees

What users of fine-tuning libraries have suffered from, and what hasten guarantees instead. Each line has a test of its name, which
`make test` runs. "GPU": that test runs only where there is one. "full": `make test-full` runs it. This page is generated from the
tests: `python tests/guarantees/guarantee_page.py`.

| no. | guarantee | test |
|---|---|---|
"""


@dataclass(frozen=True)
class Guarantee:
    """One test. where: "GPU", "full" or nothing."""

    number: int
    sentence: str
    test: str
    file: str
    where: str


def guarantees() -> Iterator[Guarantee]:
    """Of every test that has a number in its name."""
    for path in sorted(Path(__file__).parent.glob("test_guarantees_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found = re.match(r"test_r(\d+)_", node.name) if isinstance(node, ast.FunctionDef) else None
            if found is None or not isinstance(node, ast.FunctionDef):
                continue
            marks = " ".join(map(ast.unparse, node.decorator_list))
            where = "GPU" if "mark.gpu" in marks else "full" if marks.startswith("pytest.mark.full") else ""
            sentence = " ".join((ast.get_docstring(node) or "").split())
            yield Guarantee(int(found[1]), sentence, node.name, path.name, where)


def render() -> str:
    """The page."""
    lines = []
    for one in sorted(guarantees(), key=lambda g: (g.number, g.test)):
        where = f" ({one.where})" if one.where else ""
        sentence = one.sentence.replace("|", "\\|")
        lines.append(f"| {one.number} | {sentence} | `{one.file}::{one.test}`{where} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
