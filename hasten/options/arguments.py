"""Lists transformers' `from_pretrained` arguments that hasten passes on or refuses."""

from collections.abc import Iterable, Mapping

from hasten.options.fields import LoadFields
from hasten.schema import HUB, PASSED, mistyped, parse, suggestion
from hasten.weights.formats import load_arguments

HUB_ARGUMENTS = frozenset(HUB)
MODEL_ARGUMENTS = frozenset(PASSED.keys() - HUB_ARGUMENTS)
REFUSED_ARGUMENTS: Mapping[str, str] = {
    "torch_dtype": "call it dtype",
    "ignore_mismatched_sizes": "it leaves weights uninitialised; use resize_model_vocab for another vocabulary",
    "output_loading_info": "from_pretrained returns (model, tokenizer), and a checkpoint that does not fit raises",
    "state_dict": "save the tensors as a checkpoint folder and pass that",
    "gguf_file": "GGUF checkpoints cannot be trained; pass the safetensors checkpoint it was made from",
    "distributed_config": "start one process per GPU with torchrun; each takes its own GPU",
    "tp_plan": "start one process per GPU with torchrun; each takes its own GPU",
    "tp_size": "start one process per GPU with torchrun; each takes its own GPU",
    "adapter_kwargs": "pass the adapter's folder or id as model_name",
    "proxies": "huggingface_hub reads proxies from its own settings",
}


def check(options: LoadFields) -> list[str]:
    """Refuses arguments of transformers that contradict how hasten reads weights, and values of another type."""
    found = [
        f"{name} is not supported: {REFUSED_ARGUMENTS[name]}" for name in options.extra if name in REFUSED_ARGUMENTS
    ]
    if options.extra.get("low_cpu_mem_usage", True) is not True:
        found.append("low_cpu_mem_usage=False is not supported: weights are always read shard by shard; leave it out")
    return [*found, *mistyped(options.extra, {name: parse(kind) for name, kind in PASSED.items()}).values()]


def unknown_extra(options: LoadFields, config_fields: Iterable[str]) -> list[str]:
    """Returns a problem for each keyword argument that is no argument of transformers' and no field of the config."""
    known = {*HUB_ARGUMENTS, *MODEL_ARGUMENTS, *REFUSED_ARGUMENTS, *load_arguments(), *config_fields}
    return unknown_names(
        options.extra, known | {"low_cpu_mem_usage"}, options.__dataclass_fields__, "a field of the config"
    )


def unknown_names(given: Iterable[str], known: Iterable[str], arguments: Iterable[str], kind: str) -> list[str]:
    """Returns a problem for each of `given` that is not in `known`; `arguments` are suggested as well.

    kind: what the known names are, as in "neither an argument nor a LoraConfig field".
    """
    known = set(known)
    suggested = known | set(arguments)
    return [
        f"{name!r} is neither an argument nor {kind}{suggestion(name, suggested) or '; leave it out'}"
        for name in given
        if name not in known
    ]
