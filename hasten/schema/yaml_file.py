"""Reads YAML into nodes that keep every scalar as it is written. Bounded in size, depth and aliases; runs nothing.

PyYAML's constructors are not used: YAML 1.1 turns `007` into 7, `2026_11_25` into 20261125, `1:30` into 90, `no` into false and
`1e-4` into text. What a scalar means is decided by the type of its key (`convert`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from yaml import events

MAX_BYTES, MAX_DEPTH, MAX_NODES = 2**18, 20, 10_000
"""Limits of a job file. Nodes are counted with aliases written out, so that few lines cannot stand for billions of values."""
TEXT_TAG = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Scalar:
    """text: as written, without quotes. quoted: in quotes, a block (| or >) or tagged !!str, so that it can only be text."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Entries:
    """A mapping in the order of the file."""

    pairs: "tuple[tuple[Scalar, Node], ...]" = ()

    def names(self) -> list[str]:
        """The keys' texts."""
        return [key.text for key, _ in self.pairs]


Node: TypeAlias = Scalar | Entries | tuple["Node", ...]


class YamlError(ValueError):
    """The file cannot be read; the message says why and where."""


def read(path: Path) -> "tuple[Node | None, list[str]]":
    """(the document, duplicate keys as problems); None = an empty file. Raises YamlError."""
    try:
        if not path.is_file():
            what = "it is no ordinary file" if path.exists() else "there is no such file"
            raise YamlError(f"the file cannot be read: {what}; pass the path of a YAML file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise YamlError(f"the file cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise YamlError(f"it has more than {MAX_BYTES // 1024} KiB; a job file has a few lines")
    try:
        reader = _Reader(iter(yaml.parse(raw.decode("utf-8-sig"), Loader=yaml.SafeLoader)))
        return reader.document(), reader.problems
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise YamlError(f"the file is not YAML: {error}") from error


@dataclass
class _Reader:
    """problems: what is wrong but leaves the rest readable. anchors: name -> (node, nodes in it); None while it is being read."""

    stream: Iterator[Any]
    problems: list[str] = field(default_factory=list)
    anchors: dict[str, tuple[Node, int] | None] = field(default_factory=dict)

    def document(self) -> Node | None:
        found: Node | None = None
        documents = 0
        for event in self.stream:
            if isinstance(event, events.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise YamlError(f"line {_line(event)}: a second document begins; a job file is one")
            elif isinstance(event, events.NodeEvent):
                found, _ = self._node(event, 1)
        return found

    def _node(self, event: Any, depth: int) -> tuple[Node, int]:
        """(node, how many nodes it is with aliases written out)."""
        if isinstance(event, events.AliasEvent):
            known = self.anchors.get(event.anchor)
            if known is None:
                state = "stands for a value that holds itself" if event.anchor in self.anchors else "is not defined"
                raise YamlError(f"line {_line(event)}: the alias *{event.anchor} {state}")
            return known
        if depth > MAX_DEPTH:
            raise YamlError(f"line {_line(event)}: values are nested more than {MAX_DEPTH} deep")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, events.ScalarEvent):
            made = _scalar(event), 1
        elif isinstance(event, events.SequenceStartEvent):
            made = self._sequence(event, depth)
        else:
            made = self._mapping(event, depth)
        if made[1] > MAX_NODES:
            raise YamlError(f"line {_line(event)}: more than {MAX_NODES} values, with aliases written out")
        if event.anchor is not None:
            self.anchors[event.anchor] = made
        return made

    def _sequence(self, start: Any, depth: int) -> tuple[Node, int]:
        _refuse_tag(start)
        items: list[Node] = []
        size = 1
        while not isinstance(event := next(self.stream), events.SequenceEndEvent):
            node, count = self._node(event, depth + 1)
            items.append(node)
            size += count
        return tuple(items), size

    def _mapping(self, start: Any, depth: int) -> tuple[Node, int]:
        _refuse_tag(start)
        pairs: dict[str, tuple[Scalar, Node]] = {}
        merged: dict[str, tuple[Scalar, Node]] = {}
        size = 1
        while not isinstance(event := next(self.stream), events.MappingEndEvent):
            line = _line(event)
            key, count = self._node(event, depth + 1)
            value, more = self._node(next(self.stream), depth + 1)
            size += count + more
            if not isinstance(key, Scalar):
                raise YamlError(f"line {line}: a key is a list or a mapping; keys are names")
            if key == Scalar("<<"):
                merged |= _merged(value, line)
                continue
            if key.text in pairs:
                self.problems.append(f"line {line}: the key {key.text!r} stands twice in one section; keep one of them")
            pairs[key.text] = key, value
        return Entries(tuple({**merged, **pairs}.values())), size


def _merged(value: Node, line: int) -> dict[str, tuple[Scalar, Node]]:
    """What `<<: *anchor` brings in; the first of a list of mappings wins, as YAML says."""
    parts = value if isinstance(value, tuple) else (value,)
    found: dict[str, tuple[Scalar, Node]] = {}
    for part in reversed(parts):
        if not isinstance(part, Entries):
            raise YamlError(f"line {line}: << merges mappings only")
        found |= {key.text: (key, inner) for key, inner in part.pairs}
    return found


def _scalar(event: Any) -> Scalar:
    if event.tag not in (None, "!", TEXT_TAG):
        _refuse_tag(event)
    plain = event.style is None or event.style == ""
    return Scalar(event.value, quoted=not plain or event.tag in ("!", TEXT_TAG))


def _refuse_tag(event: Any) -> None:
    if event.tag is not None and event.tag != "!":
        raise YamlError(f"line {_line(event)}: the tag {event.tag!r}; a job file holds plain values without tags")


def _line(event: Any) -> int:
    return event.start_mark.line + 1
