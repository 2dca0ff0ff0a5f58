"""What is capped, by how much, and who holds the rest. The card is made up."""

import io
import json
import sys
from typing import Any

import pytest
import torch

from benchmarks.harness import card as capped
from benchmarks.harness.jobs import GIB

WHOLE, CONTEXT, RESERVED = 100 * GIB, 3 * GIB // 4, 6 * GIB


class MadeUp:
    """A card of 100 GiB, this process on it, and the other one, which has a context of 1 GiB."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.fractions: list[float] = []
        self.others = 0
        self.ended = False

    def worker(self, name: str, command: list[str]) -> "MadeUp":
        self.others = GIB
        return self

    def reply(self, timeout: float) -> dict[str, Any]:
        return {"ready": True}

    def ask(self, timeout: float, do: str, **told: int) -> dict[str, Any]:
        self.asked.append(told["bytes"])
        return {}

    def end(self) -> None:
        self.ended = True

    def free(self) -> int:
        return WHOLE - CONTEXT - RESERVED - self.others - (self.asked[-1] if self.asked else 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    made = MadeUp()
    monkeypatch.setattr(capped, "Worker", made.worker)
    for name, found in {
        "is_available": lambda: True, "synchronize": lambda: None, "empty_cache": lambda: None,
        "memory_reserved": lambda: RESERVED, "mem_get_info": lambda: (made.free(), WHOLE),
        "set_per_process_memory_fraction": made.fractions.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, found)
    return made


def test_the_allocator_and_what_the_card_says_agree(card: MadeUp) -> None:
    with capped.Card() as found:
        assert found.context == CONTEXT
        assert found.cap(24.0) == 24 * GIB - CONTEXT
        assert card.fractions == [pytest.approx((24 * GIB - CONTEXT) / WHOLE)]
        # A library that asks finds what is left of the cap, and the slack.
        assert CONTEXT + RESERVED + card.free() == 24 * GIB + capped.SLACK
        assert found.cap(8.0) == 8 * GIB - CONTEXT and CONTEXT + RESERVED + card.free() == 8 * GIB + capped.SLACK
        assert found.cap(None) is None and card.fractions[-1] == 1.0 and card.asked[-1] == 0
        assert not card.ended
    assert card.ended


def test_a_cap_beyond_the_card_takes_nothing(card: MadeUp) -> None:
    with capped.Card() as found:
        found.cap(200.0)
        assert card.fractions == [1.0] and card.asked == [0, 0]


def test_without_a_card_nothing_is_capped() -> None:
    with capped.Card() as found:
        assert found.cap(2.0) == 2 * GIB and found.cap(None) is None and found.rest is None


def test_the_other_process_holds_what_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **how: plain(size, dtype=how.get("dtype")))
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"do": "hold", "bytes": 7}\n{"do": "hold", "bytes": 0}\n'))
    capped.hold()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [{"ready": True}, {"held": 7}, {"held": 0}]
