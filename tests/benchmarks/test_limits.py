"""Floors against figures worked out by hand for the 8B step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import limits
from benchmarks.harness.jobs import JOBS, SHAPES, sizes
from benchmarks.limits import floor_ms

CARD = {"matmul": 800e12, "copy": 4e12, "attention_forward": 500e12, "attention_backward": 400e12}


def test_sizes_are_those_of_the_models() -> None:
    found = sizes(SHAPES["llama-8b"])
    assert found.linears + found.head + found.embeddings == pytest.approx(8.03e9, rel=1e-3)
    tied = sizes(SHAPES["llama-1b"])
    assert tied.embeddings == 0 and tied.linears + tied.head == pytest.approx(1.236e9, rel=1e-3)


@pytest.mark.parametrize("name", ["llama-8b", "llama-1b", "gemma-2b", "command-r-slice"])
def test_sizes_are_those_that_transformers_makes(name: str) -> None:
    from transformers import AutoModelForCausalLM

    from benchmarks.harness.checkpoints import config_of

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    found = sizes(SHAPES[name])
    assert found.linears + found.head + found.embeddings == sum(p.numel() for p in model.parameters()) - vectors


def test_8b_lora_by_hand() -> None:
    floor = floor_ms(JOBS["8b-lora"], "keep", CARD)
    tokens, weights = 8192, 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    assert floor["matmuls"] == pytest.approx(4 * weights * tokens / 800e12 * 1e3)
    assert floor["head"] == pytest.approx(4 * 4096 * 128256 * tokens / 800e12 * 1e3)
    pairs = 4 * 32 * 2048 * 2048 / 2  # visible pairs of a layer, all heads
    by_hand = 32 * pairs * (4 * 128 / 500e12 + 10 * 128 / 400e12) * 1e3  # 2 products forward, 5 backward, 2 FLOP each
    assert floor["attention"] == pytest.approx(by_hand)
    assert floor["weights"] == 0
    assert floor["total"] == pytest.approx(sum(floor[name] for name in ("matmuls", "head", "attention")))


def test_what_is_done_more_costs_more() -> None:
    def one(job: str, mode: str = "keep") -> dict[str, float]:
        return floor_ms(JOBS[job], mode, CARD)

    assert one("8b-lora", "recompute")["matmuls"] == pytest.approx(1.5 * one("8b-lora")["matmuls"])
    assert one("8b-lora", "recompute")["head"] == one("8b-lora")["head"]
    assert one("8b-lora", "default") == one("8b-lora")
    nf4 = 2 * 2.5 * sizes(SHAPES["llama-8b"]).linears / 4e12 * 1e3
    assert one("8b-qlora")["weights"] == pytest.approx(nf4) and one("8b-qlora")["matmuls"] == one("8b-lora")["matmuls"]
    assert one("1b-full")["matmuls"] == pytest.approx(1.5 * one("1b-lora")["matmuls"])
    assert one("1b-full")["head"] == pytest.approx(1.5 * one("1b-lora")["head"]) and one("1b-full")["weights"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for cuDNN where there is none")
def test_a_backend_that_refuses_a_shape_has_no_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def once(function: Callable[[], Any]) -> float:
        function()
        return 2.0

    monkeypatch.setattr(limits, "milliseconds", once)
    found = limits.attention_rates(1, 2, 16, 8)
    flops = 2 * 2 * 16 * 16 * 8
    assert found["attention_by_backend"]["cudnn"] == {"forward": 0, "backward": 0}
    assert found["attention_by_backend"]["flash"] == {"forward": flops / 2e-3, "backward": 2.5 * flops / 2e-3}
    assert found["attention_forward"] == flops / 2e-3 and "attention on cudnn: " in capsys.readouterr().out
    monkeypatch.setattr(limits, "BACKENDS", {"cudnn": limits.BACKENDS["cudnn"]})
    with pytest.raises(RuntimeError, match="no backend"):
        limits.attention_rates(1, 2, 16, 8)
