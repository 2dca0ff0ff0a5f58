"""Builds the adapter that `get_peft_model` asked for, as a plain PEFT adapter."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hasten.errors import OptionError
from hasten.options import AdapterOptions
from hasten.overlays import Fp32Embedding, Fp32Head, Fp32WeightConfig, Overlay
from hasten.patching.apply import put_overlay
from hasten.suggest import did_you_mean
from hasten.training import loftq

EMBEDDINGS = ("embed_tokens", "lm_head")


def build(model: Any, options: AdapterOptions, read_dense: Callable[[str], torch.Tensor] | None = None) -> Any:
    """Returns PEFT's model around `model`, LoRA A drawn from `options.random_state`; the caller's random generators do
    not change.

    read_dense: reads a dense tensor of the base checkpoint by name, for LoftQ (None = there is no such checkpoint).
    If `target_modules` names embedding or head, they are trained fully instead (moved to `modules_to_save`); tied
    weights stay tied. Raises OptionError for names that match nothing, before the model is changed.
    """
    from peft import LoraConfig, get_peft_model

    targets, saved = _split(model, options)
    _check(model, targets, saved, options, read_dense)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))  # not every config has the field
    trains_tied = tied and bool(set(saved) & set(EMBEDDINGS))
    if trains_tied:
        saved = ["embed_tokens", *(name for name in saved if name not in EMBEDDINGS)]
    defaults = {
        "task_type": "CAUSAL_LM",
        "ensure_weight_tying": trains_tied,
        "revision": getattr(model.config, "_commit_hash", None),
    }
    config = LoraConfig(
        r=options.r,
        target_modules=targets,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        bias=options.bias,  # pyright: ignore[reportArgumentType]
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        init_lora_weights=options.init_lora_weights,  # pyright: ignore[reportArgumentType]
        modules_to_save=saved or None,
        layers_to_transform=options.layers_to_transform,
        **{**defaults, **dict(options.extra)},
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(options.random_state)
        peft_model = get_peft_model(model, config)
    if options.loftq_config and read_dense is not None:
        loftq.initialise(peft_model, read_dense)
        peft_model.peft_config["default"].loftq_config = dict(options.loftq_config)  # pyright: ignore[reportAttributeAccessIssue]
    return peft_model


def trains_embedding(options: AdapterOptions) -> bool:
    """Returns whether the adapter trains (a copy of) the input embedding."""
    names = [
        *(options.modules_to_save or []),
        *([] if isinstance(options.target_modules, str) else options.target_modules),
    ]
    return any(name.rsplit(".", 1)[-1] == EMBEDDINGS[0] for name in names)


def set_dtypes(peft_model: Any, fp32: bool) -> dict[str, torch.dtype]:
    """Casts trained weights to fp32 (True) or to the model's dtype (False); returns {name: dtype} of every trained
    weight.

    Casts LoRA weights, and the trained copies of embedding and head, whose outputs and inputs stay in the model's
    dtype. Other trained copies (of a norm, say) keep the dtype of the module that they replace.
    """
    base = peft_model.get_base_model()
    compute = _residual_dtype(base)
    wide = torch.float32 if fp32 else compute
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.to(wide)
    if wide != compute:
        _widen(base.get_input_embeddings(), Fp32Embedding, compute)
        _widen(base.get_output_embeddings(), Fp32Head, compute)
    return {name: p.dtype for name, p in peft_model.named_parameters() if p.requires_grad}


def _residual_dtype(base: Any) -> torch.dtype:
    """Returns the dtype of the residual stream: that of the embedding under PEFT's wrappers. The config's dtype is that
    of loading, which `model.float()` does not change."""
    embedding = base.get_input_embeddings()
    frozen = getattr(embedding, "original_module", embedding)
    return next(p.dtype for p in frozen.parameters() if p.is_floating_point())


def _widen(module: Any, overlay: type[Overlay], compute: torch.dtype) -> None:
    for copy in getattr(module, "modules_to_save", {}).values():
        put_overlay(copy, overlay, Fp32WeightConfig(compute))
        copy.weight.data = copy.weight.data.float()


def _split(model: Any, options: AdapterOptions) -> tuple[list[str] | str, list[str]]:
    saved = list(options.modules_to_save or [])
    if isinstance(options.target_modules, str):
        return options.target_modules, saved
    moved = [name for name in options.target_modules if name.rsplit(".", 1)[-1] in EMBEDDINGS]
    targets = [name for name in options.target_modules if name not in moved]
    return targets, saved + [name.rsplit(".", 1)[-1] for name in moved if name.rsplit(".", 1)[-1] not in saved]


def _check(
    model: nn.Module,
    targets: list[str] | str,
    saved: list[str],
    options: AdapterOptions,
    read_dense: Callable[[str], torch.Tensor] | None,
) -> None:
    paths = [name for name, _ in model.named_modules() if name]
    problems = []
    if isinstance(targets, str):
        if targets != "all-linear" and not any(re.fullmatch(targets, path) for path in paths):
            problems.append(f"target_modules={targets!r} matches no module as a regular expression")
    else:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        problems += _unmatched("target_modules", targets, linear, paths)
    problems += _unmatched("modules_to_save", saved, paths, paths)
    if options.loftq_config:
        problems += loftq.problems(model, dict(options.loftq_config))
        if read_dense is None:
            problems.append(
                "loftq_config needs the dense checkpoint that the base was quantised from, and none was found; load the base from a "
                "dense checkpoint, or leave loftq_config out"
            )
    if problems:
        raise OptionError("get_peft_model", problems)


def _unmatched(argument: str, names: Iterable[str], among: list[str], paths: list[str]) -> list[str]:
    problems = []
    ends = sorted({path.rsplit(".", 1)[-1] for path in among})
    for name in names:
        if any(path == name or path.endswith(f".{name}") for path in among):
            continue
        present = any(path == name or path.endswith(f".{name}") for path in paths)
        found = "is not a Linear layer of this model" if present else "matches no module of this model"
        hint = did_you_mean(name, ends) or f"; it has {', '.join(ends[:8])}"
        problems.append(f"{argument} {name!r} {found}{hint}")
    return problems
