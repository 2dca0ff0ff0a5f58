"""Real text that every machine with Python has: what the standard library says about itself, in an order that is always the same."""

import ast
import io
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def _sources(limit: int | None) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    elsewhere = {"site-packages", "dist-packages", "test", "tests"}
    paths = sorted(path for path in root.rglob("*.py") if not elsewhere & set(path.relative_to(root).parts))
    for path in paths[:limit]:
        yield path.read_text(encoding="utf-8")


def docstrings(limit: int | None = None) -> str:
    """Every docstring of the standard library's modules, classes and functions. limit: read that many files."""
    found: list[str] = []
    for source in _sources(limit):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                said = ast.get_docstring(node)
                if said:
                    found.append(said)
    return "\n\n".join(found)


def comments(limit: int | None = None) -> str:
    """Every comment of the same files: English too, of another kind."""
    found: list[str] = []
    for source in _sources(limit):
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        found += [token.string.lstrip("#! ") for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(line for line in found if line)


def train_tokenizer(text: str, words: int) -> Tokenizer:
    """A byte-level BPE of `words` entries, learned from `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=["<|pad|>", "<|bos|>", "<|eos|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer
