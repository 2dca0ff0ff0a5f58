"""`Expected`: what an annotation such as `list[str] | str | None` takes, read from its syntax tree."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCALARS = {"bool": "bool", "int": "int", "float": "float", "str": "str", "None": "none", "torch.dtype": "dtype"}
LISTS = {"list", "tuple", "set", "frozenset", "Sequence", "Iterable", "Collection"}
MAPPINGS = {"dict", "Mapping", "MutableMapping"}
DTYPES = ("bfloat16", "float16", "float32")
"""The values of a dtype in a job file."""
WORDS = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "text", "none": "null"}


@dataclass(frozen=True)
class Expected:
    """The union of everything that an annotation takes.

    scalars: of bool, int, float, str, none, dtype. choices: values of a Literal. items, values: of lists and of mappings, None =
    no such. anything: an annotation that says nothing, or a class that is not known here.
    """

    scalars: frozenset[str] = frozenset()
    choices: tuple[Any, ...] = ()
    items: "Expected | None" = None
    values: "Expected | None" = None
    anything: bool = False

    def __or__(self, other: "Expected") -> "Expected":
        return Expected(
            self.scalars | other.scalars,
            self.choices + other.choices,
            self.items or other.items,
            self.values or other.values,
            self.anything or other.anything,
        )

    @property
    def takes_text(self) -> bool:
        """Whether any text is taken, and not only the text of a choice."""
        return "str" in self.scalars

    @property
    def takes_bool(self) -> bool:
        """Whether true or false is taken."""
        return "bool" in self.scalars or any(isinstance(choice, bool) for choice in self.choices)

    def __str__(self) -> str:
        scalars = self.scalars - {"int"} if "float" in self.scalars else self.scalars
        parts = [words for name, words in WORDS.items() if name in scalars and name != "none"]
        parts += [", ".join(DTYPES)] if "dtype" in scalars else []
        parts += [f"one of {', '.join(map(str, self.choices))}"] if self.choices else []
        if self.items is not None:
            parts.append("a list" if self.items.anything else f"a list, each {self.items}")
        parts += ["a mapping of names to values"] if self.values is not None else []
        parts += ["null"] if "none" in scalars else []
        return " or ".join(parts) or "any value"


ANYTHING = Expected(anything=True)


@dataclass
class _Parser:
    aliases: Mapping[str, ast.expr] = field(default_factory=dict)

    def parse(self, node: ast.expr) -> Expected:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.parse(ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return _union([self.parse(node.left), self.parse(node.right)])
        if isinstance(node, ast.Subscript):
            return self._subscript(node)
        name = ast.unparse(node)
        short = name.rsplit(".", 1)[-1]
        if name in SCALARS:
            return Expected(frozenset({SCALARS[name]}))
        if name in self.aliases:
            return self.parse(self.aliases[name])
        if short in LISTS | {each.capitalize() for each in LISTS}:
            return Expected(items=ANYTHING)
        if short in MAPPINGS | {"Dict"}:
            return Expected(values=ANYTHING)
        return ANYTHING

    def _subscript(self, node: ast.Subscript) -> Expected:
        name = ast.unparse(node.value).rsplit(".", 1)[-1]
        inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal":
            return Expected(choices=tuple(each.value for each in inner if isinstance(each, ast.Constant)))
        if name == "Optional":
            return _union([self.parse(inner[0]), Expected(frozenset({"none"}))])
        if name == "Union":
            return _union([self.parse(each) for each in inner])
        if name.lower() in {each.lower() for each in LISTS}:
            return Expected(items=self.parse(inner[0]))
        if name in MAPPINGS | {"Dict"}:
            return Expected(values=self.parse(inner[-1]))
        return ANYTHING


def _union(members: list[Expected]) -> Expected:
    """Classes that are not known here (enumerations, configs) give way to what is: job files hold no objects."""
    nothing = Expected(frozenset({"none"}))
    known = [one for one in members if not one.anything]
    if not [one for one in known if one != nothing]:
        known = members
    total = known[0]
    for one in known[1:]:
        total = total | one
    return total


def parse(annotation: str | ast.expr, aliases: Mapping[str, ast.expr] | None = None) -> Expected:
    """What `annotation` takes. aliases: names that the annotation's module assigns, such as `TooLong = Literal[...]`."""
    node = ast.parse(annotation, mode="eval").body if isinstance(annotation, str) else annotation
    return _Parser(aliases or {}).parse(node)
