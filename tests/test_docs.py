"""The documentation: links and files exist, guides run, names of the reference resolve, no private vocabulary."""

import ast
import importlib
import importlib.util
import inspect
import io
import re
import runpy
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import hasten

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hasten"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".github/pull_request_template.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = sorted((ROOT / "docs/how-to").glob("*.md"))
ROOMS = sorted(
    {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")} - {"__pycache__"}
)  # every room and top-level module of hasten

FENCE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1", re.S | re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w/<>.*{-])((?:[\w-]+/)*[\w-]+\.(?:py|md|toml|yml|cff))(?![\w<>*])")
EXAMPLE_NAMES = {"script.py"}
"""Files of a user, not of the repository."""
FOLDER = re.compile(r"`((?:hasten|tests|docs|benchmarks|examples)/(?:[\w-]+/)*)`")

BANNED = {
    r"\bdear\b": "expensive to recompute",
    r"\b(?:made|makes?|making)\b(?: \w+){0,3} again\b": "recomputed",
    r"\b(?:lies?|lay|lying) apart\b": "not packed",
    r"\b(?:wears?|wearing|worn)\b": "has",
    r"\bwaits? in (?:pinned )?(?:host|CPU) memory\b": "is offloaded to pinned CPU memory",
    r"\bnear names?\b": "did you mean",
    r"\bfaults?\b": "problem",
    r"\bmend(?:s|ed)?\b": "fix",
    r"\bkeeps? what\b": "saves",
    r"\bso many\b": "name the number",
    r"\b(?:joins?|joining) the (?:residual )?stream\b": "is added to the residual stream",
    r"\bto the (?:letter|bit)\b": "exactly, bit-exact",
    r"\blaid\b": "stored, packed",
    r"\bby then\b": "name the time",
    r"\bwhole numbers?\b(?! of)": "integer",
    r"\bis no (?:positive|dtype|number|probability|rank|size|device|name|dict|share|list|hub)\b": "must be",
    r"\b(?:treatments?|seats?|parcels?|levers?|shortages?)\b": "action, checkpoint, offloaded layer, saving",
    r"\b(?:last|base|thin|LoRA's|large|largest|down's|gate's) products?\b": "matmul",
    r"\bproducts? alone\b": "matmuls alone",
    r"\bheld as\b|\bweights held by\b": "stored as",
    r"\bdropout acts\b|\bacts? at once\b|\badapters? that acts?\b": "is active",
    r"\bno merged form\b|\bcannot be honou?red\b": "cannot be merged, has no effect",
    r"\bthe rule for\b": "validates",
    r"\bcomes? and go(?:es)?\b|\bcomes in a later version\b": "changes; is planned for a later version",
    r"\bnobody\b|\bways? out\b": "not called, not measured; what to do",
    r"\bthin\b": "rank-wide, small",
    r"\brooms?\b": "package, module, memory",
    r"\bis retyped\b|\bare retyped\b": "changes its class",
    r"\bwhole or not at all\b|\ball of it or nothing\b": "completely or not at all",
    r"\bpredicted from nothing\b": "no position predicts it",
    r"\b(?:is|are|was|were) acts\b|\bacts (?:from|again|behind)\b": "(a word that a rename left behind)",
    r"\boverlay_config are\b|\bmixes of treating\b": "(a word that a rename left behind)",
}
"""Pattern -> what to write instead: docs/glossary.md has the terms."""


def prose(path: Path) -> str:
    """A page without its fenced code blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The ids of a page's headings, as Python-Markdown's toc extension makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.M)
    plain = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles)
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_internal_links_resolve(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        other = page if not file else (page.parent / file).resolve()
        assert other.exists(), f"{page.name} links to {target}"
        if anchor and other.suffix == ".md":
            assert anchor in anchors(other), f"{page.name} links to {target}; headings are {sorted(anchors(other))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """Names start at the root, at hasten/ or at the page; a bare name may be anywhere in package, tests and docs."""
    text = prose(page)
    bare = {path.name for folder in ("hasten", "docs", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.*")}
    starts = (ROOT, PACKAGE, PACKAGE / "ops/lora", PACKAGE / "export", page.parent)
    missing = [
        name
        for name in set(NAMED.findall(text)) - EXAMPLE_NAMES
        if not any((start / name).exists() for start in starts) and ("/" in name or name not in bare)
    ]
    missing += [name for name in FOLDER.findall(text) if not (ROOT / name).is_dir()]
    assert not missing, f"{page.relative_to(ROOT)} names files that do not exist: {sorted(missing)}"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("page", [p for p in GUIDES if blocks(p, "python")], ids=lambda p: p.stem)
def test_guides_run(page: Path, tmp_path: Path) -> None:
    """```python blocks of a guide are one program; ```py blocks are fragments."""
    script = tmp_path / "guide.py"  # a file: Triton reads a kernel's source from it
    script.write_text("\n\n".join(blocks(page, "python")), encoding="utf-8")
    runpy.run_path(str(script))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_parses(page: Path) -> None:
    for block in (*blocks(page, "python"), *blocks(page, "py")):
        ast.parse(block)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, which writes the API reference."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference(hooks: ModuleType) -> None:
    found = hooks.public_names()
    errors = {name for name in hasten.__all__ if name.endswith("Error")}
    assert {path.rpartition(".")[2] for path in found} == set(hasten.__all__) - errors - {"__version__"}
    for path in found:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name) is getattr(hasten, name), path
        assert inspect.getdoc(getattr(hasten, name)), f"{path} has no docstring"


def test_every_room_is_in_the_reference(hooks: ModuleType) -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    packages = re.findall(r"^\{\{ modules ([\w.]+) \}\}$", pages, re.M)
    assert all(hooks.modules(package) for package in packages)
    rooms = {f"hasten.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")} - {"hasten.demo"}
    covered = {".".join(package.split(".")[:2]) for package in packages}
    assert not rooms - covered, f"docs/reference has no page for {sorted(rooms - covered)}"


def test_versions_agree() -> None:
    assert f"## [{hasten.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {hasten.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def violations(text: str) -> list[str]:
    """The banned words of a text, each with what to write instead. Line breaks count as spaces."""
    joined = " ".join(text.split())
    return [
        f"{found.group()!r} (better: {better}) in ...{joined[max(found.start() - 40, 0) : found.end() + 20]}..."
        for pattern, better in BANNED.items()
        for found in re.finditer(pattern, joined, re.I)
    ]


def texts(path: Path) -> Iterator[str]:
    """Docstrings, other strings and comments of a source file; adjacent comment lines as one text."""
    comments: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            comments.append(token.string.lstrip("# "))
        elif token.type == tokenize.STRING:
            yield token.string
        if token.type not in (tokenize.COMMENT, tokenize.NL) and comments:
            yield " ".join(comments)
            comments = []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_vocabulary_in_the_documentation(page: Path) -> None:
    assert not (found := violations(page.read_text(encoding="utf-8"))), "\n".join(found)


@pytest.mark.parametrize("room", [*ROOMS, "../examples"])
def test_no_private_vocabulary_in_the_code(room: str) -> None:
    """Covers all of hasten: docstrings, messages and comments."""
    base = PACKAGE / room
    found = [
        f"{path.relative_to(ROOT) if room in ROOMS else path.name}: {problem}"
        for path in ([base] if base.suffix == ".py" else sorted(base.rglob("*.py")))
        for text in texts(path)
        for problem in violations(text)
    ]
    assert not found, "\n".join(found)
