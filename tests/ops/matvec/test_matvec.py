"""Linears of one token, on both backends, against fp64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from ops_kit import DTYPES, both, poisoned_memory

from hasten.ops.glu import ACTIVATIONS
from hasten.ops.matvec import Part, ScaledMatrix, matvec, matvecs, split_matvecs


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def dense(weight: torch.Tensor | ScaledMatrix) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return weight.double()
    return weight.codes.double() * weight.scales.double()[:, None]


def expected(parts: Sequence[Part[Any]], x: torch.Tensor, xa: torch.Tensor | None) -> list[torch.Tensor]:
    """Each part's product and what is added to it, in fp64."""
    found, rank = [], 0
    for part in parts:
        y = dense(part.weight) @ x.double()
        if part.b is not None and xa is not None:
            y = y + part.scale * part.b.double() @ xa[:, rank : rank + part.rank].double().sum(0)
            rank += part.rank
        found.append(y if part.bias is None else y + part.bias.double())
    return found


def close(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, roundings: int = 2) -> None:
    limit = roundings * max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(ours.double(), exact, rtol=limit, atol=limit * float(exact.abs().max()))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (3, 2048), (7, 4096), (2, 5000), (1, 1), (4, 2049), (2, 20000)])
def test_is_the_product(backend: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    wide = draw(shape[0], shape[1] + 8, dtype=dtype)
    x = draw(shape[1], dtype=dtype)
    weight = wide[:, : shape[1]]  # rows that are apart
    with poisoned_memory():
        ours = matvec(weight, x, backend)
    assert (ours.shape, ours.dtype) == ((shape[0],), dtype)
    close(ours, weight.double() @ x.double(), dtype)


def lora(rows: int, width: int, rank: int, biased: bool, dtype: torch.dtype) -> Part[torch.Tensor]:
    b = draw(rows, rank) if rank else None
    return Part(draw(rows, width, dtype=dtype), draw(rows, dtype=dtype) if biased else None, b, 0.5)


RANKS = {"no LoRA": (0, 0, 0), "one of three": (0, 3, 0), "all": (4, 16, 8), "more than are read at once": (100, 0, 5)}


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
def test_several_linears_are_one_launch(backend: Any, dtype: torch.dtype, ranks: str) -> None:
    parts = [lora(rows, 96, rank, rows == 9, dtype) for rows, rank in zip((17, 9, 5), RANKS[ranks], strict=True)]
    x, xa, residual = draw(96, dtype=dtype), draw(2, sum(RANKS[ranks])), draw(31, dtype=dtype)
    with poisoned_memory():
        plain = matvecs(parts, x, xa, backend=backend)
        added = matvecs(parts, x, xa, residual, backend=backend)
        wide = matvecs(parts, x, xa, dtype=torch.float32, backend=backend)
    exact = torch.cat(expected(parts, x, xa))
    close(plain, exact, dtype)
    close(added, exact + residual.double(), dtype)
    close(wide, exact, torch.float32, 8)


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rank", [0, 4])
def test_gate_and_up(backend: Any, activation: str, rank: int) -> None:
    gate, up = lora(37, 80, rank, True, torch.float32), lora(37, 80, rank, False, torch.float32)
    x, xa = draw(80) * 0.2, draw(1, 2 * rank)
    with poisoned_memory():
        ours = matvecs([gate, up], x, xa, activation=activation, backend=backend)
    wanted = expected([gate, up], x, xa)
    close(ours, ACTIVATIONS[activation](wanted[0]) * wanted[1], torch.float32, 20)


@both
def test_gate_and_up_round_like_three_ops(backend: Any) -> None:
    gate, up = draw(64, 32, dtype=torch.bfloat16), draw(64, 32, dtype=torch.bfloat16)
    x = draw(32, dtype=torch.bfloat16)
    ours = matvecs([Part(gate), Part(up)], x, activation="silu", backend=backend)
    apart = [matvec(weight, x, "reference") for weight in (gate, up)]
    close(ours, (torch.nn.functional.silu(apart[0]) * apart[1]).double(), torch.bfloat16, 1)


@both
def test_codes_with_a_scale_per_channel(backend: Any) -> None:
    parts = []
    for rows in (6, 11):
        codes = torch.randint(-127, 128, (rows, 200)).to(DEVICE, torch.int8)
        parts.append(Part(ScaledMatrix(codes, torch.rand(rows).to(DEVICE))))
    x = draw(200, dtype=torch.bfloat16)
    close(matvecs(parts, x, backend=backend), torch.cat(expected(parts, x, None)), torch.bfloat16)
    pair = [parts[1], parts[1]]
    wanted = expected(pair, x, None)
    close(
        matvecs(pair, x, activation="relu", dtype=torch.float32, backend=backend),
        wanted[0].bfloat16().relu().double() * wanted[1].bfloat16().double(),
        torch.bfloat16, 4,
    )  # fmt: skip


@both
@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("width", [64, 100])
def test_partial_sums(backend: Any, width: int, splits: int) -> None:
    parts = [Part(draw(rows, width)) for rows in (4, 7)]
    x = draw(width, dtype=torch.bfloat16)
    with poisoned_memory():
        ours = split_matvecs(parts, x, splits, backend)
    assert (ours.shape, ours.dtype) == ((splits, 11), torch.float32)
    close(ours.sum(0), torch.cat(expected(parts, x, None)), torch.float32, 8)
    chunk = -(-width // splits)
    last = parts[0].weight[:, chunk * (splits - 1) :].double() @ x[chunk * (splits - 1) :].double()
    torch.testing.assert_close(ours[-1, :4].double(), last, rtol=1e-5, atol=1e-5)
