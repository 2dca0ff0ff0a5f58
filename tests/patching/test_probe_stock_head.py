"""A causal LM whose forward stays stock: router losses as in transformers, hasten's methods, the length check, the report."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from device_kit import DEVICE, assert_near, matches

from hasten import FastLanguageModel
from hasten.errors import InputError, OptionError
from hasten.overlays import StockHeadOverlay
from hasten.patching import apply, plan, report, restore
from hasten.testing import tiny_tokenizer
from hasten.testing.tiny_types import tiny_model_of
from hasten.training import checkpointing
from hasten.training.trainer import max_seq_length_of

IDS = torch.arange(6, 26, device=DEVICE)[None]


def _load(name: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    stock = tiny_model_of(name)
    stock.config.output_router_logits = False
    stock.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    arguments = {"max_seq_length": 24, "load_in_4bit": False, "dtype": torch.float32, **options}
    return FastLanguageModel.from_pretrained(str(folder), **arguments)[0], stock.to(DEVICE)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("by_config", [True, False])
def test_router_losses_are_stock(name: str, training: bool, by_config: bool, tmp_path: Path) -> None:
    ours, stock = _load(name, tmp_path, full_finetuning=True, use_gradient_checkpointing=False)
    for model in (ours, stock):
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
    kwargs = {} if by_config else {"output_router_logits": True}
    plain = stock.train(training)(IDS, labels=IDS).loss
    if by_config:
        ours.config.output_router_logits = stock.config.output_router_logits = True
    got, expected = (m.train(training)(IDS, labels=IDS, **kwargs) for m in (ours, stock))
    assert type(got) is type(expected) and list(got) == list(expected)
    assert_near(got.loss, expected.loss)
    assert_near(got.aux_loss, expected.aux_loss)
    assert abs(float((got.loss - plain).detach())) > 0.1


def test_trl_gets_the_router_loss_that_it_asks_for(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTTrainer

    import hasten

    model, _ = _load("qwen3_moe", tmp_path / "model")
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    arguments = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = SFTTrainer(
        model,
        args=hasten.sft_config(model, output_dir=str(tmp_path / "out"), logging_steps=1, **arguments),
        train_dataset=Dataset.from_list([{"text": f"hello {i}"} for i in range(8)]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert any(float(entry.get("aux_loss", 0)) > 0 for entry in trainer.state.log_history)


def test_methods_signature_and_length_check(tmp_path: Path) -> None:
    model, stock = _load("mixtral", tmp_path)
    assert isinstance(model, StockHeadOverlay) and type(model).__name__ == "MixtralForCausalLM"
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)
    assert hasattr(model, "save_pretrained_merged") and max_seq_length_of(model) == 24
    with pytest.raises(InputError, match="max_seq_length=24"):
        model(torch.arange(6, 31, device=DEVICE)[None])
    with pytest.raises(InputError, match="max_seq_length=24"):
        model(inputs_embeds=torch.zeros(1, 25, 64, device=DEVICE))
    with pytest.raises(InputError, match="at most 4 new tokens"):
        model.generate(IDS, max_new_tokens=5)
    assert matches(model.eval()(IDS).logits, restore(copy.deepcopy(model))(IDS).logits)
    assert type(restore(model)) is type(stock)


def test_right_padded_prompts_are_continued_as_alone(tmp_path: Path) -> None:
    model, stock = _load("gpt2", tmp_path)
    padded = torch.cat([IDS[:, :8], torch.zeros(1, 4, dtype=torch.long, device=DEVICE)], 1)
    got = model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=4, do_sample=False)
    expected = stock.generate(IDS[:, :8], max_new_tokens=4, do_sample=False)
    assert torch.equal(got[:, 12:], expected[:, 8:])


def test_the_report_says_that_logits_are_materialised(tmp_path: Path) -> None:
    model, _ = _load("vaultgemma", tmp_path)
    row = next(row for row in report(model).rows if row.module == "VaultGemmaForCausalLM")
    assert row.runs == "stock" and "final_logit_softcapping" in row.why and "materialises all logits" in row.why
    gpt2 = tiny_model_of("gpt2")
    apply(gpt2, plan(gpt2))
    assert "GPT2LMHeadModel (gpt2): stock transformers" in str(report(gpt2))


def test_a_stock_head_survives_copies() -> None:
    model: Any = tiny_model_of("mixtral")
    model.to(DEVICE)
    apply(model, plan(model, max_seq_length=24))
    twin = copy.deepcopy(model)
    assert isinstance(twin, StockHeadOverlay) and torch.equal(twin(IDS).logits, model(IDS).logits)


def test_the_default_checkpointing_is_off_where_layers_cannot_be_recomputed() -> None:
    model = tiny_model_of("ctrl")
    apply(model, plan(model))
    assert "transformers cannot recompute" in checkpointing.enable(model, "unsloth")[0]
    assert not checkpointing.is_on(model)
    for mode in (True, "auto", "offload"):
        with pytest.raises(OptionError, match="cannot recompute"):
            checkpointing.enable(model, mode)
