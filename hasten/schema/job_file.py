"""Checks a job file's sections, names and types. All problems are in one error, and nothing is imported that takes seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.errors import MissingExtraError, OptionError
from hasten.schema import bounds
from hasten.schema.convert import FAILED, NULL, convert, found
from hasten.schema.declared import fields_of
from hasten.schema.expected import Expected, parse
from hasten.schema.near import ELSEWHERE, suggestion
from hasten.schema.passed import PASSED
from hasten.schema.yaml_file import Entries, Node, Scalar, YamlError, read

SECTIONS = ("model", "adapter", "data", "train", "save")
NEEDED = {"model": ("model_name", "a hub id or a folder"), "data": ("path", "a file, a folder or a hub id")}
"""Sections that a job file must have -> the key that they must have, and what it names."""
INSTEAD = {
    "max_length": "use model.max_seq_length",
    "model_init_kwargs": "use the model section",
    "trust_remote_code": "use model.trust_remote_code",
    "gradient_checkpointing": "use model.use_gradient_checkpointing (or the adapter section's)",
    "gradient_checkpointing_kwargs": "use model.use_gradient_checkpointing (or the adapter section's)",
    "activation_checkpointing": "use model.use_gradient_checkpointing (or the adapter section's)",
    "activation_checkpointing_kwargs": "use model.use_gradient_checkpointing (or the adapter section's)",
    "truncation_mode": "use data.too_long",
    "dataset_text_field": "use data.text_field",
    "dataset_kwargs": "use the data section",
    "resume_from_checkpoint": "use hasten train --resume",
    "disable_tqdm": "leave it out, hasten shows its own progress line",
}
"""Fields of SFTConfig that a job file sets elsewhere -> where."""


def read_sections(path: str | Path) -> dict[str, dict[str, Any]]:
    """The sections of a job file, each value of the type that its key takes.

    Raises OptionError with every problem: not YAML, missing or unknown sections and keys (with the names that may have been
    meant), values of other types or out of bounds, each with what was found and what is expected. Raises MissingExtraError
    without TRL.
    """
    path = Path(path)
    call = f"train {path}"
    try:
        document, problems = read(path)
    except YamlError as error:
        raise OptionError(call, [str(error)]) from error
    if not isinstance(document, Entries):
        raise OptionError(call, ["the file has no sections; it needs at least model: and data:"])
    known = _known()
    sections: dict[str, dict[str, Any]] = {}
    for key, node in document.pairs:
        if key.text not in SECTIONS:
            problems.append(_unknown_section(key.text, known))
        elif isinstance(node, Entries):
            sections[key.text] = _section(key.text, node, known, problems)
        elif isinstance(node, Scalar) and not node.quoted and node.text in NULL:
            sections[key.text] = {}
        else:
            problems.append(f"section {key.text!r} must be a mapping of names to values, found {found(node)}")
    problems += _missing(document, sections)
    problems += _contradictions(sections, document)
    if problems:
        raise OptionError(call, problems)
    return sections


def _known() -> dict[str, dict[str, Expected]]:
    """{section: {key: what it takes}}."""
    load = fields_of("hasten.options.fields", "LoadFields")
    adapter = fields_of("hasten.options.fields", "AdapterFields")
    try:
        sft = fields_of("trl", "SFTConfig")
    except ModuleNotFoundError as error:
        raise MissingExtraError("hasten train", "trl", "train") from error
    model = {**{name: parse(kind) for name, kind in PASSED.items()}, **load}
    return {
        "model": {name: kind for name, kind in model.items() if name not in ("extra", "expected_model_type")},
        "adapter": {n: kind for n, kind in {**fields_of("peft", "LoraConfig"), **adapter}.items() if n != "extra"},
        "data": fields_of("hasten.options.data", "DataOptions"),
        "train": {name: kind for name, kind in sft.items() if name not in INSTEAD},
        "save": fields_of("hasten.options.data", "SaveOptions"),
    }


def _section(
    section: str, node: Entries, known: Mapping[str, Mapping[str, Expected]], problems: list[str]
) -> dict[str, Any]:
    values = {}
    homes = {name: other for other in SECTIONS if other != section for name in known[other]}
    for key, inner in node.pairs:
        name = key.text
        if section == "train" and name in INSTEAD:
            problems.append(f"train.{name} cannot be set here; {INSTEAD[name]}")
        elif name not in known[section]:
            problems.append(_unknown_key(section, name, known, homes))
        else:
            value = convert(inner, known[section][name], f"{section}.{name}", problems)
            if value is FAILED:
                continue
            values[name] = value
            if (problem := bounds.problem(name, value)) is not None:
                problems.append(f"{section}.{name}: found {found(inner)}, must be {problem}")
    return values


def _unknown_key(section: str, name: str, known: Mapping[str, Mapping[str, Expected]], homes: Mapping[str, str]) -> str:
    hint = suggestion(name, known[section], homes)
    listed = f"; known: {', '.join(sorted(known[section]))}" if len(known[section]) < 12 else ""
    return f"unknown key of {section}: {name!r}{hint or listed}"


def _unknown_section(name: str, known: Mapping[str, Mapping[str, Expected]]) -> str:
    meant = ELSEWHERE.get(name, name)
    home = next((section for section in SECTIONS if meant in known[section]), None)
    hint = suggestion(name, SECTIONS) if home is None else f" (it belongs to the section {home!r}, as {meant})"
    return f"unknown section {name!r}{hint or '; known: ' + ', '.join(SECTIONS)}"


def _missing(document: Entries, sections: Mapping[str, Mapping[str, Any]]) -> list[str]:
    problems = []
    given: dict[str, Node] = {key.text: node for key, node in document.pairs}
    for section, (name, what) in NEEDED.items():
        if section not in given:
            problems.append(f"section {section!r} is missing")
            continue
        node = given[section]
        absent = section in sections and not (isinstance(node, Entries) and name in node.names())
        if absent or sections.get(section, {}).get(name) == "":
            problems.append(f"{section}.{name} is missing; it must name {what}")
    for section, name in (("train", "output_dir"), ("save", "folder"), ("data", "eval_path")):
        if sections.get(section, {}).get(name) == "":
            problems.append(f"{section}.{name} is empty; give a path, or leave the key out")
    return problems


def _contradictions(sections: Mapping[str, Mapping[str, Any]], document: Entries) -> list[str]:
    problems = []
    full = sections.get("model", {}).get("full_finetuning") is True
    if full and "adapter" in document.names():
        problems.append("model.full_finetuning trains all weights, and there is an adapter section; remove one of them")
    if full and sections.get("save", {}).get("method") == "lora":
        problems.append("save.method='lora' saves an adapter, and full fine-tuning has none; use merged_16bit")
    return problems
