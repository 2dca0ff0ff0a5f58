"""Questions and documented answers about this machine's own Python standard library.

Nothing is downloaded: the facts are the docstrings. Only a fixed list of modules whose import has no side effect is
read, in a fixed order, and every split is decided by a hash of the fact's name, so the same Python gives the same data.
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
"""Where `os` and `os.path` get their functions from."""
SHORTEST, LONGEST = 20, 100
"""Characters of an answer: a shorter sentence says nothing, a longer one costs more time than a demo has."""
LONGEST_PAGE = 200
SENTENCE = re.compile(r"[A-Z][a-z]+ .*?[a-z0-9)\"'`]\.(?= |$)")


@dataclass(frozen=True)
class Fact:
    """name: dotted, as imported. answer: first sentence of its docstring. text: the start of the docstring."""

    name: str
    answer: str
    text: str


@dataclass(frozen=True)
class Question:
    """One question with its documented answer; `name` is the fact's."""

    name: str
    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class Corpus:
    """documents: what the base model reads. train: what is taught. The two held-out sets:

    reworded: facts that are taught, asked in a wording in which they are not. They test memory beyond the exact prompt.
    untaught: facts that no question of `train` is about. The base has read their documentation, like everybody's; they
        test whether the model has learned to answer, and what it makes of a fact that nobody taught it.
    """

    documents: tuple[str, ...]
    train: tuple[Question, ...]
    reworded: tuple[Question, ...]
    untaught: tuple[Question, ...]


def build(limit: int) -> Corpus:
    """The corpus of at most `limit` facts."""
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
    """Reference pages in several layouts, so that a fact is known by its name and not by one page's look."""
    for fact in facts:
        yield f"{fact.name}: {fact.answer}"
        yield f"Help on {fact.name}\n{fact.text}"
        yield f"{fact.answer} See {fact.name}."


def read_facts(modules: Sequence[str]) -> list[Fact]:
    """Every documented public function, class and method of `modules`, in order, each answer once."""
    facts: dict[str, Fact] = {}
    answers: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some modules warn when an old name is merely looked at
        for name, thing in (pair for module in modules for pair in _members(module)):
            text = inspect.cleandoc(str(getattr(thing, "__doc__", None) or ""))
            found = SENTENCE.match(" ".join(text.split("\n\n")[0].split()))
            if found is None or not SHORTEST <= len(found.group()) <= LONGEST or found.group() in answers:
                continue
            answers.add(found.group())
            facts.setdefault(name, Fact(name, found.group(), text[:LONGEST_PAGE]))
    return list(facts.values())


def pick(facts: Sequence[Fact], limit: int) -> list[Fact]:
    """At most `limit` facts, chosen by the hash of their names, in the order in which they were given."""
    chosen = {fact.name for fact in sorted(facts, key=lambda fact: number(fact.name, "pick"))[:limit]}
    return [fact for fact in facts if fact.name in chosen]


def number(name: str, purpose: str) -> int:
    """A number that depends on nothing but the two strings; on no seed, order or version of Python."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8], "big")


def _members(module_name: str) -> Iterator[tuple[str, Any]]:
    """Dotted names and values: what a module holds, then what its classes hold, in alphabetical order."""
    module = importlib.import_module(module_name)
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not callable(value) or not _lives_in(value, module):
            continue
        yield f"{module_name}.{name}", value
        if inspect.isclass(value):
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and getattr(function, "__doc__", None):
                    yield f"{module_name}.{name}.{method}", function


def _lives_in(value: Any, module: ModuleType) -> bool:
    """False for names that a module merely imported from elsewhere. C accelerators (`_heapq`) and parts count as home."""
    home = getattr(value, "__module__", None)
    name = module.__name__
    return home is None or home in (name, f"_{name}", *PLATFORM_MODULES) or home.startswith(f"{name}.")
