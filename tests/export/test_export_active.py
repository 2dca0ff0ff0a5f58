"""A merge reads everything that is active: nested and mixed PeftModels, prompts around LoRA, adapters that change nothing."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from export_kit import NF4, adapt, base_folder, close, contents, load, logits, tensors, train
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from hasten.errors import ExportError
from hasten.export import save_merged
from hasten.methods import CausalLMMethods
from hasten.patching import apply

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
"""PEFT warns of what these tests ask for on purpose."""


def lora(**config: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config})


def tuned(model: Any, *configs: Any) -> Any:
    for config in configs:
        model = get_peft_model(model, config)
        train(model)
    return model.eval()


def test_nested_adapters_are_summed(tmp_path: Path) -> None:
    model = tuned(load(base_folder(tmp_path / "base")), lora(), lora(target_modules=["v_proj", "q_proj"]))
    save_merged(model, tmp_path / "out")
    close(logits(load(tmp_path / "out")), logits(model))


def test_a_prompt_around_a_lora_is_found_from_every_model_inside(tmp_path: Path) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = tuned(load(base_folder(tmp_path / "base")), lora(), prompt)
    inner = model.base_model
    for start in (model, inner, inner.base_model.model):
        with pytest.raises(ExportError, match="PROMPT_TUNING adds its prompt to the input"):
            save_merged(start, tmp_path / "out")
    with (
        model.disable_adapter(),
        pytest.raises(ExportError, match=r"prompt_encoder\S+ would not be in the merged model"),
    ):
        save_merged(model, tmp_path / "out")  # the LoRA inside is active, but the prompt was trained too
    expected = logits(inner)
    del model
    save_merged(inner, tmp_path / "out")
    close(logits(load(tmp_path / "out")), expected)


@pytest.mark.parametrize("second", [LoHaConfig(r=2, target_modules=["v_proj"]), lora(task_type=None)])
def test_mixed_models_are_merged_if_all_of_it_is_lora(tmp_path: Path, second: Any) -> None:
    model: Any = get_peft_model(load(base_folder(tmp_path / "base")), lora(task_type=None), mixed=True)
    model.add_adapter("other", second)
    model.set_adapter(["default", "other"])
    train(model)
    if isinstance(second, LoHaConfig):
        with pytest.raises(ExportError, match="v_proj: Linear is not a LoRA layer but part of LOHA"):
            save_merged(model, tmp_path / "out")
        model.set_adapter("default")  # the other one is not active
    save_merged(model, tmp_path / "out")
    close(logits(load(tmp_path / "out")), logits(model))


def test_the_methods_of_a_peft_model_made_by_peft_reach_its_adapter(tmp_path: Path) -> None:
    """PeftModel passes them on to the causal LM, which must find the way back."""
    base = base_folder(tmp_path / "base")
    causal_lm = load(base)
    apply(causal_lm, methods=CausalLMMethods)
    model = adapt(causal_lm)
    assert type(model).__module__.startswith("peft.")
    model.save_pretrained_merged(tmp_path / "lora", save_method="lora")
    again = PeftModel.from_pretrained(load(base), tmp_path / "lora")
    close(logits(again), logits(model))


def test_two_peft_models_side_by_side_are_not_guessed_between(tmp_path: Path) -> None:
    causal_lm = load(base_folder(tmp_path / "base"))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    both = [get_peft_model(causal_lm, prompt), get_peft_model(causal_lm, prompt)]
    with pytest.raises(ExportError, match="2 PEFT models are around this model"):
        save_merged(causal_lm, tmp_path / "out", save_method="lora")
    del both[0]
    save_merged(causal_lm, tmp_path / "out", save_method="lora")
    assert list(tensors(tmp_path / "out")) == ["prompt_embeddings"]


def test_trained_weights_outside_the_stock_model_are_not_dropped(tmp_path: Path) -> None:
    model = adapt(load(base_folder(tmp_path / "base")))
    model.value_head = torch.nn.Linear(64, 1)
    with pytest.raises(ExportError, match=r"value_head.weight, value_head.bias would not be in the merged model"):
        save_merged(model, tmp_path / "out")
    model.value_head.requires_grad_(False)
    save_merged(model, tmp_path / "out")


def test_parameters_of_linear_layers_are_refused_by_name(tmp_path: Path) -> None:
    model = adapt(load(base_folder(tmp_path / "base")), target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(ExportError, match=r"q_proj: LoRA on Linear through ParamWrapper cannot be merged"):
        save_merged(model, tmp_path / "out")


def test_a_fresh_adapter_equals_the_base_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_folder(tmp_path / "base")
    model = get_peft_model(load(base), lora())
    with caplog.at_level(logging.WARNING, "hasten"):
        save_merged(model, tmp_path / "fresh")
    assert "the adapter changes no weight" in caplog.text
    assert all(torch.equal(tensor, tensors(base)[name]) for name, tensor in tensors(tmp_path / "fresh").items())
    caplog.clear()
    train(model)
    with caplog.at_level(logging.WARNING, "hasten"):
        save_merged(model, tmp_path / "trained")
    assert "changes no weight" not in caplog.text


@pytest.mark.parametrize("quantisation", [None, NF4], ids=["dense", "nf4"])
def test_adalora_is_merged_onto_the_unquantised_base(tmp_path: Path, quantisation: Any) -> None:
    base = base_folder(tmp_path / "base")
    config = AdaLoraConfig(task_type="CAUSAL_LM", init_r=6, target_r=2, total_step=10, target_modules=["q_proj"])
    model: Any = get_peft_model(load(base, quantisation), config)
    train(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.ranknum["default"].data.fill_(3.0)  # as after pruning
    save_merged(model, tmp_path / "out")
    b, a, e = (part["default"].detach() for part in (layer.lora_B, layer.lora_A, layer.lora_E))
    name = "model.layers.1.self_attn.q_proj.weight"
    wanted = tensors(base)[name] + b @ (a * e) * layer.scaling["default"] / (3 + 1e-5)
    torch.testing.assert_close(tensors(tmp_path / "out")[name], wanted, rtol=1e-6, atol=1e-7)
    if quantisation is None:
        layer.ranknum["default"].data.fill_(3.0)
        close(logits(load(tmp_path / "out")), logits(model))


def test_exports_leave_the_folder_alone_when_refused(tmp_path: Path) -> None:
    model = tuned(load(base_folder(tmp_path / "base")), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    before = contents(tmp_path)
    with pytest.raises(ExportError):
        save_merged(model, tmp_path / "out")
    assert contents(tmp_path) == before
