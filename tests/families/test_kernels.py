"""The paths that models take on a GPU, whole, in Triton's interpreter: every family with and without LoRA against stock.

On a machine with a GPU the same comparison runs there, on the kernels themselves.
"""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from kernels_kit import lora
from peft import LoraConfig, get_peft_model
from product_kit import Products
from transformers_kit import recompute

from hasten.families import FAMILIES
from hasten.overlays.cache_name import CACHE
from hasten.patching import apply, report
from hasten.testing import Comparison, relative_error, tiny_model
from hasten.testing.quantize import quantize_linears

IDS = torch.randint(6, 288, (2, 11), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(11) < 4, -100)


def compare(ours: Any, stock: Any, title: str) -> torch.Tensor:
    """The loss of `ours`, whose gradients agree."""
    seen = Comparison(title)
    losses = []
    for model in (ours, stock):
        model.to(DEVICE).train()
        torch.manual_seed(7)  # dropout, where there is any, draws the same
        losses.append(model(input_ids=IDS.to(DEVICE), labels=LABELS.to(DEVICE)).loss)
        losses[-1].backward()
    seen.add("loss", losses[0], losses[1], 2e-5)
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            seen.add(name, parameter.grad, theirs[name].grad, 2e-4)
    seen.check()
    return losses[0]


def nodes_of(loss: torch.Tensor) -> Counter[str]:
    """How often each autograd function occurs in the graph."""
    found, todo = set(), [loss.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [one for one, _ in node.next_functions]
    return Counter(node.name() for node in found)


@pytest.mark.grid(1)
@pytest.mark.parametrize("way", ["full", "LoRA", "QLoRA"])
@pytest.mark.parametrize("name", FAMILIES)
def test_training(name: str, way: str, kernels: None) -> None:
    """And that every adapted projection of the attention takes the fused path."""
    stock = tiny_model(name, num_hidden_layers=2, **_two_layers(name)).to(DEVICE)
    stock = quantize_linears(stock) if way == "QLoRA" else stock
    ours = copy.deepcopy(stock)
    apply(ours)
    adapt = (lambda model: model) if way == "full" else lora
    nodes = nodes_of(compare(adapt(ours), adapt(stock), f"{name}, {way}"))
    fused = nodes["LoraLinearsFunctionBackward"] + nodes["LoraQkvFunctionBackward"]
    assert fused == 2 * 2  # q, k, v together, and o, in each of two layers


@pytest.mark.parametrize(
    "arguments",
    [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.4}, {"target_modules": ["q_proj", "up_proj"]}],
)
def test_what_is_no_plain_lora_everywhere_is_still_right(arguments: dict[str, Any], kernels: None) -> None:
    stock = tiny_model("qwen2", num_hidden_layers=2, **_two_layers("qwen2"))
    ours = copy.deepcopy(stock)
    apply(ours)
    make = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **arguments}
    models = []
    for model in (ours, stock):
        torch.manual_seed(3)
        models.append(get_peft_model(model, LoraConfig(**make)))
        for name, parameter in models[-1].named_parameters():
            if "lora_B" in name and name.endswith("weight"):
                torch.nn.init.normal_(parameter, std=0.1)
    compare(*models, f"qwen2, {arguments}")


def test_a_watched_module_keeps_its_own_output(kernels: None) -> None:
    """A hook on the attention must see the attention's output, not the stream that it was added to."""
    stock = tiny_model("llama", num_hidden_layers=2).to(DEVICE)
    ours = copy.deepcopy(stock)
    apply(ours)
    seen: list[torch.Tensor] = []
    for model in (ours, stock):
        model.model.layers[0].self_attn.register_forward_hook(lambda m, a, out: seen.append(out[0]))
        model(IDS.to(DEVICE))
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=1e-4)


def _two_layers(name: str) -> dict[str, Any]:
    kinds = {
        "gemma3_text": ["sliding_attention", "full_attention"],
        "cohere2": ["sliding_attention", "full_attention"],
    }
    return {"layer_types": kinds[name]} if name in kinds else {"max_window_layers": 1} if "qwen" in name else {}


def test_the_report_names_what_the_kernels_serve_and_what_not(kernels: None) -> None:
    model = tiny_model("llama", num_hidden_layers=2).to(DEVICE)
    apply(model)
    fused = lora(model, exclude_modules=["k_proj"])
    rows = {row.module.split()[0]: row for row in report(fused).rows}
    assert "backend triton" in report(fused).title
    assert rows["q_proj"].runs == "fused LoRA op" and rows["q_proj"].why == "plain LoRA"
    assert rows["k_proj"].runs == "fused LoRA op" and rows["k_proj"].why == "no adapter"
    fused.base_model.model.model.layers[0].self_attn.v_proj.lora_dropout["default"] = torch.nn.Dropout(0.1)
    said = {(row.module.split()[0], row.why) for row in report(fused).rows}
    assert ("v_proj", "lora_dropout > 0") in said and ("q_proj", "its sibling v_proj: lora_dropout > 0") in said


def test_the_report_names_weights_that_each_product_must_copy(kernels: None) -> None:
    model = tiny_model("llama", num_hidden_layers=2).to(DEVICE)
    apply(model)
    assert not any("not packed" in row.why for row in report(model).rows)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data = layer.self_attn.k_proj.weight.data.clone()
    apart = {row.module.split()[0] for row in report(model).rows if "not packed" in row.why}
    assert apart == {"q_proj", "k_proj", "v_proj"}


def test_autocast_does_not_round_an_fp32_stream(kernels: None) -> None:
    """The branches' products run in bf16 there; the stream that they are added to stays fp32, as in transformers."""
    stock = tiny_model("llama", num_hidden_layers=2).to(DEVICE)
    ours = copy.deepcopy(stock)
    apply(ours)
    streams = []
    for model in (lora(ours), lora(stock)):
        layer = model.get_base_model().model.layers[0]
        layer.register_forward_hook(lambda module, args, out: streams.append(out))
        with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
            model(IDS.to(DEVICE))
    assert streams[0].dtype == streams[1].dtype == torch.float32
    assert relative_error(streams[0], streams[1]) < 2e-2


@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_recompute_ends_before_the_last_product(name: str, kernels: None) -> None:
    """The same gradients (bit for bit, but for attention on a GPU), and each layer's down projection multiplied once forward, not twice."""
    model = tiny_model(name, num_hidden_layers=2, intermediate_size=192, **_two_layers(name)).to(DEVICE)
    apply(model)
    model = lora(model).train()
    found = []
    for again in (False, True):
        if again:
            recompute(model, use_reentrant=False)
            model.enable_input_require_grads()
        model.zero_grad()
        with Products() as products:
            model(input_ids=IDS.to(DEVICE), labels=LABELS.to(DEVICE)).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        assert products.count(192, 64) == 2, "down"
        assert products.count(64, 2 * 192) == (4 if again else 2), "gate and up"
    for parameter, gradient in found[0].items():
        assert relative_error(found[1][parameter], gradient) <= (0 if DEVICE == "cpu" else 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_two_rows_over_a_cache(name: str, kernels: None) -> None:
    """Token by token, the second row padded on the left, against stock's own decoding."""
    stock = tiny_model(name, num_hidden_layers=2, **_two_layers(name)).to(DEVICE).eval()
    ours = copy.deepcopy(stock)
    apply(ours)
    mask = torch.ones(2, 11, dtype=torch.long, device=DEVICE)
    mask[1, :3] = 0
    logits = []
    for model in (ours, stock):
        steps, past = [], None
        with torch.no_grad():
            for start, stop in ((0, 8), (8, 9), (9, 10), (10, 11)):
                out = model(
                    IDS[:, start:stop].to(DEVICE), attention_mask=mask[:, :stop], **{CACHE: past}, use_cache=True,
                    position_ids=(mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:],
                )  # fmt: skip
                past = out[CACHE]
                steps.append(out.logits[:, -1])
        logits.append(torch.stack(steps))
    assert relative_error(logits[0], logits[1]) < 2e-5
