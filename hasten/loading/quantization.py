"""Decides how weights are stored: as in the checkpoint, or quantised while it is read. Formats are in
`weights.formats`."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hasten.errors import MissingExtraError
from hasten.loading.shards import is_converted
from hasten.options import LoadOptions
from hasten.weights import formats
from hasten.weights.formats import WeightFormat


@dataclass(frozen=True)
class Storage:
    """How the Linears' weights will be stored.

    settings: the quantization_config that transformers gets to quantise while reading, None = none. own: the format
    whose Linears hasten itself puts into the model, None = none. kept_dense: modules that `own` leaves dense. stored:
    the checkpoint holds them in `own` already. notes: lines for the report.
    """

    settings: Any = None
    own: WeightFormat | None = None
    kept_dense: Sequence[str] = ()
    stored: bool = False
    notes: Sequence[str] = ()


def stored_name(config: Any) -> str | None:
    """Returns how the checkpoint's own weights are quantised: a format's name, another method's (e.g. "gptq"), None =
    dense."""
    record = _record(config)
    if not record:
        return None
    found = formats.stored_format(record)
    return str(record.get("quant_method", "unknown")) if found is None else found.name


def stored_problems(config: Any, empty: PreTrainedModel, on_cpu: bool, options: LoadOptions) -> list[str]:
    """Returns why a checkpoint that is stored quantised cannot be loaded as asked."""
    stored = stored_name(config)
    if stored is None:
        return []
    record = _record(config)
    found = formats.stored_format(record)
    if stored == "fp8" and found is None:
        return ["the checkpoint has fp8 weights, which this version of hasten does not read; use its dense original"]
    fits = None if found is None else found.stored_argument or found.load_argument
    other = [name for name in options.asked_storage if name != fits]
    default = str(formats.default().load_argument)
    if fits == default and getattr(options, default, None) is False:
        other.append(f"{default}=False")
    if options.full_finetuning:
        other.append("full_finetuning")
    problems = []
    if other:
        problems.append(
            f"{', '.join(other)} was asked for, but the checkpoint is already stored as {stored}; leave it out to load it "
            "as it is, or pass the dense original"
        )
    if found is not None:
        problems += found.problems_on_load(empty, on_cpu, found.kept_dense_in(record))
        if found.reads_stored() and is_converted(empty):
            problems.append(
                f"the checkpoint is stored as {stored}, and {type(empty).__name__} stores its tensors in another layout "
                "than it runs them in; pass the dense original"
            )
    return problems


def _record(config: Any) -> Mapping[str, Any]:
    stored = getattr(config, "quantization_config", None) or {}
    return stored if isinstance(stored, Mapping) else stored.to_dict()


def plan_storage(
    config: Any, empty: PreTrainedModel, dtype: torch.dtype, on_cpu: bool, options: LoadOptions
) -> Storage:
    """Plans how the weights will be stored, with notes for the report. empty: the model on the meta device."""
    if options.own_quantization:
        own = options.extra["quantization_config"]
        return Storage(own, notes=["quantisation: by the caller's quantization_config"])
    stored = stored_name(config)
    if stored is not None:
        record = _record(config)
        found = formats.stored_format(record)
        notes = [f"quantisation: {stored}, as the checkpoint is stored"]
        if found is None or not found.reads_stored():
            return Storage(notes=notes)
        return Storage(own=found, kept_dense=found.kept_dense_in(record), stored=True, notes=notes)
    asked = _asked(options)
    if asked is None or asked.exact:
        return Storage()
    plan = asked.plan_load(empty, dtype, on_cpu)
    own = asked if plan.config is None else None
    return Storage(plan.config, own, plan.kept_dense, notes=plan.notes)


def missing_package(options: LoadOptions, config: Any) -> MissingExtraError | None:
    """Returns an error where the format that is wanted or found needs a package that is not installed."""
    for one in (_asked(options), formats.stored_format(_record(config))):
        if one is None or one.package is None or importlib.util.find_spec(one.package) is not None:
            continue
        default = formats.default().load_argument
        what = f"Storing weights in {one.bits} bits ({default} is on by default)"
        return MissingExtraError(what, one.package, one.extra or one.package)
    return None


def _asked(options: LoadOptions) -> WeightFormat | None:
    """Returns the format that the arguments ask for; None = the caller's own quantization_config, or no
    quantisation."""
    if options.own_quantization or options.weight_format is None:
        return None
    return formats.named(options.weight_format)
