"""Builds the adapter that `get_peft_model` asked for, as a plain PEFT adapter."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES

from hasten.errors import OptionError
from hasten.options import AdapterOptions
from hasten.overlays import Fp32Embedding, Fp32Head, Fp32WeightConfig, Overlay
from hasten.patching.apply import put_overlay
from hasten.training import loftq
from hasten.training.injection import inject, unchanged_on_error
from hasten.training.targets import Matching, broken_patterns, exact_names, problems

EMBEDDINGS = ("embed_tokens", "lm_head")


def build(model: Any, options: AdapterOptions, read_dense: Callable[[str], torch.Tensor] | None = None) -> Any:
    """Returns PEFT's model around `model`, LoRA A drawn from `options.random_state`; the caller's random generators do
    not change.

    read_dense: reads a dense tensor of the base checkpoint by name, for LoftQ (None = there is no such checkpoint).
    If `target_modules` names embedding or head, they are trained fully instead (moved to `modules_to_save`); tied
    weights stay tied. Raises OptionError, with the model unchanged, for names that match nothing and for whatever PEFT
    refuses or would ignore.
    """
    targets, saved = _split(options)
    try:
        config = _config(model, options, targets, saved)
        if found := broken_patterns(config):
            raise OptionError("get_peft_model", found)
        matching = Matching.of(model, config)
    except OptionError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise OptionError("get_peft_model", [f"PEFT refuses these options: {error}"]) from error
    if "fan_in_fan_out" not in options.extra:
        config.fan_in_fan_out = matching.config.fan_in_fan_out = matching.orientations() == {True}
    _check(matching, targets, saved, options, read_dense)
    config.modules_to_save = exact_names(matching, config.modules_to_save or []) or None
    with unchanged_on_error(model), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(options.random_state)
        peft_model = inject(model, config)
        if options.loftq_config and read_dense is not None:
            loftq.initialise(peft_model, read_dense)
            peft_model.peft_config["default"].loftq_config = dict(options.loftq_config)  # pyright: ignore[reportAttributeAccessIssue]
    return peft_model


def _config(model: Any, options: AdapterOptions, targets: list[str] | str, saved: list[str]) -> LoraConfig:
    """Returns PEFT's config. With nothing to put a LoRA on, PEFT's placeholder stands for the targets."""
    layers = options.layers_to_transform
    tied = _tied_names(model, options, saved)
    fields = {
        "task_type": "CAUSAL_LM",
        "ensure_weight_tying": tied is not None,
        "revision": getattr(model.config, "_commit_hash", None),
        **copy.deepcopy(dict(options.extra)),
    }
    only_parameters = bool(options.extra.get("target_parameters"))
    return LoraConfig(
        r=options.r,
        target_modules=targets or ([] if only_parameters else DUMMY_TARGET_MODULES),
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        bias=options.bias,  # pyright: ignore[reportArgumentType]
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        init_lora_weights=options.init_lora_weights,  # pyright: ignore[reportArgumentType]
        modules_to_save=tied or saved or None,
        layers_to_transform=layers if layers is None or isinstance(layers, int) else list(layers),
        **fields,
    )


def _tied_names(model: Any, options: AdapterOptions, saved: list[str]) -> list[str] | None:
    """Returns `modules_to_save` for training the weight that embedding and head share, as one; None where it does not
    train, is asked to be untied, or PEFT cannot tie (it recognises the two by name).

    PEFT adds the other module to the one that is named.
    """
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))  # not every config has the field
    shared = [model.get_input_embeddings(), model.get_output_embeddings()]
    paths = [next((path for path, one in model.named_modules() if one is module), "") for module in shared]
    others = [name for name in saved if not any(_means(name, path) for path in paths)]
    if not tied or not options.extra.get("ensure_weight_tying", True) or len(others) == len(saved):
        return None
    embedding, head = (path.rsplit(".", 1)[-1] for path in paths)
    names = [embedding] if embedding in EMBEDDING_LAYER_NAMES else [embedding, head]
    return [*names, *others] if set(names) & set(EMBEDDING_LAYER_NAMES) else None


def _means(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


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
    for trained in getattr(module, "modules_to_save", {}).values():
        put_overlay(trained, overlay, Fp32WeightConfig(compute))
        trained.weight.data = trained.weight.data.float()


def _split(options: AdapterOptions) -> tuple[list[str] | str, list[str]]:
    """Returns (target_modules without embedding and head, modules_to_save with them)."""
    saved = list(options.modules_to_save or [])
    if isinstance(options.target_modules, str):
        return options.target_modules, saved
    moved = [name for name in options.target_modules if name.rsplit(".", 1)[-1] in EMBEDDINGS]
    targets = [name for name in options.target_modules if name not in moved]
    return targets, saved + [name.rsplit(".", 1)[-1] for name in moved if name.rsplit(".", 1)[-1] not in saved]


def _check(
    matching: Matching,
    targets: list[str] | str,
    saved: list[str],
    options: AdapterOptions,
    read_dense: Callable[[str], torch.Tensor] | None,
) -> None:
    found = problems(matching, targets if isinstance(targets, str) else tuple(targets), saved)
    if options.loftq_config:
        found += loftq.problems(matching.model, dict(options.loftq_config))
        if read_dense is None:
            found.append(
                "loftq_config needs the dense checkpoint that the base was quantised from, and none was found; load the base from a "
                "dense checkpoint, or leave loftq_config out"
            )
    if found:
        raise OptionError("get_peft_model", found)
