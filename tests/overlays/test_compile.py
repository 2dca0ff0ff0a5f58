"""`torch.compile(fullgraph=True)` and `torch.export` take a patched model, its forward and its training loss."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from device_kit import DEVICE, GRADIENTS
from peft import LoraConfig, get_peft_model

from hasten.errors import InputError
from hasten.patching import apply, plan
from hasten.testing import relative_error, tiny_model

IDS = torch.arange(6, 26).reshape(2, 10)
MASK = torch.tensor([[1] * 6 + [0] * 4, [1] * 10])
FULL = torch.ones_like(MASK)
POSITIONS = torch.arange(10)[None]
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(family: str = "llama", max_seq_length: int | None = None) -> Any:
    layers: dict[str, Any] = {"layer_types": ["sliding_attention"]} if family == "gemma2" else {}
    model = tiny_model(family, amplify=2.0, num_hidden_layers=1, **layers)
    apply(model, plan(model, max_seq_length=max_seq_length))
    return model


def _compiled(model: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


INPUTS = {
    "mask": {"attention_mask": MASK},
    "mask and positions": {"attention_mask": FULL, "position_ids": POSITIONS},
    "positions": {"position_ids": POSITIONS},
    "packed": {"position_ids": PACKED},
}


def _train(model: Any, call: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = call(input_ids=IDS, labels=IDS, use_cache=False, **given).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.full)])
def test_the_training_loss_compiles(family: str, given: str) -> None:
    model = _model(family).train()
    expected = _train(model, model, INPUTS[given])
    found = _train(model, _compiled(model), INPUTS[given])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-5, name


def test_the_training_loss_of_a_lora_compiles() -> None:
    model = get_peft_model(_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    given = {"attention_mask": MASK, "num_items_in_batch": torch.tensor(14)}
    expected, found = _train(model, model, given), _train(model, _compiled(model), given)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-5, name


@pytest.mark.parametrize("given", INPUTS)
def test_the_forward_compiles_and_exports(given: str) -> None:
    model = _model()
    inputs = {"input_ids": IDS, "use_cache": False, **INPUTS[given]}
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(_compiled(model)(**inputs).logits, expected)
        exported: Any = torch.export.export(model, (), inputs, strict=False).module()
        torch.testing.assert_close(exported(**inputs).logits, expected)


def test_the_training_loss_exports() -> None:
    model = _model().train()
    inputs = {"input_ids": IDS, "labels": IDS, "attention_mask": MASK, "use_cache": False}
    exported: Any = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs).loss, model(**inputs).loss)


def test_a_graph_does_not_mix_documents() -> None:
    """Where the eager forward would isolate packed documents itself, the graph asserts that there are none."""
    model = _model()
    inputs = {"input_ids": IDS, "attention_mask": FULL, "use_cache": False}
    compiled = _compiled(model)
    with torch.no_grad():
        compiled(**inputs, position_ids=POSITIONS)
        with pytest.raises(RuntimeError, match="several documents"):
            compiled(**inputs, position_ids=PACKED)


def test_a_graph_checks_the_length() -> None:
    model = _model(max_seq_length=8)
    inputs = {"input_ids": IDS, "use_cache": False}
    compiled = _compiled(model)
    with torch.no_grad():
        short = {"position_ids": PACKED}  # of two documents of 4 and 6 tokens
        torch.testing.assert_close(compiled(**inputs, **short).logits, model(**inputs, **short).logits)
        with pytest.raises(RuntimeError, match="max_seq_length=8"):
            compiled(**inputs, position_ids=POSITIONS)
        with pytest.raises(InputError, match="max_seq_length=8"):
            model(**inputs, position_ids=POSITIONS)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_right_padded_generation_is_no_packed_sequence(family: str, use_cache: bool) -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    settings = {"attention_mask": mask, "use_cache": use_cache, "do_sample": False, "max_new_tokens": 4}
    stock: Any = tiny_model(family)
    model: Any = tiny_model(family)
    apply(model)
    assert torch.equal(model.generate(ids, **settings), stock.generate(ids, **settings))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_token_after_right_padding_sees_the_prompt_in_the_kernels(family: str, kernels: None) -> None:
    """transformers gives it a position that the prompt has too: it counts on from the padding's 0."""
    given = {"input_ids": [9, 10, 0, 0, 11], "attention_mask": [1, 1, 0, 0, 1], "position_ids": [0, 1, 0, 0, 1]}
    inputs = {name: torch.tensor([values], device=DEVICE) for name, values in given.items()}
    stock, model = (tiny_model(family, amplify=2.0).to(DEVICE) for _ in range(2))
    apply(model)
    with torch.no_grad():
        ours, theirs = (m(**inputs, use_cache=False).logits[:, -1] for m in (model, stock))
    assert relative_error(ours, theirs) < GRADIENTS
