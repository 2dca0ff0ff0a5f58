"""Checks the values of transformers' `generate` arguments that decide lengths and sampling.

transformers takes text for a number until an operation fails, "false" for true, and a temperature of -1 for greedy
decoding where nothing samples.
"""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from hasten.options.values import Rule


def whole(least: int) -> Rule:
    """Returns a validator of integers of at least `least`, numpy's included."""

    def check(value: Any) -> str | None:
        fits = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
        return None if fits else f"must be an integer of at least {least}"

    return check


def within(low: float, high: float = math.inf, open_low: bool = False) -> Rule:
    """Returns a validator of finite numbers from `low` to `high`. open_low: `low` itself is refused."""
    bounds = f"{'above' if open_low else 'of at least'} {low:g}" + ("" if high == math.inf else f", at most {high:g}")

    def check(value: Any) -> str | None:
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        fits = number and low <= float(value) <= high and not (open_low and value == low)
        return None if fits else f"must be a finite number {bounds}"

    return check


def flag(value: Any) -> str | None:
    """Validates a boolean: text such as "false" would count as true."""
    return None if isinstance(value, bool) else "must be True or False"


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams", "num_return_sequences"), whole(1)),
    **dict.fromkeys(("min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size"), whole(0)),
    "temperature": within(0),
    **dict.fromkeys(("top_p", "min_p", "typical_p"), within(0, 1)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), within(0, open_low=True)),
    "length_penalty": within(-math.inf),
    **dict.fromkeys(("do_sample", "use_cache", "output_scores", "output_logits", "return_dict_in_generate"), flag),
}
"""Argument -> the validator of its value; None is "not given" everywhere."""


def generation_problems(named: Mapping[str, Any]) -> list[str]:
    """Returns "ARGUMENT=VALUE: what it must be" for each invalid argument of a `generate` call."""
    return [
        f"{name}={named[name]!r}: {problem}"
        for name, rule in RULES.items()
        if named.get(name) is not None and (problem := rule(named[name])) is not None
    ]
