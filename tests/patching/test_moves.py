"""Moves, casts, copies and pickles of a patched model: as transformers and PEFT do them."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from device_kit import DEVICE, LOGITS, ON_GPU
from transformers import AutoModelForCausalLM

from hasten import FastLanguageModel, report
from hasten.patching import apply, is_patched, restore
from hasten.state import state_of
from hasten.testing import relative_error, tiny_model
from hasten.testing.tiny import save_tiny
from hasten.weights import dequantize
from hasten.weights.formats import is_quantized

IDS = torch.arange(6, 30).reshape(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("moves") / "llama", num_hidden_layers=1)


def _load(folder: Path, **changes: Any) -> Any:
    settings = {"load_in_4bit": False, "dtype": torch.bfloat16, "max_seq_length": 64, **changes}
    return FastLanguageModel.from_pretrained(folder, **settings)[0]


def _lora(folder: Path, **changes: Any) -> Any:
    return FastLanguageModel.get_peft_model(_load(folder, **changes), r=4, init_lora_weights=False)


def _trained_embedding(folder: Path) -> Any:
    saved = ["embed_tokens", "lm_head"]
    return FastLanguageModel.get_peft_model(_load(folder), r=4, modules_to_save=saved, init_lora_weights=False)


MODELS: dict[str, Callable[[Path], Any]] = {
    "full": lambda folder: _load(folder, full_finetuning=True),
    "LoRA": _lora,
    "trained embedding": _trained_embedding,
    "NF4 with LoRA": lambda folder: _lora(folder, load_in_4bit=True, dtype=None),
    "offloaded embedding": lambda folder: _lora(folder, offload_embedding=True),
}


def _saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": _saved,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301
    "share_memory": lambda model: model.share_memory(),
    "to": lambda model: model.to("cpu").to(DEVICE),
    "apply": lambda model: model.apply(lambda module: None),
}


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(model.device)).logits


def _loss(model: Any) -> torch.Tensor:
    ids = IDS.to(model.device)
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_is_the_same_model(kind: str, how: str, folder: Path) -> None:
    model = MODELS[kind](folder)
    expected = _logits(model)
    twin = COPIES[how](model)
    assert torch.equal(_logits(twin), expected)
    types = [type(module) for module in model.modules()]
    assert [type(module) for module in twin.modules()] == types
    assert state_of(twin).load_options == state_of(model).load_options
    assert list(twin.state_dict()) == list(model.state_dict())
    losses = [_loss(m.train()) for m in (model, twin)]
    assert torch.equal(*losses)
    losses[1].backward()
    if how != "copy":  # a shallow copy shares its submodules
        restore(twin)
        assert not is_patched(twin)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "pickle"])
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_are_copied_with_their_class(bits: str, how: str, folder: Path) -> None:
    """torch pickles a subclass of Parameter as a Parameter, which neither a fused op nor a merge can read."""
    model = _lora(folder, **{"load_in_4bit": False, bits: True, "dtype": None})
    expected = _logits(model)
    twin = COPIES[how](model)
    assert [type(p) for p in twin.parameters()] == [type(p) for p in model.parameters()]
    pairs = [(a, b) for a, b in zip(model.modules(), twin.modules(), strict=True) if isinstance(a, torch.nn.Linear)]
    quantised = [(a, b) for a, b in pairs if is_quantized(a)]
    assert len(quantised) == 7 and all(torch.equal(dequantize(a), dequantize(b)) for a, b in quantised)
    assert str(report(twin)) == str(report(model))
    assert torch.equal(_logits(twin), expected)


@pytest.mark.parametrize("bits", ["load_in_4bit", pytest.param("load_in_8bit", marks=pytest.mark.full)])
def test_a_pickle_of_quantised_weights_is_pickled_again_in_another_process(
    bits: str, folder: Path, tmp_path: Path
) -> None:
    model = _lora(folder, **{"load_in_4bit": False, bits: True, "dtype": None})
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False); torch.save(model, sys.argv[1])\n"
        "again = torch.load(sys.argv[1], weights_only=False)\n"
        "print([type(p).__name__ for p in again.parameters()])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str([type(p).__name__ for p in model.parameters()])


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_other_models_pickle_without_hasten(bits: str, folder: Path) -> None:
    """What a pickle of a hasten model registers holds for the process, and so for the layers of others."""
    model = _load(folder, **{"load_in_4bit": False, bits: True, "dtype": None})
    pickle.dumps(model)
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear) and is_quantized(module))
    raw = pickle.dumps(layer)
    assert b"hasten" not in raw
    again = pickle.loads(raw)  # noqa: S301
    assert type(again.weight) is type(layer.weight) and torch.equal(dequantize(again), dequantize(layer))


NEAR = {
    "half": 2e-3,
    "bfloat16": 2 * torch.finfo(torch.bfloat16).eps if ON_GPU else 2e-3,
    "float": 1e-5,
    "double": 1e-5,
}
"""Relative distance of two losses. On a GPU the kernels round where stock does not, so bf16 is given two of its roundings."""


@pytest.mark.parametrize("how", ["half", "float", "bfloat16", "double"])
@pytest.mark.parametrize("wide", [None, False])
@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]])
def test_a_cast_is_that_of_peft(how: str, wide: bool | None, saved: list[str] | None, folder: Path) -> None:
    ours = FastLanguageModel.get_peft_model(
        _load(folder, float32_mixed_precision=wide), r=4, modules_to_save=saved, init_lora_weights=False
    )
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    theirs = peft.get_peft_model(theirs, copy.deepcopy(ours.peft_config["default"]))
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        getattr(model, how)()
    for mode in (False, True, False):
        losses = [_loss(m.train(mode)).detach() for m in (ours, theirs)]
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=NEAR[how])
    dtypes = {name: p.dtype for name, p in theirs.named_parameters()}
    assert {name: p.dtype for name, p in ours.named_parameters()} == dtypes
    if how in {"half", "float"}:
        _logits_agree(ours, theirs, how)


def _logits_agree(ours: Any, theirs: Any, how: str) -> None:
    found, expected = _logits(ours), _logits(theirs)
    if not ON_GPU:
        assert torch.equal(found, expected)
    elif how == "float":
        assert relative_error(found, expected) <= LOGITS
    else:  # as near to fp64 as stock is
        exact = _logits(copy.deepcopy(theirs).double())
        assert relative_error(found, exact) <= 2 * relative_error(expected, exact) + 2 * torch.finfo(found.dtype).eps


def test_a_cast_of_the_base_alone_holds_for_its_trained_embedding(folder: Path) -> None:
    model = _trained_embedding(folder)
    model.get_base_model().float()
    _embedding_is_exact(model.train())


def test_a_model_that_was_cast_before_the_adapter(folder: Path) -> None:
    """The dtype of the residual stream is the model's, not that of loading."""
    model = _load(folder).float()
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["embed_tokens"])
    _embedding_is_exact(model)


def _embedding_is_exact(model: Any) -> None:
    """Asserts that the residual stream begins in fp32, with every bit of a weight that bf16 would round."""
    (weight,) = [p for name, p in model.named_parameters() if "embed_tokens.modules_to_save" in name]
    weight.data.add_(1e-5)
    ids = IDS.to(weight.device)
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[0]
    assert torch.equal(hidden, weight[ids]) and not torch.equal(hidden, hidden.bfloat16().float())


def test_weights_that_a_trainer_casts_by_hand_train_in_their_dtype(folder: Path) -> None:
    model = _lora(folder)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_pickle_opens_in_another_process(folder: Path, tmp_path: Path) -> None:
    model = _lora(folder)
    torch.save({"model": model, "logits": _logits(model)}, tmp_path / "model.pt")
    code = (
        "import sys, torch; found = torch.load(sys.argv[1], weights_only=False)\n"
        "ids = torch.arange(6, 30, device=found['logits'].device).reshape(2, 12)\n"
        "with torch.no_grad(): assert torch.equal(found['model'](input_ids=ids).logits, found['logits'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["gemma2", "cohere", "qwen3"])
def test_families_pickle_without_methods(family: str) -> None:
    model = tiny_model(family)
    apply(model)
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(_logits(twin), _logits(model))
    norm = pickle.loads(pickle.dumps(model.model.norm))  # noqa: S301
    assert type(norm) is type(model.model.norm)


def test_a_path_is_a_name(folder: Path, tmp_path: Path) -> None:
    model = _lora(folder)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(
        model_name=tmp_path / "adapter", load_in_4bit=False, dtype=torch.bfloat16, max_seq_length=64
    )
    assert torch.equal(_logits(again), _logits(model))
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged_16bit")
    assert (tmp_path / "merged" / "config.json").exists()
    assert state_of(again).load_options.model_name == str(tmp_path / "adapter")  # pyright: ignore[reportOptionalMemberAccess]
