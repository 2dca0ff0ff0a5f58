"""check_type: holds a tiny model of any causal-LM `model_type`, loaded by hasten, against stock transformers and PEFT.

In fp32 on the CPU: loading, logits, loss, every gradient, a LoRA's gradients, and generation for a left-padded batch. Where
hasten replaces nothing the bits must be equal; else the limits are those of `check_family`.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hasten.errors import HastenError
from hasten.model import FastLanguageModel
from hasten.overlays import Overlay, StockHeadOverlay
from hasten.state import state_of
from hasten.testing.accuracy import relative_error
from hasten.testing.family import GRADIENTS, LOGITS
from hasten.testing.tiny import tiny_tokenizer
from hasten.testing.tiny_types import FOREIGN_ERRORS, NotBuildable, tiny_model_of

CHECKS = ("load", "logits", "loss", "gradients", "LoRA", "generation")
OK = "ok"
TOKENS, NEW_TOKENS, LENGTH = 20, 5, 64
REFUSED_BY_PEFT = {"out_proj", "router", "gate"}
"""Projections of some types that PEFT cannot adapt: mamba's fused one, and routers that return several tensors."""


@dataclass
class TypeResult:
    """The outcome for one `model_type`.

    unbuildable: why transformers cannot make a tiny model, else None. replaced: what hasten replaces -> how often. stock:
    class that stays stock -> why. checks: name of a check -> "ok" (on what, where not on everything), "transformers: ..." where
    stock itself fails, or how hasten differs.
    """

    model_type: str
    unbuildable: str | None = None
    replaced: Counter[str] = field(default_factory=Counter)
    stock: dict[str, str] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, str]:
        """The checks that hasten fails, and how."""
        return {n: s for n, s in self.checks.items() if not s.startswith((OK, "transformers: "))}


class _StockFails(Exception):
    """transformers or PEFT alone cannot do what is compared."""


def check_type(model_type: str, folder: Path) -> TypeResult:
    """Builds a tiny model, saves it into `folder` and compares it as loaded by hasten and by transformers."""
    result = TypeResult(model_type)
    try:
        model = tiny_model_of(model_type)
        tiny_tokenizer().save_pretrained(folder)
        with _stock_side():
            model.save_pretrained(folder)
            stock = _load_stock(folder)
            stock(**_batch())
    except (NotBuildable, _StockFails) as error:
        result.unbuildable = str(error)
        return result
    pair: list[Any] = [stock]

    def load() -> str:
        pair.append(_load(folder, full_finetuning=True, use_gradient_checkpointing=False))
        _describe(pair[1], result)
        return OK

    result.checks["load"] = _outcome(load)
    if len(pair) == 2:
        ours = pair[1]
        exact = not any(isinstance(m, Overlay) and not isinstance(m, StockHeadOverlay) for m in ours.modules())
        result.checks["logits"] = _outcome(lambda: _compare_logits(ours, stock, exact))
        result.checks["loss"] = _outcome(lambda: _compare_loss(ours, stock, exact))
        result.checks["gradients"] = _outcome(lambda: _compare_gradients(ours, stock, exact))
        result.checks["generation"] = _outcome(lambda: _compare_generation(ours, stock))
        result.checks["LoRA"] = _outcome(lambda: _compare_lora(folder, exact))
    return result


def _outcome(check: Callable[[], str]) -> str:
    try:
        return check()
    except _StockFails as error:
        return f"transformers: {error}"
    except (*FOREIGN_ERRORS, HastenError) as error:
        return _line(error)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).replace(";", ",").split())
    return f"{type(error).__name__}: {text[:80]}"


@contextmanager
def _stock_side() -> Iterator[None]:
    try:
        yield
    except FOREIGN_ERRORS as error:
        raise _StockFails(_line(error)) from error


def _load_stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _load(folder: Path, **options: Any) -> Any:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=LENGTH, load_in_4bit=False, dtype=torch.float32, **options
    )
    return model


def _describe(model: Any, result: TypeResult) -> None:
    """Notes what the plan replaces, by kind, and why the other modules stay stock."""
    planned: Any = state_of(model).plan
    result.replaced.update(a.overlay.runs for a in planned.actions if a.overlay is not StockHeadOverlay)
    result.stock.update({skip.kind: skip.reason for skip in planned.skips})


def _batch() -> dict[str, torch.Tensor]:
    """Three sequences of 20, 13 and 4 tokens, left-padded."""
    ids = torch.randint(6, 262, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([(torch.arange(TOKENS) >= TOKENS - length).long() for length in (TOKENS, 13, 4)])
    return {"input_ids": ids * mask, "attention_mask": mask}


def _compare_logits(ours: Any, stock: Any, exact: bool) -> str:
    """Evaluation mode: every tensor of the outputs, with labels, and with every keyword that asks for more."""
    ids = _batch()["input_ids"][:1]
    more = {"output_hidden_states": True}
    if "output_router_logits" in inspect.signature(stock.forward).parameters:
        more["output_router_logits"] = True
    for kwargs in (_batch(), {"input_ids": ids}, {"input_ids": ids, "labels": ids, **more}):
        with torch.no_grad():
            with _stock_side():
                theirs = stock.eval()(**kwargs)
            got = ours.eval()(**kwargs)
        if type(got) is not type(theirs) or list(got) != list(theirs):
            return f"outputs {type(got).__name__} {list(got)}, stock {type(theirs).__name__} {list(theirs)}"
        for name in theirs:
            for one, other in zip(_tensors(got[name]), _tensors(theirs[name]), strict=True):
                if reason := _differ(one, other, LOGITS, exact):
                    return f"{name}: {reason}"
    return OK


def _tensors(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output's field; caches are compared through generation."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _differ(ours: torch.Tensor, theirs: torch.Tensor, limit: float, exact: bool) -> str | None:
    if ours.shape == theirs.shape and torch.equal(ours.isnan(), theirs.isnan()):
        # A padded position may be NaN in stock transformers: it must be NaN here as well.
        ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    error = relative_error(ours, theirs)
    if exact:
        return None if torch.equal(ours, theirs) else f"not bit-equal, relative error {error:.2g}"
    return None if error <= limit else f"relative error {error:.2g}"


def _loss(model: Any) -> torch.Tensor:
    """The loss in training mode, half of the labels masked; dropout draws the same numbers at every call."""
    ids = _batch()["input_ids"][:2]
    labels = ids.clone()
    labels[:, : TOKENS // 2] = -100
    model.train()
    model.zero_grad()
    torch.manual_seed(4)
    return model(input_ids=ids, labels=labels).loss


def _losses(ours: Any, stock: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with _stock_side():
        theirs = _loss(stock)
        if theirs is None:
            raise _StockFails("its forward returns no loss")
    return _loss(ours), theirs


def _compare_loss(ours: Any, stock: Any, exact: bool) -> str:
    mine, theirs = _losses(ours, stock)
    return _differ(mine.detach(), theirs.detach(), LOGITS, exact) or OK


def _compare_gradients(ours: Any, stock: Any, exact: bool) -> str:
    mine, theirs = _losses(ours, stock)
    with _stock_side():
        theirs.backward()
    mine.backward()
    return _grads_differ(ours, stock, exact) or OK


def _grads_differ(ours: nn.Module, stock: nn.Module, exact: bool) -> str | None:
    theirs = dict(stock.named_parameters())
    total = sum(float(p.grad.norm()) for p in stock.parameters() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        one, other = parameter.grad, theirs[name].grad
        if other is None or one is None:
            if other is not one and not (one is None and other is not None and not other.any()):
                return f"{name} has {'no' if one is None else 'a'} gradient"
            continue
        reason = _differ(one, other, GRADIENTS, exact)
        # A gradient that is rounding alone has no relative error to speak of.
        if reason and (exact or float((one - other).norm()) > 1e-7 * total):
            return f"gradient of {name}: {reason}"
    return None


def _compare_lora(folder: Path, exact: bool) -> str:
    """hasten's LoRA, with its default activation checkpointing, against PEFT's with the same weights: on all Linears, or on
    what PEFT can adapt where it cannot adapt all of them."""
    try:
        return _compare_adapter(folder, exact, "all-linear")
    except _StockFails as error:
        stock = _load_stock(folder)
        linear = {name.rsplit(".", 1)[-1] for name, m in stock.named_modules() if type(m) is nn.Linear and "." in name}
        targets = sorted(linear - REFUSED_BY_PEFT)
        if not targets:
            raise
        outcome = _compare_adapter(folder, exact, targets)
        return f"{OK} on {', '.join(targets)} (all-linear: {error})" if outcome == OK else outcome


def _compare_adapter(folder: Path, exact: bool, targets: str | list[str]) -> str:
    from peft import LoraConfig, get_peft_model

    with _stock_side():
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        theirs = get_peft_model(_load_stock(folder), config)
        theirs.eval()(**_batch())
    ours = FastLanguageModel.get_peft_model(_load(folder), r=4, lora_alpha=8, target_modules=targets)
    torch.manual_seed(3)
    pairs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
            pairs[name].data.copy_(parameter.data)
    with torch.no_grad():
        expected = theirs.eval()(**_batch()).logits
        if reason := _differ(ours.eval()(**_batch()).logits, expected, LOGITS, exact):
            return f"logits: {reason}"
    mine, other = _losses(ours, theirs)
    with _stock_side():
        other.backward()
    mine.backward()
    return _differ(mine.detach(), other.detach(), LOGITS, exact) or _grads_differ(ours, theirs, exact) or OK


def _compare_generation(ours: Any, stock: Any) -> str:
    """Greedy tokens for a left-padded batch, without router losses, whose masks do not fit a decoding step in transformers."""
    for config in (m.config.get_text_config() for m in (ours, stock)):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
    arguments = {**_batch(), "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        with _stock_side():
            theirs = stock.eval().generate(**arguments)
        got = ours.eval().generate(**arguments)
    return OK if torch.equal(got, theirs) else "other tokens"
