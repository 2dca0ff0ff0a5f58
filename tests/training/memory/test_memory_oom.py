"""An out-of-memory error says what the step was and which changes would free memory, in a forward and in a model's own backward."""

import gc
import weakref
from typing import Any

import pytest
import torch
from memory_kit import policy_of
from test_memory_policy import DEVICE, batch, prepared, step
from training_kit import lora

from hasten.state import causal_lm_of
from hasten.training import checkpointing

pytestmark = pytest.mark.usefixtures("offload_everything")


@pytest.mark.parametrize("mode", [False, True, "auto"])
def test_out_of_memory_in_a_forward_names_the_savings(mode: Any) -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, mode)
    layer = causal_lm_of(model).model.layers[1]
    layer.self_attn.register_forward_pre_hook(short_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="short") as raised:
        model(input_ids=batch(4, 200), labels=batch(4, 200))
    (note,) = raised.value.__notes__
    assert "4 sequences of 200 tokens" in note and "per_device_train_batch_size=2" in note and "MiB less" in note


def short_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("short")


def test_out_of_memory_before_the_first_plan_asks_for_no_memory() -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, "auto")
    policy_of(model).planner.new_plan = short_of_memory
    causal_lm_of(model).model.embed_tokens.register_forward_pre_hook(short_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="short") as raised:
        model(input_ids=batch(4, 200), labels=batch(4, 200))
    assert raised.value.__context__ is None and "4 sequences of 200 tokens" in raised.value.__notes__[0]


def report_failure(*models: Any) -> None:
    """What torch does at a failed allocation on a GPU: calls the observer of every model."""
    for one in models:
        policy_of(one).advisor.report_failure(2**46)


def test_a_backward_that_runs_out_of_memory_tells_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """As torch reports a failed allocation: its own observer on a GPU; elsewhere this test makes the report."""

    def fail(*_: Any) -> None:
        if DEVICE == "cuda":
            torch.empty(2**46, dtype=torch.uint8, device=DEVICE)
        else:
            report_failure(other, model)
            short_of_memory()

    model, other = prepared("llama", lora()), prepared("llama", lora())
    for one in (other, model):
        checkpointing.enable(one, False)
    other(input_ids=batch(), labels=batch())
    loss = model(input_ids=batch(4, 200), labels=batch(4, 200)).loss
    with pytest.raises(torch.OutOfMemoryError):
        fail()
    assert "4 sequences" not in caplog.text  # that was no backward
    next(p for p in model.parameters() if p.requires_grad).register_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    assert caplog.text.count("4 sequences of 200 tokens") == 1 and "65536.00 GiB more" in caplog.text
    assert "per_device_train_batch_size=2" in caplog.text


@pytest.mark.parametrize("again", [False, True], ids=["first", "after one of its own"])
@pytest.mark.parametrize("mode", [False, "auto"])
def test_a_backward_of_something_else_is_not_explained(
    mode: Any, again: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Another model's, whichever ran last, and one of no model."""
    model, other = prepared("llama", lora()), prepared("llama", lora())
    for one in (other, model):
        checkpointing.enable(one, mode)
    loss = other(input_ids=batch(1, 40), labels=batch(1, 40)).loss
    mine = model(input_ids=batch(4, 200), labels=batch(4, 200)).loss
    if again:
        mine.backward()
    foreign = torch.ones(2, requires_grad=True)
    foreign.register_hook(lambda _: report_failure(other, model))
    foreign.sum().backward()
    assert "out of memory" not in caplog.text
    next(p for p in other.parameters() if p.requires_grad).register_hook(lambda _: report_failure(other, model))
    loss.backward()
    assert caplog.text.count("1 sequence of 40 tokens") == 1 and "4 sequences" not in caplog.text


@pytest.mark.parametrize("how", ["logits", "tuple", "scores", "layers"])
def test_a_backward_is_known_by_whatever_the_forward_returns(how: str, caplog: pytest.LogCaptureFixture) -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, "auto")
    ids = batch(4, 200)
    if how == "logits":
        loss = model(input_ids=ids).logits.sum()
    elif how == "tuple":
        loss = model(input_ids=ids, labels=ids, return_dict=False)[0]
    elif how == "scores":
        loss = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum()
    else:  # the head is no overlay
        loss = causal_lm_of(model).model(input_ids=ids).last_hidden_state.sum()
        policy_of(model).advisor.batch_shape = (4, 200)
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda _: report_failure(model))
    loss.backward()
    assert caplog.text.count("4 sequences of 200 tokens") == 1


def test_an_observer_keeps_no_model_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    attached: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", attached.append, raising=False)
    model = prepared("llama", lora())
    checkpointing.enable(model, "auto")
    for _ in range(3):
        step(model, batch())
    assert len(attached) == 1, "once for each policy"
    advisor = weakref.ref(policy_of(model).advisor)
    del model
    gc.collect()
    assert advisor() is None
    attached[0](0, 2**46, 0, 0)


def test_an_error_that_carries_the_advice_is_not_in_the_log_too(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> None:
        report_failure(model)
        short_of_memory()

    model = prepared("llama", lora())
    checkpointing.enable(model, True)
    loss = model(input_ids=batch(), labels=batch()).loss
    causal_lm_of(model).model.layers[1].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        loss.backward()
    assert raised.value.__notes__ and "sequences of" not in caplog.text


def test_out_of_memory_where_a_layer_is_recomputed() -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, True)
    loss = model(input_ids=batch(4, 200), labels=batch(4, 200)).loss
    causal_lm_of(model).model.layers[1].self_attn.register_forward_pre_hook(short_of_memory)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        loss.backward()
    assert "4 sequences of 200 tokens" in raised.value.__notes__[0]
