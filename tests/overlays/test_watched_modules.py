"""Whoever watches or changes a module of a patched model sees and does what it would in transformers' own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_kit import DEVICE, GRADIENTS, assert_near
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm
from transformers.modeling_outputs import BaseModelOutputWithPast

from hasten.patching import apply
from hasten.testing import relative_error, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning"),  # a backbone returns no tensor
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # an embedding gets ids
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),  # still in use
]

IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [30, 31, 32, 33, 34, 35]], device=DEVICE)
FAMILIES = ("llama", "gemma2", "gemma3_text", "cohere", "qwen3", "granite")
Watch = Callable[[nn.Module, list[str]], Any]


def _changed(value: Any) -> Any:
    """Scales the channels of the first tensor in the output or the arguments of a module (a norm hides one factor)."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value
        return value * torch.linspace(0.1, 1.0, value.shape[-1], device=value.device)
    if isinstance(value, BaseModelOutputWithPast):
        value.last_hidden_state = _changed(value.last_hidden_state)
    if isinstance(value, tuple) and value:
        return (_changed(value[0]), *value[1:])
    return value


def _forward_hook(module: nn.Module, seen: list[str]) -> None:
    def hook(_: Any, args: Any, output: Any) -> Any:
        seen.append(f"{tuple(_shape(output))}")
        return _changed(output)

    module.register_forward_hook(hook)


def _pre_hook(module: nn.Module, seen: list[str]) -> None:
    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        names = sorted(set(kwargs) - {"attention_context"})  # what the kernels get in place of a dense mask
        seen.append(f"{names} {[tuple(_shape(a)) for a in args]}")
        if args:
            return _changed(args), kwargs
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": _changed(kwargs["hidden_states"])}
        return None

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _backward_hook(module: nn.Module, seen: list[str]) -> None:
    def hook(_: Any, inputs: Any, outputs: Any) -> Any:
        seen.append(f"{[tuple(_shape(g)) for g in outputs]}")
        return tuple(None if g is None else g * 0.5 for g in inputs)

    module.register_full_backward_hook(hook)


def _backward_pre_hook(module: nn.Module, seen: list[str]) -> None:
    def hook(_: Any, outputs: Any) -> Any:
        seen.append("called")
        return tuple(None if g is None else g * 0.5 for g in outputs)

    module.register_full_backward_pre_hook(hook)


def _own_forward(module: Any, seen: list[str]) -> None:
    stock = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append("called")
        return _changed(stock(*args, **kwargs))

    module.forward = forward


def _own_call(module: Any, seen: list[str]) -> None:
    stock = module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append("called")
        return _changed(stock(*args, **kwargs))

    module._call_impl = call


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, torch.Tensor) else ()


WATCHES: dict[str, Watch] = {
    "forward hook": _forward_hook,
    "pre-hook": _pre_hook,
    "backward hook": _backward_hook,
    "backward pre-hook": _backward_pre_hook,
    "own forward": _own_forward,
    "own call": _own_call,
}
UNCHANGED = {("pre-hook", "model"), ("pre-hook", "model.embed_tokens"), ("pre-hook", "model.rotary_emb")}
"""Their arguments are ids, or a tensor of which only the dtype counts."""


def _model(family: str, patched: bool) -> Any:
    kinds: dict[str, Any] = (
        {"layer_types": ["sliding_attention"]} if family in {"gemma2", "gemma3_text", "qwen3"} else {}
    )
    model: Any = tiny_model(family, amplify=2.0, num_hidden_layers=1, **kinds).to(DEVICE)
    if patched:
        apply(model)
    return model


def _run(model: Any) -> dict[str, torch.Tensor]:
    """Returns the losses of a training and an evaluation forward, and every gradient of the former."""
    loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found["eval loss"] = model.eval()(input_ids=IDS, labels=IDS, use_cache=False).loss
    return {**found, "train loss": loss.detach()}


def _agree(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], where: str) -> None:
    assert ours.keys() == theirs.keys(), where
    worst = max(ours, key=lambda name: relative_error(ours[name], theirs[name]))
    assert relative_error(ours[worst], theirs[worst]) < GRADIENTS, (where, worst)


def _watched(family: str, patched: bool, name: str, watch: Watch) -> tuple[list[str], dict[str, torch.Tensor]]:
    model, seen = _model(family, patched), []
    watch(model.get_submodule(name), seen)
    return seen, _run(model)


def _names(family: str) -> list[str]:
    containers = (nn.ModuleList, nn.ModuleDict)
    return [name for name, m in _model(family, False).named_modules() if name and not isinstance(m, containers)]


def _compare(family: str, kind: str, names: list[str]) -> None:
    plain = _run(_model(family, False))
    for name in names:
        seen, ours = _watched(family, True, name, WATCHES[kind])
        expected, theirs = _watched(family, False, name, WATCHES[kind])
        where = f"{family}, {kind} on {name}"
        assert seen == expected, where
        _agree(ours, theirs, where)
        if "backward" not in kind and (kind, name) not in UNCHANGED:
            assert relative_error(ours["train loss"], plain["train loss"]) > 1e-6, f"{where}: the watch changes nothing"


ALWAYS = {("gemma3_text", "forward hook"), ("cohere", "backward hook"), ("llama", "own call"), ("qwen3", "own forward")}
GRID = [
    pytest.param(family, kind, id=f"{family}-{kind}", marks=[] if (family, kind) in ALWAYS else [pytest.mark.full])
    for family in FAMILIES
    for kind in WATCHES
]


@pytest.mark.parametrize(("family", "kind"), GRID)
def test_every_module_may_be_watched(family: str, kind: str) -> None:
    _compare(family, kind, _names(family))


@pytest.mark.full
@pytest.mark.parametrize("kind", WATCHES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_module_may_be_watched_in_the_kernels(family: str, kind: str, kernels: None) -> None:
    _compare(family, kind, _names(family))


BYPASSED = ("model.rotary_emb", "self_attn.q_norm", "self_attn.o_proj", "mlp.act_fn", "input_layernorm", "lm_head")
"""Modules that the kernels compute without a call."""


def test_modules_that_the_kernels_bypass_may_be_watched(kernels: None) -> None:
    _compare("qwen3", "forward hook", [name for name in _names("qwen3") if name.endswith(BYPASSED)])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight_norm": lambda module: weight_norm(module).weight_g.data.mul_(0.5),
    "spectral_norm": spectral_norm,
    "prune": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    "parametrization": lambda module: parametrize.register_parametrization(module, "weight", _Scaled()),
    "class with a forward": lambda module: _set_class(module, _Doubled),
    "class with a call": lambda module: _set_class(module, _Called),
}


class _Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0.5


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * torch.linspace(0.0, 1.0, self.out_features, device=input.device)


class _Called(nn.Linear):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * torch.linspace(0.0, 1.0, self.out_features, device=DEVICE)


def _set_class(module: Any, kind: type) -> None:
    module.__class__ = kind


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.self_attn.k_proj"])
def test_a_changed_linear_counts(name: str, change: str, kernels: None) -> None:
    found = []
    plain = _run(_model("llama", False))["train loss"]
    for patched in (True, False):
        model = _model("llama", patched)
        torch.manual_seed(0)
        CHANGES[change](model.get_submodule(name))
        found.append(_run(model))
    _agree(*found, where=f"{change} on {name}")
    assert relative_error(found[0]["train loss"], plain) > 1e-6


def test_another_activation_counts(kernels: None) -> None:
    found = []
    for patched in (True, False):
        model = _model("llama", patched)
        model.model.layers[0].mlp.act_fn = nn.ReLU()
        found.append(_run(model))
    _agree(*found, where="act_fn = ReLU")


@pytest.mark.parametrize(
    "register",
    [register_module_forward_hook, register_module_forward_pre_hook, register_module_full_backward_hook],
)
def test_global_hooks_see_every_call(register: Callable[..., Any], kernels: None) -> None:
    calls: list[list[str]] = []
    for patched in (True, False):
        model, seen = _model("qwen3", patched), []
        names = {module: name for name, module in model.named_modules()}
        handle = register(lambda module, *_, names=names, seen=seen: seen.append(names.get(module, "?")))
        try:
            _run(model)
        finally:
            handle.remove()
        calls.append([name for name in seen if name != "?"])
    assert sorted(calls[0]) == sorted(calls[1])


def test_a_replaced_forward_of_torchs_linear_counts(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, seen = nn.Linear.forward, []

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        seen.append(self.out_features)
        return stock(self, input)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    calls = []
    for patched in (True, False):
        seen.clear()
        _run(_model("llama", patched))
        calls.append(list(seen))
    assert calls[0] == calls[1]


def test_an_attention_with_a_forward_of_its_own_gets_transformers_mask(kernels: None) -> None:
    """Padding must be masked where the replaced forward reads the mask itself."""
    found = []
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], device=DEVICE)
    for patched in (True, False):
        model = _model("llama", patched)
        attention = model.model.layers[0].self_attn
        stock = type(_model("llama", False).model.layers[0].self_attn).forward
        attention.forward = stock.__get__(attention)
        with torch.no_grad():
            found.append(model(IDS, attention_mask=mask, use_cache=False).logits[1, 2:])
    assert_near(*found)
