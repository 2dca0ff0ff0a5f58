"""Wraps transformers' `generate`: checks lengths first, accepts padding on either side, runs in evaluation mode.

Decoding itself (greedy, sampling, beams, assistants, streamers, caches) is transformers'.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

from hasten.errors import InputError, OptionError
from hasten.inference.modes import evaluating
from hasten.inference.prompt import Prompt, read_prompt
from hasten.options.generation import generation_problems
from hasten.overlays import HeadOverlay, StockHeadOverlay
from hasten.state import GenerateCall

DEFAULT_NEW_TOKENS = 20  # transformers' default


def generate(model: Any, stock_generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns `stock_generate(*args, **kwargs)`, with each sequence of a padded batch continued as it would be alone.

    model: the causal LM. stock_generate: transformers' `generate`, bound to it. Sequences with padding after their
    first token are left-padded first, so the prompt part of the result is left-padded; its width is that of the prompt
    given, and `result[:, prompt.shape[1]:]` are the new tokens.

    Raises OptionError for lengths and sampling parameters of another type or out of range.
    Raises InputError before anything runs where a prompt, or a prompt plus the new tokens that this call asks for, is
    longer than `max_seq_length`, where a sequence is padding only, and where shapes disagree. A length that comes only
    from the checkpoint's generation config or transformers' default is lowered to what fits. Does not change the model,
    its configs or the caller's tensors.
    """
    call = inspect.signature(stock_generate).bind(*args, **kwargs)
    catch_all = next((p.name for p in call.signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    named = {name: value for name, value in call.arguments.items() if name != catch_all}
    named |= call.arguments.get(catch_all, {}) if catch_all else {}
    if problems := generation_problems(named):
        raise OptionError("generate", problems)
    changed: dict[str, Any] = {}
    prompt = read_prompt(named, *(_setting(model, named, name) for name in ("pad_token_id", "eos_token_id")))
    if prompt is not None:
        changed |= _checked_length(model, named, prompt)
        if prompt.needs_realigning():
            prompt = prompt.left_padded()
            changed |= {**prompt.tensors, "attention_mask": prompt.mask_BS}
    call.arguments.update({name: value for name, value in changed.items() if name in call.signature.parameters})
    others = {name: value for name, value in changed.items() if name not in call.signature.parameters}
    with evaluating(model):
        return stock_generate(*call.args, **{**call.kwargs, **others})


def _setting(model: Any, named: dict[str, Any], name: str) -> Any:
    """Returns a generation parameter by transformers' precedence: the call, its generation_config, the model's."""
    if name in named:
        return named[name]
    return _asked(named, name) if _asked(named, name) is not None else getattr(model.generation_config, name, None)


def _asked(named: dict[str, Any], name: str) -> Any:
    """Returns a generation parameter if this call sets it, by name or in its generation_config; else None."""
    if named.get(name) is not None:
        return named[name]
    return getattr(named.get("generation_config"), name, None)


def asked(model: Any, call: GenerateCall, name: str) -> Any:
    """Returns a generation parameter's value in a call: by name, in its generation_config, in the model's."""
    config = call.args[1] if len(call.args) > 1 else None
    named = {"generation_config": config, **call.kwargs}
    return _setting(model, {k: v for k, v in named.items() if v is not None}, name)


def _checked_length(model: Any, named: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
    """Returns the arguments to change so that no sequence exceeds `max_seq_length`. Raises InputError where the caller
    asks for more."""
    limit = model.overlay_config.max_seq_length if isinstance(model, (HeadOverlay, StockHeadOverlay)) else None
    if limit is None:
        return {}
    if prompt.longest > limit:
        raise InputError(
            f"a prompt of {prompt.longest} tokens was given to a model loaded with max_seq_length={limit}. Load it "
            "with a longer max_seq_length, or shorten the prompt; it is never truncated silently."
        )
    asked = _new_tokens(_asked(named, "max_new_tokens"), _asked(named, "max_length"), prompt.width)
    if asked is not None and prompt.longest + asked > limit:
        raise InputError(
            f"a prompt of {prompt.longest} tokens and {asked} new ones are {prompt.longest + asked} tokens; the model was "
            f"loaded with max_seq_length={limit}. Ask for at most {limit - prompt.longest} new tokens, or load it with "
            f"max_seq_length={prompt.longest + asked} or more."
        )
    if asked is not None:
        return {}
    own = model.generation_config
    implied = _new_tokens(own.max_new_tokens, own.max_length, prompt.width)
    if prompt.longest + (DEFAULT_NEW_TOKENS if implied is None else implied) <= limit:
        return {}
    if prompt.longest == limit:
        raise InputError(
            f"a prompt of {limit} tokens fills the max_seq_length={limit} that the model was loaded with, so no token "
            "can be generated. Load it with a longer max_seq_length, or shorten the prompt."
        )
    return _shortened(named, own.max_new_tokens is not None, prompt, limit - prompt.longest)


def _new_tokens(max_new_tokens: int | None, max_length: int | None, width: int) -> int | None:
    """Returns the number of new tokens that the two parameters allow after a prompt of `width`; max_new_tokens wins, as
    in transformers."""
    if max_new_tokens is not None:
        return max_new_tokens
    return None if max_length is None else max_length - width


def _shortened(named: dict[str, Any], by_new_tokens: bool, prompt: Prompt, allowed: int) -> dict[str, Any]:
    """Returns the arguments that allow `allowed` new tokens, in a copy of the caller's generation_config if there is
    one."""
    name, value = ("max_new_tokens", allowed) if by_new_tokens else ("max_length", prompt.width + allowed)
    config = named.get("generation_config")
    if config is None:
        return {name: value}
    config = copy.deepcopy(config)
    setattr(config, name, value)
    return {"generation_config": config}
