"""Decides whether `HeadOverlay` does what the causal LM's forward of a model type without a data file does.

Both forwards run on a stand-in whose backbone, head and loss function are recorders. They must make the same calls with
the same objects and return the same objects in an output of the same type: what a scale, a softcap, a cast, dropout or
a router loss would change. No weight of the model takes part.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast

from hasten.overlays import HeadConfig, HeadOverlay
from hasten.overlays.cache_name import CACHE, OLD_CACHE
from hasten.patching.classes import overlay_class, stock_class
from hasten.patching.forward_names import read_forward
from hasten.patching.trial import DTYPES, Recorder, Refused, random, same, stand_in
from hasten.weights import formats
from hasten.weights.peft_layers import base_layer_of

CHILDREN = {"model", "lm_head"}
ATTRIBUTES = frozenset({*CHILDREN, "config", "vocab_size"})
OPERATIONS = frozenset(
    {"last_hidden_state", CACHE, OLD_CACHE, "hidden_states", "attentions", "loss_function", "vocab_size"}
    | {"slice_logits_to_keep", "isinstance", "int", "slice", "CausalLMOutputWithPast"}
)
LOSS_KEYWORDS = {"num_items_in_batch", "ignore_index", "shift_labels"}
"""Keywords of a loss function. Stock forwards hand them to the backbone as well, which ignores them."""

BATCH, TOKENS, WIDTH = 2, 5, 3

Call = tuple[tuple[Any, ...], dict[str, Any]]


def prove_head(model: Any) -> HeadConfig:
    """The config of an overlay that does what the model's class does. Raises Refused."""
    _check(model)
    for dtype in DTYPES:
        answers = _Answers(_rows(model.lm_head), dtype)
        for training, call in product((True, False), list(_calls())):
            theirs, ours = (_run(model, overlaid, answers, training, call) for overlaid in (False, True))
            difference = _difference(theirs, ours)
            if difference is not None:
                given = ", ".join(sorted(call[1])) or "positional arguments"
                raise Refused(f"{difference} are not those of lm_head(last hidden state), given {given}")
    return HeadConfig()


def _rows(head: Any) -> int:
    weight: torch.Tensor = base_layer_of(head).weight  # pyright: ignore[reportAssignmentType]
    return int(getattr(head, "out_features", weight.shape[0]))


def _check(model: Any) -> None:
    children = {name for name, _ in model.named_children()}
    if children != CHILDREN:
        raise Refused(f"it consists of {', '.join(sorted(children))}, not of a backbone `model` and a head `lm_head`")
    if [*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]:
        raise Refused("it has weights of its own beside its backbone and head")
    names = read_forward(model)
    if isinstance(names, str):
        raise Refused(names)
    ours = tuple(inspect.signature(HeadOverlay.forward).parameters)[1:]
    expected = tuple(CACHE if name == OLD_CACHE else name for name in ours)
    if extra := [name for name in names.parameters if name not in expected]:
        raise Refused(f"its forward takes {', '.join(extra)}")
    if names.parameters != expected:
        raise Refused(f"its forward takes other arguments, or in another order: {', '.join(names.parameters)}")
    if reason := names.unknown(ATTRIBUTES, OPERATIONS):
        raise Refused(reason)
    head = base_layer_of(model.lm_head)
    found = formats.find_format(head)
    if not isinstance(head, nn.Linear) or found is None or isinstance(found.weight(head), str):
        raise Refused(f"its head is a {type(head).__name__}, not a Linear")


@dataclass(frozen=True)
class _Answers:
    """What the recorders return: the same objects to both forwards. rows: of the head's weight."""

    rows: int
    dtype: torch.dtype
    hidden: torch.Tensor = field(init=False)
    states: tuple[torch.Tensor, ...] = field(init=False)
    cache: DynamicCache = field(default_factory=DynamicCache)
    loss: torch.Tensor = field(default_factory=lambda: random(1).sum())
    logits: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", random(BATCH, TOKENS, WIDTH, seed=1, dtype=self.dtype))
        object.__setattr__(self, "states", (random(BATCH, TOKENS, WIDTH, seed=2, dtype=self.dtype),))

    def backbone(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(
            last_hidden_state=self.hidden,  # pyright: ignore[reportArgumentType]
            hidden_states=self.states,  # pyright: ignore[reportArgumentType]
            attentions=self.states * 2,  # pyright: ignore[reportArgumentType]
            **{CACHE: self.cache},  # pyright: ignore[reportArgumentType]
        )

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = (*hidden.shape[:-1], self.rows)
        return self.logits.setdefault(shape, random(*shape, seed=3, dtype=self.dtype) * 100)


@dataclass(frozen=True)
class _Run:
    """The calls that one forward made, as (arguments, keywords), and what it returned."""

    backbone: list[Call]
    head: list[Call]
    loss: list[Call]
    output: Any


def _run(model: Any, overlaid: bool, answers: _Answers, training: bool, call: Call) -> _Run:
    backbone, head = Recorder(answers.backbone), Recorder(answers.head)
    loss = Recorder(lambda *_, **__: answers.loss)
    made = stand_in(model, {}, {"model": backbone, "lm_head": head})
    made.__dict__["_loss_function"] = loss
    if overlaid:
        made.__class__ = overlay_class(stock_class(model), HeadOverlay, HeadConfig())
    output = made.train(training)(*call[0], **call[1])
    called = [_without_defaults(one) for one in backbone.calls]
    return _Run(called, head.calls, [_named(*one) for one in loss.calls], output)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call of the loss function with its arguments by name."""
    return (), {**dict(zip(inspect.signature(ForCausalLMLoss).parameters, args, strict=False)), **kwargs}


def _without_defaults(call: Call) -> Call:
    """A call of the backbone without what says nothing: None, the output's form, and what only losses read."""
    args, kwargs = call
    named = {k: v for k, v in kwargs.items() if v is not None and k not in {"return_dict", *LOSS_KEYWORDS}}
    return args, named


def _calls() -> Iterator[Call]:
    """Calls with every keyword that a causal LM's forward names, and some that it hands on."""
    ids, positions = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS), torch.arange(TOKENS)[None]
    mask, embeds = torch.ones(BATCH, TOKENS), random(BATCH, TOKENS, WIDTH)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, CACHE: DynamicCache()}
    handed_on = {"output_attentions": True, "output_hidden_states": True, "cache_position": positions[0]}
    loss = {"num_items_in_batch": torch.tensor(7), "ignore_index": -1, "shift_labels": ids}
    yield (), {"input_ids": ids}
    yield (ids, mask), {}
    yield (), {"inputs_embeds": embeds, "use_cache": False}
    yield (), {**inputs, "inputs_embeds": embeds, "use_cache": True, **handed_on}
    yield (), {**inputs, "labels": ids}
    yield (), {**inputs, "labels": ids, **loss, **handed_on}
    for form in (False, True):
        yield (), {**inputs, "return_dict": form}
        yield (), {**inputs, "labels": ids, "return_dict": form}
    for keep in (1, 3, torch.tensor([0, 2])):
        yield (), {**inputs, "logits_to_keep": keep}
        yield (), {**inputs, "logits_to_keep": keep, "labels": ids}


def _difference(theirs: _Run, ours: _Run) -> str | None:
    """What differs between two runs, None where nothing does."""
    if not _same_calls(theirs.backbone, ours.backbone):
        return "the arguments of its backbone"
    if not _same_calls(theirs.head, ours.head):
        return "the inputs of its lm_head"
    if not _same_calls(theirs.loss, ours.loss):
        return "the arguments of its loss function"
    one, other = theirs.output, ours.output
    if type(one) is not type(other):
        return f"its outputs ({type(one).__name__})"
    if isinstance(one, dict):
        if list(one) != list(other):
            return "the fields of its outputs"
        one, other = tuple(one.values()), tuple(other.values())
    return None if same(one, other) else "its outputs"


def _same_calls(theirs: list[Call], ours: list[Call]) -> bool:
    if len(theirs) != len(ours):
        return False
    for (args, kwargs), (other_args, other_kwargs) in zip(theirs, ours, strict=True):
        if kwargs.keys() != other_kwargs.keys() or len(args) != len(other_args):
            return False
        pairs = [*zip(args, other_args, strict=True), *((kwargs[name], other_kwargs[name]) for name in kwargs)]
        if not all(same(one, other) or _equal(one, other) for one, other in pairs):
            return False
    return True


def _equal(one: Any, other: Any) -> bool:
    """Whether both are tensors of equal values: positions selected by a tensor are copies."""
    both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return both and (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(one, other)
