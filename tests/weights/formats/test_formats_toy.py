"""A new storage format joins through the registry alone: loads, trains, shows in report and estimate, exports, reloads."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_format import CALLS, Toy, ToyLinear
from typer.testing import CliRunner

from hasten import FastLanguageModel, estimate, report
from hasten.cli import app
from hasten.errors import OptionError
from hasten.export import exporters
from hasten.testing import save_tiny
from hasten.testing.quantize import quantize_linears
from hasten.training.memory.shape import ModelShape
from hasten.weights import dequantize, formats
from hasten.weights.formats.base import CHUNK

IDS = torch.randint(6, 288, (2, 11), generator=torch.Generator().manual_seed(0))
SMALL = {"num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def toy() -> Iterator[Toy]:
    added = Toy()
    CALLS.clear()
    with formats.registered(added):
        yield added


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base", "qwen2", **SMALL)  # it has biases
    return tmp_path / "base"


def loaded(folder: Path, **options: Any) -> Any:
    asked = {"load_in_toy": True, "dtype": torch.float32, "use_gradient_checkpointing": False, **options}
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, device_map="cpu", **asked)[0]


def linears_of(model: Any) -> dict[str, ToyLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ToyLinear)}


def dequantized(model: Any) -> Any:
    """The same model with dense Linears of the values that the codes stand for."""
    plain = copy.deepcopy(model)
    for name, module in linears_of(plain).items():
        dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        dense.weight = nn.Parameter(dequantize(module).clone(), requires_grad=False)
        dense.bias = module.bias
        plain.set_submodule(name, dense)
    return plain


def train(model: Any, steps: int = 2) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of some steps of SGD, and the gradients of the last."""
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        ids = IDS.to(next(iter(trained.values())).device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


def adapted(model: Any) -> Any:
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False, init_lora_weights=True)


@pytest.mark.parametrize("by_rows", [True, False])
def test_loads_a_dense_checkpoint(tmp_path: Path, by_rows: bool) -> None:
    base = save_tiny(tmp_path, "qwen2", **SMALL, intermediate_size=CHUNK // 64 + 10)  # two chunks, the last one short
    # With key_mapping transformers reads the tensors, whole, and they are quantised afterwards.
    model = loaded(base, **({} if by_rows else {"key_mapping": {"^no_such_name": "anything"}}))
    stored = load_file(base / "model.safetensors")
    linears = linears_of(model)
    assert len(linears) == 2 * 7 and type(model.lm_head) is not ToyLinear
    for name, module in linears.items():
        expected = Toy().quantize(stored[f"{name}.weight"])
        assert torch.equal(module.weight, expected.tensors[""])
        assert torch.equal(module.weight_scale, expected.tensors["_scale"])
        assert formats.format_of(module).holds(module, stored[f"{name}.weight"])
        if module.bias is not None:
            assert torch.equal(module.bias, stored[f"{name}.bias"])
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("fused", [False, True])
def test_trains_as_the_dequantised_dense_model(base: Path, fused: bool, request: pytest.FixtureRequest) -> None:
    model = loaded(base)
    plain = dequantized(model)
    if fused:
        request.getfixturevalue("kernels")
    device = "cuda" if fused and torch.cuda.is_available() else "cpu"
    losses, gradients = train(adapted(model).to(device))
    assert (CALLS["matmul"] > 0, CALLS["matmul_t"] > 0) == (fused, fused)
    counted = CALLS.copy()
    expected_losses, expected = train(adapted(plain).to(device))
    assert counted == CALLS, "the dense model has no toy weight"
    assert losses == pytest.approx(expected_losses, rel=1e-5) and losses[0] != losses[1]
    assert gradients.keys() == expected.keys() and len(gradients) == 2 * 2 * 7
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_report_and_estimate(base: Path) -> None:
    model = loaded(base)
    assert "quantisation: toy" in str(report(model))
    assert any(row.module == "q_proj (toy)" for row in report(model).rows)
    linears = linears_of(model).values()
    codes = sum(module.weight.numel() + 4 for module in linears)
    dense = sum(module.weight.numel() * 4 for module in linears)
    found, plain = (
        estimate(str(base), quantization=choice, dtype=torch.float32, seq_len=64).peak.weights
        for choice in ("toy", None)
    )
    assert plain - found == dense - codes
    bare = ModelShape.of_model(model)
    held = [*model.parameters(), *(b for m in linears for b in m.buffers())]
    rest = [b for name, b in model.named_buffers() if not name.endswith(("weight", "weight_scale"))]
    assert bare.weights == sum(t.numel() * t.element_size() for t in (*held, *rest))
    with pytest.raises(OptionError, match="known are 'toy', '4bit', '8bit' and None"):
        estimate(str(base), quantization="2bit")
    shown = CliRunner().invoke(app, ["estimate", str(base), "--load", "toy"])
    assert shown.exit_code == 0, shown.output


def test_exports_and_reloads(base: Path, tmp_path: Path) -> None:
    assert "merged_toy" in exporters.names()
    model = adapted(loaded(base))
    train(model)
    dense = model.save_pretrained_merged(tmp_path / "dense", save_method="merged_16bit")
    stored, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "dense"))
    assert merged.keys() == stored.keys() and dense.kl is None
    inner = model.base_model.model
    for name, module in inner.named_modules():
        if "lora_A" in module._modules:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            expected = stored[f"{name}.weight"] + module.scaling["default"] * (b @ a).detach()
            torch.testing.assert_close(merged[f"{name}.weight"], expected)
    done = model.save_pretrained_merged(tmp_path / "toy", None, save_method="merged_toy", rows=IDS)
    assert done.kl is not None and 0 < done.kl < 1 and math.isfinite(done.kl)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "toy" / file).write_bytes((base / file).read_bytes())
    again = loaded(tmp_path / "toy", load_in_toy=None)
    assert len(linears_of(again)) == 2 * 7
    for name, module in linears_of(again).items():
        expected = Toy().quantize(merged[f"{name}.weight"])
        assert torch.equal(module.weight, expected.tensors[""])
        assert torch.equal(module.weight_scale, expected.tensors["_scale"])
    assert "quantisation: toy, as the checkpoint is stored" in str(report(again))
    train(adapted(again))


def test_a_stored_checkpoint_refuses_another_format(base: Path, tmp_path: Path) -> None:
    model = loaded(base)
    model.save_pretrained_merged(tmp_path / "toy", save_method="merged_toy", rows=IDS)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "toy" / file).write_bytes((base / file).read_bytes())
    with pytest.raises(OptionError, match="is already stored as toy"):
        loaded(tmp_path / "toy", load_in_toy=None, load_in_8bit=True)
    assert linears_of(loaded(tmp_path / "toy"))


def test_an_argument_of_no_format_is_refused(base: Path) -> None:
    with pytest.raises(OptionError, match=r"load_in_toys.*did you mean load_in_toy"):
        loaded(base, load_in_toy=None, load_in_toys=True)
    with pytest.raises(OptionError, match="load_in_toy, load_in_8bit"):
        loaded(base, load_in_8bit=True)


def test_converts_in_memory(base: Path) -> None:
    model = loaded(base, load_in_toy=None, load_in_4bit=False)
    before = {name: m.weight.detach() for name, m in model.named_modules() if type(m) is nn.Linear}
    quantize_linears(model, "toy")
    for name, module in linears_of(model).items():
        assert torch.equal(module.weight, Toy().quantize(before[name]).tensors[""])
