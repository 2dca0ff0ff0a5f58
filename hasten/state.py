"""Holds hasten's state of one model: a single typed object on the causal LM, reached by `state_of`.

It is copied with the model (deepcopy, pickle) and is the only attribute that hasten adds to a transformers or PEFT
model. Objects of higher layers (plan, memory policy, engine) are typed by protocols here, so that imports go one way.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from hasten.options import AdapterOptions, LoadOptions

ATTRIBUTE = "_hasten_state"
PEFT_CHILDREN = ("base_model", "lora_model", "model")
"""Where PEFT's models keep the model inside: PeftModel and PeftMixedModel; X-LoRA; LoRA and the other methods."""


class PlannedOverlay(Protocol):
    """`patching.plan.Action`."""

    @property
    def name(self) -> str: ...
    @property
    def why(self) -> str: ...


class SkippedModule(Protocol):
    """`patching.plan.Skip`."""

    @property
    def name(self) -> str: ...
    @property
    def reason(self) -> str: ...


class OverlayPlan(Protocol):
    """`patching.plan.Plan`."""

    @property
    def actions(self) -> Sequence[PlannedOverlay]: ...
    @property
    def skips(self) -> Sequence[SkippedModule]: ...


class MemoryAdvisor(Protocol):
    """The part of `training.memory` that a causal LM's forward calls, so that out-of-memory errors say which changes
    would free memory.

    advising: the context of a forward over (sequences, tokens per sequence). watch_backward: the same for the backward
    through the forward's outputs.
    """

    def advising(self, batch_shape: tuple[int, int] | None) -> AbstractContextManager[None]: ...
    def watch_backward(self, outputs: Any) -> None: ...


@dataclass(frozen=True)
class GenerateCall:
    """One call of `model.generate`. stock: transformers' `generate`, bound to the model. args, kwargs: the caller's."""

    stock: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """What `model.generate` calls. Implementations are in `hasten.inference`, one file each."""

    @property
    def name(self) -> str: ...

    def check(self, model: Any, options: LoadOptions) -> list[str]:
        """Returns every reason why this engine cannot do what `options` ask of `generate`; empty = none. Called once the model
        is loaded. model: the causal LM."""
        ...

    def generate(self, model: Any, call: GenerateCall) -> Any:
        """Returns what transformers' `generate` returns for this call. model: the causal LM."""
        ...


@dataclass(frozen=True)
class FusedHeadRequest:
    """Settings of TRL's `add_fused_lm_head`. outputs: names of the scores to return."""

    temperature: float = 1.0
    cast_lm_head_to_fp32: bool = False
    outputs: tuple[str, ...] = ("log_probs", "entropy", "is_top1")


@dataclass
class ModelState:
    """load_options, adapter_options: the arguments of `from_pretrained` and `get_peft_model`.

    notes: topic -> lines of the report. plan: the overlays that are on. memory: the memory policy, None = none.
    checkpointing: the `use_gradient_checkpointing` in force, None = never set by hasten. mlp_tile: `unsloth_tiled_mlp`
    as given. trained_dtypes: parameter name in the PeftModel -> the dtype it trains in. fused_head: TRL's request, None
    = its defaults. saw_labels: whether a training batch had a label that is not ignored. engine: called by `generate`,
    None = stock.
    """

    load_options: LoadOptions | None = None
    adapter_options: AdapterOptions | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)
    plan: OverlayPlan | None = None
    memory: MemoryAdvisor | None = None
    checkpointing: bool | str | None = None
    mlp_tile: bool | int | str = False
    trained_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    fused_head: FusedHeadRequest | None = None
    saw_labels: bool = False
    engine: Engine | None = None


def causal_lm_of(model: nn.Module) -> Any:
    """Returns the transformers model inside a PeftModel, through any number of them, or `model` itself."""
    is_peft = _derives_from_peft if torch.compiler.is_compiling() else _is_peft  # Dynamo warns of a cached function
    while is_peft(type(model)):
        children = model._modules
        inner = next((children[name] for name in PEFT_CHILDREN if children.get(name) is not None), None)
        if inner is None:
            break
        model = inner
    return model


def _derives_from_peft(kind: type) -> bool:
    """Returns whether the class is one of PEFT's, or derived from one."""
    return any(one.__module__.split(".")[0] == "peft" for one in kind.__mro__)


_is_peft = functools.cache(_derives_from_peft)


def state_of(model: nn.Module) -> ModelState:
    """Returns the state of the causal LM (`model`, or the one inside the PeftModel); attaches an empty one if there is
    none."""
    own = causal_lm_of(model).__dict__
    if ATTRIBUTE not in own:
        own[ATTRIBUTE] = ModelState()
    return own[ATTRIBUTE]


def find_state(model: nn.Module) -> ModelState | None:
    """Returns the state of the causal LM, None for a model without one."""
    return causal_lm_of(model).__dict__.get(ATTRIBUTE)
