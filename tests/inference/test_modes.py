"""Evaluation mode inside generate, and the way to inference and back."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import prompts, twins

from hasten.inference import for_inference
from hasten.overlays.cache_name import CACHE
from hasten.training import checkpointing, for_training

ROW = prompts(2)[1][None]


def with_adapter(dropout: float = 0.0) -> Any:
    """A PeftModel over an overlaid model, its adapter away from zero."""
    ours, _ = twins("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(ours, config)


def modes(model: Any) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_generate_evaluates_and_puts_each_module_back() -> None:
    """With dropout that would change every token, and a frozen part in evaluation mode inside a model in training."""
    model = with_adapter(dropout=0.9).eval()
    wanted = model.generate(input_ids=ROW, max_new_tokens=8, do_sample=False)
    model.train()
    model.get_submodule("base_model.model.model.layers.1").eval()
    checkpointing.enable(model, True)
    before = modes(model)
    assert torch.equal(model.generate(input_ids=ROW, max_new_tokens=8, do_sample=False), wanted)
    assert modes(model) == before and model.is_gradient_checkpointing


def test_generate_puts_the_mode_back_after_an_error() -> None:
    model = with_adapter().train()

    def stop(*_: Any) -> list[int]:
        raise RuntimeError("from inside")

    with pytest.raises(RuntimeError, match="from inside"):
        model.generate(input_ids=ROW, max_new_tokens=4, prefix_allowed_tokens_fn=stop)
    assert all(modes(model).values())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_to_inference_and_back(mode: bool, wrapped: bool) -> None:
    model = with_adapter() if wrapped else twins("llama")[0]
    checkpointing.enable(model, mode)
    assert for_training(model) is model
    state = (modes(model), model.is_gradient_checkpointing, model.config.use_cache)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert for_inference(model) is model
    assert not any(modes(model).values()) and not model.is_gradient_checkpointing and model.config.use_cache
    with torch.no_grad():
        assert model(ROW)[CACHE].get_seq_length() == ROW.shape[1]
    assert for_training(model) is model
    assert (modes(model), model.is_gradient_checkpointing, model.config.use_cache) == state
    assert model.is_gradient_checkpointing is mode
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model(input_ids=ROW, labels=ROW).loss.backward()


def test_generating_in_between_does_not_change_training() -> None:
    """The gradients of a step are the same with and without a generation before it."""
    gradients = []
    for generates in (False, True):
        torch.manual_seed(0)
        model = with_adapter().train()
        if generates:
            model.generate(input_ids=ROW, max_new_tokens=4, do_sample=False)
        model(input_ids=ROW, labels=ROW).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 0
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
