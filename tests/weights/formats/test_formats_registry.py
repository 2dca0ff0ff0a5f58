"""The registry's lookups, and that formats agree with themselves."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from hasten.testing import tiny_model
from hasten.weights import dequantize, formats, linear_bytes
from hasten.weights.formats.dense import Dense

CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
QUANTIZED = sorted(CONFIGS)


def test_names_and_arguments_are_unique() -> None:
    for field in ("name", "load_argument", "choice", "save_method"):
        values = [getattr(one, field) for one in formats.FORMATS if getattr(one, field) is not None]
        assert len(values) == len(set(values)), field
    assert sum(one.by_default for one in formats.FORMATS) == sum(one.exact for one in formats.FORMATS) == 1
    assert formats.choices() == ["4bit", "8bit", "16bit"]
    assert formats.load_arguments() == {"load_in_4bit": "nf4", "load_in_8bit": "int8", "load_in_16bit": "dense"}
    assert list(formats.load_arguments(quantized=True)) == ["load_in_4bit", "load_in_8bit"]
    assert formats.default().name == formats.smallest_loadable().name == "nf4"
    assert formats.dense() is formats.by_choice(None) is formats.by_choice("16bit") is formats.named("dense")
    assert formats.by_load_argument("load_in_8bit").name == "int8"
    assert formats.save_methods() == ["merged_4bit"]
    assert formats.packages() == ["bitsandbytes"]


class Own(Dense):
    def __init__(self, name: str, load_argument: str | None = None) -> None:
        self.name, self.load_argument, self.choice = name, load_argument, None  # pyright: ignore[reportAttributeAccessIssue]


def test_own_formats_are_known_in_a_block_and_in_its_threads() -> None:
    before, linear = tuple(formats.FORMATS), nn.Linear(2, 3)
    first, second = Own("first"), Own("second")
    one, other = formats.registered(first), formats.registered(second)
    with ThreadPoolExecutor(1) as pool:
        with one:
            assert pool.submit(formats.find_format, linear).result() is first
            other.__enter__()
            assert formats.named("second") is formats.find_format(linear) is second
        assert tuple(formats.FORMATS) == (second, *before), "a block that ends first takes its own format alone"
        other.__exit__(None, None, None)
        assert tuple(formats.FORMATS) == before
        assert pool.submit(formats.find_format, linear).result() is formats.dense()


@pytest.mark.parametrize("taken", [("nf4",), ("mine", "load_in_4bit")])
def test_a_name_that_is_taken_is_refused(taken: tuple[str, ...]) -> None:
    before = tuple(formats.FORMATS)
    with pytest.raises(ValueError, match="two weight formats have"), formats.registered(Own(*taken)):
        pytest.fail("registered")
    assert tuple(formats.FORMATS) == before


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_checkpoints_record_names_its_format(name: str) -> None:
    assert formats.stored_format(CONFIGS[name].to_dict()) is formats.named(name)


@pytest.mark.parametrize("record", [{}, {"quant_method": "gptq", "bits": 4}])
def test_other_records_name_none(record: dict[str, Any]) -> None:
    assert formats.stored_format(record) is None


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_an_export_is_recognised_and_holds_what_conversion_gives(name: str) -> None:
    one = formats.named(name)
    assert formats.stored_format(one.export_config(torch.bfloat16, ["lm_head"]) or {}) is one
    linear = nn.Linear(128, 32)
    stored, live = one.quantize(linear.weight.detach()), one.convert(linear)
    assert torch.equal(stored.tensors[""], live.weight.detach())  # pyright: ignore[reportArgumentType]
    assert torch.equal(stored.dense, dequantize(live))


@pytest.mark.parametrize("name", QUANTIZED)
def test_convert_matches_itself_alone_and_has_the_promised_size(name: str) -> None:
    one, linear = formats.named(name), nn.Linear(512, 256)
    live = one.convert(linear)
    assert [other.name for other in formats.FORMATS if not other.exact and other.matches(live)] == [name]
    assert formats.format_of(live) is one and formats.is_quantized(live)
    assert one.holds(live, linear.weight.detach()) and live.bias is linear.bias
    assert one.stored_bytes(live) == pytest.approx(one.bytes_for(256, 512, 2), rel=1e-3)
    assert linear_bytes(live) == one.stored_bytes(live) + 256 * 4
    assert isinstance(one.weight(live), str) != one.fused


def test_modules_without_a_known_weight() -> None:
    assert formats.find_format(nn.Identity()) is None
    assert not formats.is_quantized(tiny_model("llama").get_input_embeddings())
    with pytest.raises(TypeError, match="has no weight that hasten can read"):
        formats.format_of(nn.Identity())
