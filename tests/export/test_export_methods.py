"""Every method of the installed PEFT on hasten's model: it trains as on stock, and is merged right or refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from device_kit import DEVICE, GRADIENTS, LOGITS, ON_GPU, assert_near
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_kinds import KINDS
from transformers import AutoModelForCausalLM

import hasten
from hasten import FastLanguageModel
from hasten.errors import CheckpointError, ExportError, InputError
from hasten.testing import save_tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # of what these tests ask for on purpose
    pytest.mark.filterwarnings(
        "ignore:`past_key_values` is deprecated:FutureWarning"
    ),  # PEFT's prompt learning, since 5.24
]

IDS = torch.randint(6, 260, (2, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
IDS[:, 10:12] = torch.tensor([7, 9], device=DEVICE)  # the tokens whose rows train
LABELS = torch.where(torch.arange(24, device=DEVICE) < 3, -100, IDS)
METHODS = [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
MERGED = {"LORA", "ADALORA", "TRAINABLE_TOKENS"}
TASKS = {"task_ids": torch.tensor([0, 1], device=DEVICE)}
CALLS: dict[str, dict[str, Any]] = {"POLY": TASKS, "MULTITASK_PROMPT_TUNING": TASKS}
LOGITS_NEEDED = {"CPT"}
"""Methods whose PEFT code reads the logits of a training forward, which a fused loss never computes."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("methods") / "base", num_hidden_layers=2)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, str]:
    """Two LoRA folders, for X-LoRA."""
    folders = {str(number): base.parent / f"lora{number}" for number in range(2)}
    for folder in folders.values():
        adapt(stock(base), "LORA", {}).save_pretrained(folder)
    return {name: str(folder) for name, folder in folders.items()}


def stock(base: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model.to(DEVICE)


def ours(base: Path) -> Any:
    options = {"load_in_4bit": False, "dtype": torch.float32, "max_seq_length": 64, "use_gradient_checkpointing": False}
    return FastLanguageModel.from_pretrained(str(base), **options)[0]


def adapt(model: Any, method: str, adapters: dict[str, str]) -> Any:
    """PEFT's own adapter, every trainable tensor moved away from its initial value."""
    config = next(config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value == method)
    settings = copy.deepcopy(KINDS[method])
    if method == "XLORA":
        settings |= {"adapters": adapters}
        model.config.use_cache = False
    torch.manual_seed(0)
    model = get_peft_model(model, config(task_type="CAUSAL_LM", **settings)).to(DEVICE)  # some stay on the CPU
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return model


def step(model: Any, method: str, **call: Any) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss and gradients of a training step, and logits of evaluation for the tokens of the input."""
    call = {**CALLS.get(method, {}), **call}
    torch.manual_seed(2)
    loss = model.train()(input_ids=IDS, labels=LABELS, **call).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, labels=LABELS, **CALLS.get(method, {})).logits
    return float(loss.detach()), grads, logits


def test_every_method_of_peft_is_listed() -> None:
    assert sorted(KINDS) == sorted(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_method_trains_as_on_stock_and_is_merged_or_refused(
    base: Path, adapters: dict[str, str], tmp_path: Path, method: str
) -> None:
    try:
        expected = step(adapt(stock(base), method, adapters), method)
    except ImportError as error:
        pytest.skip(f"PEFT itself lacks a package: {error}")
    model = adapt(ours(base), method, adapters)
    call: dict[str, Any] = {}
    if method in LOGITS_NEEDED:
        with pytest.raises(InputError, match="logits_to_keep"):
            step(model, method)
        call = {"logits_to_keep": torch.arange(24 + KINDS[method].get("num_virtual_tokens", 4), device=DEVICE)}
    loss, grads, logits = step(model, method, **call)
    assert loss == pytest.approx(expected[0], rel=LOGITS if ON_GPU else 1e-5)
    assert set(grads) == set(expected[1])
    floor = (
        torch.finfo(torch.float32).eps * max(float(grad.norm()) for grad in expected[1].values()) if ON_GPU else 1e-7
    )
    for name, grad in grads.items():
        assert (grad - expected[1][name]).norm() <= GRADIENTS * expected[1][name].norm() + floor, name
    assert_near(logits, expected[2], rtol=1e-5, atol=1e-5)
    assert "lm_head" in str(hasten.report(model))
    _check_exports(model, method, base, tmp_path, logits[:, -24:])


def _check_exports(model: Any, method: str, base: Path, folder: Path, tuned: torch.Tensor) -> None:
    if method in MERGED:
        model.save_pretrained_merged(folder / "merged")
        with torch.no_grad():
            merged, untouched = stock(folder / "merged").eval()(IDS).logits, stock(base).eval()(IDS).logits
        assert_near(merged, tuned, 1e-4, rtol=1e-4, atol=1e-4)
        assert (merged - untouched).abs().max() > 1e-2
    else:
        for way in ("merged_16bit", "merged_4bit"):
            with pytest.raises(ExportError, match=rf"cannot be merged:\n(.|\n)*{method}"):
                model.save_pretrained_merged(folder / "merged", save_method=way)
        assert not (folder / "merged").exists()
    if method in ("XLORA", "MULTITASK_PROMPT_TUNING", "POLY"):
        return  # these need arguments of their own to load
    model.save_pretrained_merged(folder / "adapter", save_method="lora")
    again = PeftModel.from_pretrained(stock(base), folder / "adapter").to(DEVICE).eval()
    with torch.no_grad():
        call = {"labels": LABELS} if method in LOGITS_NEEDED else {}
        got = again(input_ids=IDS, **call).logits[:, -24:]
    assert_near(got, tuned, 1e-4, rtol=1e-5, atol=1e-5)
    if method not in ("LORA", "TRAINABLE_TOKENS"):
        with pytest.raises(CheckpointError, match=method):
            FastLanguageModel.from_pretrained(str(folder / "adapter"), load_in_4bit=False, max_seq_length=64)


@pytest.mark.parametrize("method", ["LOHA", "IA3", "LN_TUNING", "BOFT", "VERA"])
def test_the_way_that_the_message_names_works(base: Path, tmp_path: Path, method: str) -> None:
    model = adapt(ours(base), method, {})
    with pytest.raises(ExportError, match=r"merge_and_unload\(\)"):
        model.save_pretrained_merged(tmp_path / "refused")
    with torch.no_grad():
        tuned = model.eval()(IDS).logits
    model.merge_and_unload().save_pretrained_merged(tmp_path / "merged")
    with torch.no_grad():
        got = stock(tmp_path / "merged").eval()(IDS).logits
    assert_near(got, tuned, 2e-4, rtol=1e-3, atol=1e-4)


def test_a_deleted_prompt_does_not_stay_in_the_way(base: Path, tmp_path: Path) -> None:
    model = ours(base)
    prompted = adapt(model, "PROMPT_TUNING", {})
    with pytest.raises(ExportError, match="PROMPT_TUNING"):
        model.save_pretrained_merged(tmp_path / "refused")
    prompted.own = prompted  # a cycle, as trainers make them
    del prompted
    model.save_pretrained_merged(tmp_path / "base")
