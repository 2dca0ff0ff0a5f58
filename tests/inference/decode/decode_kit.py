"""Stock models beside the same ones on the decode engine, ragged prompts, and counts of what a model is fed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from device_kit import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.inference.decode import DecodeEngine
from hasten.methods import CausalLMMethods
from hasten.patching import apply, plan
from hasten.state import state_of
from hasten.testing.tiny import tiny_model

LENGTHS = (5, 11, 1)


def served(family: str, max_seq_length: int | None = None, **changes: Any) -> tuple[Any, Any]:
    """(stock, the same model on the engine)."""
    stock, ours = (tiny_model(family, **{"amplify": 2.0, **changes}).to(DEVICE).eval() for _ in range(2))
    apply(ours, plan(ours, max_seq_length=max_seq_length), methods=CausalLMMethods)
    state_of(ours).engine = DecodeEngine(devices=("cpu", "cuda"))
    return stock, ours


def prompts(side: str = "left", lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on one side with id 0."""
    generator = torch.Generator().manual_seed(seed)
    count, width = len(lengths), max(lengths)
    ids, mask = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, None) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(6, 280, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def both(stock: Any, ours: Any, **asked: Any) -> tuple[Any, Any]:
    """What the two generate from the same state of the random generator. Fails where transformers' own loop ran."""
    results = []
    for model in (stock, ours):
        torch.manual_seed(5)
        results.append(model.generate(**asked))
    assert engine_note(ours) == "engine: hasten"
    return results[0], results[1]


def engine_note(model: Any) -> str:
    (note,) = state_of(model).notes["generation"]
    return note


@contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """Fills newly allocated memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def fed_tokens(model: Any) -> Iterator[list[int]]:
    """Tokens per sequence of every forward inside the block. Not a hook: those send the call to transformers."""
    with _Embedded(model.get_input_embeddings().weight) as embedded:
        yield embedded.widths


class _Embedded(TorchDispatchMode):
    """widths: of the ids (B, T) whose rows of `weight` are read."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.widths: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default and args[0].data_ptr() == self.weight.data_ptr():
            self.widths.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))
