"""`generate` refuses lengths and sampling parameters that are no numbers of their kind."""

from typing import Any

import pytest
import torch
from support import twins

from hasten.errors import OptionError

IDS = torch.tensor([[1, 9, 30, 77]])


@pytest.fixture(scope="module")
def model() -> Any:
    return twins("llama")[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.7"),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("top_p", "0.9"),
        ("top_k", -5),
        ("top_k", 2.5),
        ("min_p", 2),
        ("max_new_tokens", 0),
        ("max_new_tokens", -3),
        ("max_new_tokens", "5"),
        ("max_new_tokens", 5.0),
        ("max_new_tokens", True),
        ("max_length", float("nan")),
        ("num_beams", 0),
        ("num_return_sequences", "2"),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("nan")),
        ("do_sample", "false"),
        ("use_cache", "no"),
        ("do_sample", 1),
    ],
)
def test_a_value_of_another_kind(model: Any, name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name):
        model.generate(IDS, **{"max_new_tokens": 2, name: value})


def test_every_fault_is_named_at_once_and_none_means_unset(model: Any) -> None:
    with pytest.raises(OptionError, match="(?s)2 problems.*temperature.*top_p|top_p.*temperature"):
        model.generate(IDS, temperature=-1, top_p=2)
    assert model.generate(IDS, max_new_tokens=2, temperature=None, top_p=None, do_sample=False).shape == (1, 6)
