"""`model.generate` calls the model's engine: the stock one by default, another where the state holds one."""

from pathlib import Path
from typing import Any

import torch

from hasten import FastLanguageModel
from hasten.inference.decode import DecodeEngine
from hasten.inference.engine import StockEngine, engine_of
from hasten.options import LoadOptions
from hasten.state import Engine, GenerateCall, state_of
from hasten.testing import save_tiny


class Recording:
    """An engine as a new file would bring it."""

    name = "recording"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, GenerateCall]] = []

    def check(self, options: LoadOptions) -> list[str]:
        return [] if options.max_seq_length <= 64 else ["max_seq_length is over 64"]

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


def test_an_engine_names_every_problem() -> None:
    assert StockEngine().check(LoadOptions(max_seq_length=4096)) == []
    assert Recording().check(LoadOptions(max_seq_length=4096)) == ["max_seq_length is over 64"]
