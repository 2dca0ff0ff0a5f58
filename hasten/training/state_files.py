"""Stores the state of an optimizer, scheduler, scaler or random generator as safetensors and JSON: no pickle, no torch.load.

`<stem>.json` holds the structure with every number and text, `<stem>.safetensors` the tensors and arrays that it names.
"""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

from hasten.export.shards import write_json

NAMES = ("optimizer", "scheduler", "scaler", "rng_state*")
SUFFIXES = (".json", ".safetensors")


def has_state(stem: Path) -> bool:
    """Returns whether `write_state` wrote `stem`."""
    return stem.with_name(f"{stem.name}.json").is_file()


def write_state(stem: Path, state: Any) -> None:
    """Writes nested dicts, lists and tuples of tensors, numpy arrays, numbers, texts and None.

    Raises TypeError for any other value.
    """
    tensors: dict[str, torch.Tensor] = {}
    write_json(stem.with_name(f"{stem.name}.json"), _encode(state, tensors))
    save_file(tensors, stem.with_name(f"{stem.name}.safetensors"))


def read_state(stem: Path) -> Any:
    """Returns what `write_state` was given, with tensors on the CPU. Raises ValueError for a damaged file."""
    encoded = json.loads(stem.with_name(f"{stem.name}.json").read_text(encoding="utf-8"))
    return _decode(encoded, load_file(stem.with_name(f"{stem.name}.safetensors")))


def state_problems(folder: Path) -> list[str]:
    """Returns what is missing or unreadable of the states in `folder`."""
    problems = []
    stems = {path.with_suffix("") for name in NAMES for path in folder.glob(f"{name}.*") if path.suffix in SUFFIXES}
    for stem in sorted(stems):
        for suffix in SUFFIXES:
            if not stem.with_name(stem.name + suffix).is_file():
                problems.append(f"{stem.name}{suffix} is missing")
        structure = stem.with_name(f"{stem.name}.json")
        if structure.is_file():
            try:
                json.loads(structure.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                problems.append(f"{structure.name} is damaged ({error})")
    return problems


def is_state(path: Path) -> bool:
    """Returns whether a file of a checkpoint has the name of a state, not of weights."""
    return any(path.match(f"{name}.*") for name in NAMES)


def random_state(every_gpu: bool) -> dict[str, Any]:
    """Returns the states of the global generators of Python, numpy, torch and CUDA (all GPUs, or the current one)."""
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all() if every_gpu else torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets the generators to what `random_state` returned. CUDA's only where this machine has as many GPUs."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    cuda = state.get("cuda")
    if cuda is None or not torch.cuda.is_available():
        return
    if isinstance(cuda, torch.Tensor):
        torch.cuda.set_rng_state(cuda)
    elif len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_encode(one, tensors) for one in value]}
    if isinstance(value, numpy.generic):
        return _encode(value.item(), tensors)
    if isinstance(value, (torch.Tensor, numpy.ndarray)):
        name = str(len(tensors))
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(value)
        # A copy of its own: safetensors stores no tensors that share memory.
        tensors[name] = tensor.detach().cpu().contiguous().clone()
        return {"tensor" if isinstance(value, torch.Tensor) else "array": name}
    raise TypeError(f"a {type(value).__name__} cannot be stored in a checkpoint")


def _decode(encoded: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(encoded, dict):
        return encoded
    if len(encoded) != 1:
        raise ValueError(f"{len(encoded)} kinds of one value")
    [(kind, content)] = encoded.items()
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        return [list, tuple][kind == "tuple"](_decode(one, tensors) for one in content)
    if kind in ("tensor", "array"):
        return tensors[content] if kind == "tensor" else tensors[content].numpy()
    raise ValueError(f"values of kind {kind!r} are unknown")
