"""Builds the demo's dataset: questions about the installed Python standard library, answered by its docstrings.

No download is needed. The modules are a fixed list, in a fixed order, whose import has no side effects, and a hash of a
fact's name decides its split, so the same Python version gives the same data.
"""

import hashlib
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_NAMES = """argparse array ast base64 bisect bz2 calendar cmath codecs collections colorsys configparser contextlib
    contextvars copy csv datetime decimal difflib dis email.message email.utils filecmp fileinput fnmatch fractions
    functools gc getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client http.cookies
    inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox math mimetypes netrc numbers
    operator os os.path pathlib pickle pickletools pkgutil platform plistlib pprint queue quopri random re reprlib
    sched secrets selectors shelve shlex shutil signal socket socketserver sqlite3 ssl stat statistics string struct
    subprocess symtable sys tarfile tempfile textwrap threading time timeit tokenize tomllib trace traceback
    tracemalloc types typing unicodedata urllib.parse urllib.request uuid wave weakref webbrowser xml.dom.minidom
    xml.etree.ElementTree zipfile zlib zoneinfo"""
MODULES = tuple(_NAMES.split())

QUESTIONS = (
    "What does {name} do?",
    "Explain {name}.",
    "What is {name} for?",
    "Tell me about {name} in one sentence.",
)

PLATFORM_MODULES = ("posix", "nt", "posixpath", "ntpath", "genericpath")
"""Modules that define the functions of `os` and `os.path`."""
SHORTEST, LONGEST = 20, 100
"""Characters of an answer: shorter sentences are not informative, longer ones take too long to train in a demo."""
LONGEST_PAGE = 200
SENTENCE = re.compile(r"[A-Z][a-z]+ .*?[a-z0-9)\"'`]\.(?= |$)")


@dataclass(frozen=True)
class Fact:
    """A documented function, class or method. name: dotted. answer: first sentence of the docstring. text: its
    start."""

    name: str
    answer: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question with its documented answer. name: of the fact."""

    name: str
    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class Corpus:
    """documents: the pretraining data. train: the fine-tuning set. The two held-out sets:

    reworded: facts of `train`, as questions whose wording is not in `train`. They test recall beyond the exact prompt.
    untaught: facts that are not in `train`, whose documentation is in the pretraining data. They test whether the
        model has learned to answer, and generalisation to new facts.
    """

    documents: tuple[str, ...]
    train: tuple[Question, ...]
    reworded: tuple[Question, ...]
    untaught: tuple[Question, ...]


def build(limit: int) -> Corpus:
    """Builds the dataset from at most `limit` facts."""
    facts = pick(read_facts(MODULES), limit)
    train, reworded, untaught = [], [], []
    for fact in facts:
        asked = [Question(fact.name, question.format(name=fact.name), fact.answer) for question in QUESTIONS]
        chance = number(fact.name, "split")
        if chance % 10 == 0:
            untaught.append(asked[number(fact.name, "wording") % len(asked)])
            continue
        if chance % 10 == 1:
            reworded.append(asked.pop(number(fact.name, "wording") % len(asked)))
        train += asked
    return Corpus(tuple(documents(facts)), tuple(train), tuple(reworded), tuple(untaught))


def documents(facts: Sequence[Fact]) -> Iterator[str]:
    """Yields pretraining documents: each fact in several layouts, so that the model does not depend on one layout."""
    for fact in facts:
        yield f"{fact.name}: {fact.answer}"
        yield f"Help on {fact.name}\n{fact.text}"
        yield f"{fact.answer} See {fact.name}."


def read_facts(modules: Sequence[str]) -> list[Fact]:
    """Reads every documented public function, class and method of `modules`, in order, without duplicate answers."""
    facts: dict[str, Fact] = {}
    answers: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some modules warn when a deprecated name is read
        for name, thing in (pair for module in modules for pair in _members(module)):
            text = inspect.cleandoc(str(getattr(thing, "__doc__", None) or ""))
            found = SENTENCE.match(" ".join(text.split("\n\n")[0].split()))
            if found is None or not SHORTEST <= len(found.group()) <= LONGEST or found.group() in answers:
                continue
            answers.add(found.group())
            facts.setdefault(name, Fact(name, found.group(), text[:LONGEST_PAGE]))
    return list(facts.values())


def pick(facts: Sequence[Fact], limit: int) -> list[Fact]:
    """Selects at most `limit` facts by the hash of their names, in the given order."""
    chosen = {fact.name for fact in sorted(facts, key=lambda fact: number(fact.name, "pick"))[:limit]}
    return [fact for fact in facts if fact.name in chosen]


def number(name: str, purpose: str) -> int:
    """Hashes the two strings to an integer, independent of seed, order and Python version."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8], "big")


def _members(module_name: str) -> Iterator[tuple[str, Any]]:
    """Yields dotted names and values of a module's members and its classes' methods, in alphabetical order."""
    module = importlib.import_module(module_name)
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not callable(value) or not _is_defined_in(value, module):
            continue
        yield f"{module_name}.{name}", value
        if inspect.isclass(value):
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and getattr(function, "__doc__", None):
                    yield f"{module_name}.{name}.{method}", function


def _is_defined_in(value: Any, module: ModuleType) -> bool:
    """Returns whether a module defines the value rather than imports it. C accelerators (`_heapq`) and submodules count
    as part of it."""
    home = getattr(value, "__module__", None)
    name = module.__name__
    return home is None or home in (name, f"_{name}", *PLATFORM_MODULES) or home.startswith(f"{name}.")
