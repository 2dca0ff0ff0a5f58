"""FastLanguageModel as a user meets it: adapters, dtypes, LoftQ, refusals, bound classes, the report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from device_kit import DEVICE, ON_GPU, assert_near, matches
from peft import PeftModel
from transformers import AutoModelForCausalLM

import hasten
from hasten import FastCohereModel, FastLanguageModel, FastLlamaModel, OptionError
from hasten.testing import relative_error, save_tiny

IDS = torch.arange(6, 30, device=DEVICE)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gemma2"), "gemma2")


def load(folder: Path, **kwargs: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(folder), **{"max_seq_length": 64, "dtype": torch.float32, **kwargs})[0]


def dense(folder: Path, **kwargs: Any) -> Any:
    return load(folder, load_in_4bit=False, **kwargs)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_defaults_are_the_seeds() -> None:
    import inspect

    load_in, adapt = (
        inspect.signature(f) for f in (FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model)
    )
    assert list(load_in.parameters)[:5] == ["model_name", "max_seq_length", "dtype", "load_in_4bit", "load_in_8bit"]
    assert load_in.parameters["load_in_4bit"].default is True
    assert load_in.parameters["random_state"].default == adapt.parameters["random_state"].default == 3407
    assert [p.default for p in list(adapt.parameters.values())[1:6:2]] == [16, 16, "none"]


def test_the_same_arguments_twice_return_the_model_and_others_raise(llama: Path) -> None:
    model = FastLanguageModel.get_peft_model(load(llama), r=4)
    assert isinstance(model, PeftModel)
    assert FastLanguageModel.get_peft_model(model, r=4) is model
    with pytest.raises(OptionError, match="r=4, now 8"):
        FastLanguageModel.get_peft_model(model, r=8)


def test_adapters_are_drawn_from_random_state_and_nothing_else(llama: Path) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = trained(FastLanguageModel.get_peft_model(dense(llama), r=4))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    two = trained(FastLanguageModel.get_peft_model(dense(llama), r=4))
    other = trained(FastLanguageModel.get_peft_model(dense(llama), r=4, random_state=1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_unknown_targets_name_the_near_ones_and_leave_the_model_alone(llama: Path) -> None:
    model = dense(llama)
    names = list(model.state_dict())
    with pytest.raises(OptionError) as caught:
        FastLanguageModel.get_peft_model(model, target_modules=["q_prj", "norm"], modules_to_save=["lm_heat"])
    assert len(caught.value.problems) == 3
    text = str(caught.value)
    assert "did you mean q_proj" in text and "not a Linear layer" in text and "lm_head" in text
    assert list(model.state_dict()) == names


def test_full_finetuning_trains_everything_and_takes_no_adapter(llama: Path) -> None:
    model = load(llama, full_finetuning=True)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(OptionError, match="full_finetuning"):
        FastLanguageModel.get_peft_model(model)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("precision", [None, True, False])
@pytest.mark.parametrize("four_bit", [True, False])
def test_trained_weights_have_the_promised_dtype(
    family: str, precision: bool | None, four_bit: bool, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    options = {"dtype": torch.bfloat16, "load_in_4bit": four_bit, "float32_mixed_precision": precision}
    model = load(folder, **options)
    before = model.train()(IDS).logits
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])
    after = model.train()(input_ids=IDS)
    assert matches(after.logits, before, 2 * torch.finfo(torch.bfloat16).eps) and after.logits.dtype == torch.bfloat16
    model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = torch.bfloat16 if precision is False else torch.float32
    for name, parameter in trained(model).items():
        assert parameter.dtype == wanted and parameter.grad is not None and parameter.grad.dtype == wanted, name
    for parameter in trained(model).values():
        parameter.data = parameter.data.bfloat16()  # what a trainer does to a quantised model on construction
    model.train()
    assert {p.dtype for p in trained(model).values()} == {wanted}


def test_tied_embeddings_stay_one_weight(gemma2: Path, tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(dense(gemma2), r=4, target_modules=["q_proj", "lm_head"])
    base = model.get_base_model()
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        base.get_input_embeddings().weight.sub_(0.1 * base.get_input_embeddings().weight.grad)
    logits = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = FastLanguageModel.from_pretrained(
        str(tmp_path / "adapter"), max_seq_length=64, dtype=torch.float32, load_in_4bit=False
    )[0]
    assert_near(again.eval()(IDS).logits, logits)
    assert again.get_base_model().get_input_embeddings().weight is again.get_base_model().get_output_embeddings().weight


def test_loftq_repairs_what_quantising_broke_and_merges_to_what_was_trained(llama: Path, tmp_path: Path) -> None:
    reference = dense(llama)(IDS).logits
    plain = relative_error(load(llama).train()(IDS).logits, reference)
    model = FastLanguageModel.get_peft_model(load(llama), r=16, loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    logits = model.train()(IDS).logits
    assert relative_error(logits, reference) < 0.9 * plain
    model.save_pretrained_merged(tmp_path / "merged")
    model.save_pretrained(tmp_path / "adapter")
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative_error(merged.to(DEVICE)(IDS).logits, logits) < (1e-4 if ON_GPU else 2e-5)
    again = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), max_seq_length=64, dtype=torch.float32)[0]
    again.save_pretrained_merged(tmp_path / "again")
    files = [path / "model.safetensors" for path in (tmp_path / "merged", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_loftq_refuses_what_it_cannot_do(llama: Path) -> None:
    with pytest.raises(OptionError) as caught:
        FastLanguageModel.get_peft_model(dense(llama), loftq_config={"loftq_bits": 4, "loftq_iter": 5, "rank": 3})
    assert len(caught.value.problems) == 3


def test_bound_classes_load_their_family_only(llama: Path) -> None:
    arguments = {"max_seq_length": 64, "load_in_4bit": False}
    assert FastLlamaModel.from_pretrained(str(llama), **arguments)[0].config.model_type == "llama"
    with pytest.raises(OptionError, match="loads 'cohere' models, the checkpoint is a 'llama'"):
        FastCohereModel.from_pretrained(str(llama), **arguments)
    assert issubclass(FastLlamaModel, FastLanguageModel)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout > 0"),
        ({"use_dora": True}, "adapter variant DoraLinearVariant"),
        ({"lora_bias": True}, "bias on lora_B"),
        ({}, "plain LoRA"),
    ],
)
def test_the_report_says_which_layers_leave_the_fused_path(llama: Path, arguments: dict[str, Any], why: str) -> None:
    model = FastLanguageModel.get_peft_model(dense(llama), r=4, target_modules=["q_proj"], **arguments)
    rows = {row.module.split()[0]: row for row in hasten.report(model).rows}
    assert rows["q_proj"].why == why and rows["q_proj"].count == 4
    together = ON_GPU and why != "plain LoRA"  # where one op computes q, k and v
    assert rows["k_proj"].why == (f"its sibling q_proj: {why}" if together else "no adapter")


def test_layers_to_transform_rslora_and_any_lora_config_field(llama: Path) -> None:
    model = FastLanguageModel.get_peft_model(
        dense(llama), r=4, layers_to_transform=[1], use_rslora=True, rank_pattern={"q_proj": 2}
    )
    assert {name.split(".")[4] for name in trained(model)} == {"1"}
    layer = model.get_base_model().model.layers[1].self_attn
    assert layer.k_proj.scaling["default"] == 16 / 2 and layer.q_proj.lora_A["default"].weight.shape[0] == 2


def test_restore_gives_back_stock_types_and_patched_lends_overlays(llama: Path) -> None:
    model = dense(llama)
    logits = model(IDS).logits
    hasten.restore(model)
    assert type(model).__module__.startswith("transformers.") and not hasattr(model, "save_pretrained_merged")
    assert_near(model(IDS).logits, logits)
    with hasten.patched(model):
        assert "norm overlay" in str(hasten.report(model))
    assert "norm overlay" not in str(hasten.report(model))


def test_two_models_with_other_settings_do_not_touch_each_other(llama: Path) -> None:
    short, long = dense(llama, max_seq_length=8), load(llama, max_seq_length=64)
    with pytest.raises(hasten.InputError, match="max_seq_length=8"):
        short(IDS)
    assert long.train()(IDS).logits.shape == (1, 24, 288)
    adapted = FastLanguageModel.get_peft_model(long, r=4)
    assert not any("lora" in name for name, _ in short.named_parameters())
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is None for p in short.parameters())


def test_a_step_without_one_label_raises(llama: Path) -> None:
    model = FastLanguageModel.get_peft_model(dense(llama), r=4)
    with pytest.raises(hasten.DatasetError, match="all labels of this optimizer step are masked"):
        model(input_ids=IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=0)


def test_a_softcap_is_never_dropped(gemma2: Path) -> None:
    model = dense(gemma2)
    assert model.config._attn_implementation == "eager" and "softcap on scores" in str(hasten.report(model))
    with pytest.raises(OptionError, match="softcap"):
        dense(gemma2, attn_implementation="sdpa")
