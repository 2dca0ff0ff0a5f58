"""Putting overlays on and off: ids, keys and types, hooks, PEFT, two models side by side, nothing global."""

import copy
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model

from hasten.errors import ContractError, InputError, PatchError
from hasten.families import FAMILIES
from hasten.overlays import HeadOverlay, NormOverlay, Overlay
from hasten.patching import apply, is_patched, patched, plan, report, restore
from hasten.state import ATTRIBUTE, state_of
from hasten.testing import tiny_model

IDS = torch.arange(6, 30)[None]


def _snapshot(model: Any) -> tuple[Any, ...]:
    parameters = {name: (id(p), p._version) for name, p in model.named_parameters()}
    return list(model.state_dict()), parameters, [(name, type(m), id(m)) for name, m in model.named_modules()]


@pytest.mark.parametrize("name", FAMILIES)
def test_restore_gives_back_types_ids_and_keys(name: str) -> None:
    model = tiny_model(name)
    before, logits = _snapshot(model), model(IDS).logits
    apply(model)
    assert is_patched(model)
    assert list(model.state_dict()) == before[0]
    assert [id(p) for p in model.parameters()] == [i for i, _ in before[1].values()]
    assert restore(model) is model
    assert _snapshot(model) == before
    assert not is_patched(model) and state_of(model).plan is None
    assert torch.equal(model(IDS).logits, logits)


def test_patched_modules_are_what_they_were() -> None:
    model = tiny_model("llama")
    stock = type(model)
    apply(model)
    assert isinstance(model, stock) and type(model).__name__ == stock.__name__
    assert (type(model).__module__, type(model).__qualname__) == (stock.__module__, stock.__qualname__)
    assert "hasten:LlamaRMSNorm" in repr(model)
    twin = copy.deepcopy(model)
    assert is_patched(twin) and torch.equal(twin(IDS).logits, model(IDS).logits)


def test_planning_changes_nothing_and_prints() -> None:
    model = tiny_model("gemma2")
    before = _snapshot(model)
    planned = plan(model)
    assert _snapshot(model) == before
    # 4 layers x (layer, attention, mlp, 4 norms) + final norm + head + backbone
    assert len(planned.actions) == 4 * 7 + 3 and not planned.skips and not planned.problems
    assert "decoder layer (gemma2 family)" in str(planned)


def test_applying_twice_is_applying_once() -> None:
    model = tiny_model("qwen3")
    apply(model)
    types = [type(m) for m in model.modules()]
    apply(model)
    assert [type(m) for m in model.modules()] == types


def test_context_manager_leaves_the_model_as_it_came() -> None:
    model = tiny_model("cohere")
    with patched(model) as inside:
        assert inside is model and is_patched(model)
    assert not is_patched(model)
    with pytest.raises(ZeroDivisionError), patched(model):
        _ = 1 / 0
    assert not is_patched(model)
    apply(model)
    with patched(model):
        pass
    assert is_patched(model)


def test_two_models_with_different_facts_do_not_meet() -> None:
    one, other = tiny_model("llama", rms_norm_eps=1e-2), tiny_model("llama", rms_norm_eps=1e-6)
    stock = [copy.deepcopy(one)(IDS).logits, copy.deepcopy(other)(IDS).logits]
    apply(one, plan(one, max_seq_length=10))
    apply(other)
    torch.testing.assert_close(other(IDS).logits, stock[1])
    with pytest.raises(InputError, match="max_seq_length=10"):
        one(IDS)
    restore(one)
    torch.testing.assert_close(one(IDS).logits, stock[0])
    assert is_patched(other)


def test_nothing_global_changes() -> None:
    import transformers.models.llama.modeling_llama as llama
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def snapshot() -> tuple[Any, ...]:
        members = {name: id(value) for name, value in vars(llama).items()}
        members |= {
            f"{c}.{n}": id(v) for c in ("LlamaRMSNorm", "LlamaForCausalLM") for n, v in vars(getattr(llama, c)).items()
        }
        return members, dict(ALL_ATTENTION_FUNCTIONS), id(transformers.Trainer.compute_loss), id(get_peft_model)

    before = snapshot()
    model = apply_and_train(tiny_model("llama"))
    restore(model)
    assert snapshot() == before


def apply_and_train(model: Any) -> Any:
    apply(model)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return model


@pytest.mark.parametrize("patch_first", [True, False])
def test_peft_before_and_after(patch_first: bool) -> None:
    def adapt(model: Any) -> PeftModel:
        torch.manual_seed(0)
        lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return lora  # pyright: ignore[reportReturnType]

    stock = adapt(tiny_model("llama"))
    model = tiny_model("llama")
    if patch_first:
        apply(model)
        ours = adapt(model)
    else:
        ours = adapt(model)
        apply(ours)
    assert list(ours.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits)
    restore(ours)
    assert not is_patched(ours)
    torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits)


def test_accelerate_hooks_survive_and_are_used() -> None:
    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return args, kwargs

    model = tiny_model("llama")
    norm = model.model.norm
    add_hook_to_module(norm, Count())
    apply(model)
    assert isinstance(norm, NormOverlay) and norm._old_forward.__func__ is type(norm).forward
    model(IDS)
    assert Count.calls == 1
    restore(model)
    assert norm._old_forward.__func__ is type(norm).forward
    model(IDS)
    assert Count.calls == 2
    remove_hook_from_module(norm)


def test_a_foreign_forward_is_refused_and_nothing_changes() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[2]
    layer.mlp.forward = lambda x: x
    before = _snapshot(model)
    with pytest.raises(PatchError, match="layers.2.mlp.*replaced on the instance"):
        apply(model)
    assert _snapshot(model) == before


def test_drift_of_the_installed_class_is_refused_and_nothing_changes() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.scaling = 0.5
    before = _snapshot(model)
    with pytest.raises(ContractError, match="scaling is 0.5"):
        apply(model)
    assert _snapshot(model) == before


def test_hidden_states_and_attentions_are_still_recorded() -> None:
    stock = tiny_model("qwen2", attn_implementation="eager")
    ours = copy.deepcopy(stock)
    apply(ours)
    want = stock(IDS, output_hidden_states=True, output_attentions=True)
    got = ours(IDS, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(got[name]) == len(want[name]) > 0
        for mine, theirs in zip(got[name], want[name], strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("model_type", ["phi3", "olmo", "stablelm", "smollm3"])
def test_unknown_types_get_what_is_proved_and_the_report_says_the_rest(model_type: str) -> None:
    stock = tiny_model(model_type)
    assert model_type not in FAMILIES
    ours = copy.deepcopy(stock)
    planned = apply(ours)
    proved = {action.overlay.runs for action in planned.actions}
    expected = {"phi3": {"norm"}, "olmo": {"gated MLP"}, "stablelm": {"gated MLP"}, "smollm3": {"norm", "gated MLP"}}
    assert expected[model_type] | {"fused loss"} == proved
    torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits)
    ours.train(), stock.train()
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (ours, stock)]
    torch.testing.assert_close(losses[0], losses[1])
    text = str(report(ours))
    for skip in planned.skips:
        assert skip.kind in text and skip.reason in text


def test_a_norm_that_only_looks_like_one_is_not_taken() -> None:
    model = tiny_model("phi3")
    norm = model.model.norm
    norm.__class__ = type("OddRMSNorm", (type(norm),), {"forward": lambda self, x: x * self.weight * 1.01})
    planned = plan(model)
    assert "model.norm" in {skip.name for skip in planned.skips}
    assert "model.norm" not in {action.name for action in planned.actions}


def test_the_report_tells_what_runs() -> None:
    model = tiny_model("llama")
    assert "stock transformers" in str(report(model))
    apply(model)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1))
    rows = {row.module: row for row in report(lora).rows}
    assert rows["LlamaRMSNorm"].count == 9 and rows["LlamaRMSNorm"].runs == "norm overlay"
    assert rows["q_proj (float32)"].why == "lora_dropout > 0"
    assert rows["LlamaForCausalLM"].runs == "fused chunked loss"


def test_logits_after_a_fused_loss_say_why_they_are_not_there() -> None:
    model = apply_and_train(tiny_model("llama"))
    output = model(input_ids=IDS, labels=IDS)
    with pytest.raises(InputError, match="fused loss"):
        _ = output.logits
    assert model(input_ids=IDS).logits.shape == (1, 24, 288)
    assert model(input_ids=IDS, labels=IDS, logits_to_keep=torch.arange(24)).logits.shape == (1, 24, 288)
    model.eval()
    assert model(input_ids=IDS, labels=IDS).logits.shape == (1, 24, 288)
    assert isinstance(model(input_ids=IDS, return_dict=False), tuple)


def test_a_loss_function_of_the_users_own_is_called_with_real_logits() -> None:
    model = tiny_model("llama")
    apply(model)
    model.train()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + vocab_size
    assert model(input_ids=IDS, labels=IDS).loss.item() == 288


def test_overlays_hold_no_state() -> None:
    model = tiny_model("gemma3_text")
    before = {id(m): set(m.__dict__) for m in model.modules()}
    apply(model)
    for module in model.modules():
        added = set(module.__dict__) - before[id(module)]
        assert added <= ({ATTRIBUTE} if isinstance(module, HeadOverlay) else set())
    assert all(isinstance(type(m).overlay_config, object) for m in model.modules() if isinstance(m, Overlay))
