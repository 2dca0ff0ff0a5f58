"""`model.generate` calls the model's engine: the stock one by default, another where the state holds one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten import FastLanguageModel
from hasten.errors import OptionError
from hasten.inference.decode import DecodeEngine
from hasten.inference.engine import StockEngine, engine_of
from hasten.methods import CausalLMMethods
from hasten.options import LoadOptions
from hasten.patching import apply
from hasten.state import Engine, GenerateCall, state_of
from hasten.testing import save_tiny, tiny_model


class Recording:
    """An engine as a new file would bring it."""

    name = "recording"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, GenerateCall]] = []

    def check(self, model: Any, options: LoadOptions) -> list[str]:
        return []

    def generate(self, model: Any, call: GenerateCall) -> Any:
        self.calls.append((model, call))
        return call.stock(*call.args, **call.kwargs)


def test_generate_calls_the_models_engine(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path, "llama"))
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=64, load_in_4bit=False)
    ids = torch.arange(6, 20, device=model.device)[None]
    assert isinstance(engine_of(model), DecodeEngine if model.device.type == "cuda" else StockEngine)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    engine: Engine = Recording()
    state_of(model).engine = engine
    assert engine_of(model) is engine
    assert torch.equal(model.eval().generate(ids, max_new_tokens=4, do_sample=False), expected)
    (called, call), *others = engine.calls  # pyright: ignore[reportAttributeAccessIssue]
    assert called is model and not others
    assert call.args == (ids,) and call.kwargs == {"max_new_tokens": 4, "do_sample": False}
    peft = FastLanguageModel.get_peft_model(model, r=4)
    peft.eval().generate(input_ids=ids, max_new_tokens=4)
    assert len(engine.calls) == 2 and engine_of(peft) is engine  # pyright: ignore[reportAttributeAccessIssue]


def refusal(folder: Path, **arguments: Any) -> str:
    asked = {"max_seq_length": 64, "load_in_4bit": False, "float8_kv_cache": True, **arguments}
    with pytest.raises(OptionError) as caught:
        FastLanguageModel.from_pretrained(str(folder), **asked)
    return str(caught.value)


def test_an_fp8_cache_that_no_call_would_use_is_refused(tmp_path: Path) -> None:
    """For models that transformers' own loop serves: `float8_kv_cache` would be ignored in silence."""
    said = refusal(save_tiny(tmp_path / "gpt2", "gpt2"))
    assert "float8_kv_cache=True" in said and "not every part of the model runs hasten's overlay" in said
    scaled = {"rope_type": "dynamic", "factor": 2.0}
    said = refusal(save_tiny(tmp_path / "llama", "llama"), rope_scaling=scaled, max_seq_length=256)
    assert "RoPE of type dynamic depends on the length" in said
    plain, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "gpt2"), max_seq_length=64, load_in_4bit=False, use_gradient_checkpointing=False
    )
    assert plain.generate(torch.tensor([[5, 6]], device=plain.device), max_new_tokens=2).shape[0] == 1


def test_engines_refuse_an_fp8_cache_that_they_do_not_have() -> None:
    model = tiny_model("llama")
    apply(model, methods=CausalLMMethods)
    asked, plain = LoadOptions(float8_kv_cache=True), LoadOptions()
    assert "has no FP8 cache" in StockEngine().check(model, asked)[0] and not StockEngine().check(model, plain)
    served, unserved = DecodeEngine(("cpu",)), DecodeEngine(("cuda",))
    assert not served.check(model, asked) and not unserved.check(model, plain)
    assert "the model is not on a GPU" in unserved.check(model, asked)[0]
