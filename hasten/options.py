"""The arguments of `from_pretrained` and `get_peft_model` as frozen dataclasses that say every problem at once.

What can only be judged with the checkpoint's config at hand is checked by `hasten.loading` and joins the same error.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Self, TypeVar

import torch

from hasten.errors import OptionError
from hasten.option_problems import adapter_problems, bad_values, load_problems
from hasten.weights import formats

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

P = ParamSpec("P")
R = TypeVar("R")


def none_if_left_out(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: an argument of `names` that the caller leaves out reaches the function as None.

    So `load_in_4bit: bool = True` stays the signature that callers and `inspect.signature` see, and the function can
    still tell the default from an explicit True.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            return function(*args, **{**dict.fromkeys(set(names) - set(given)), **kwargs})  # pyright: ignore[reportCallIssue]

        return call

    return decorate


@dataclass(frozen=True)
class LoadOptions:
    """Every argument of `from_pretrained`; docs/api.md says what each does.

    load_in_4bit: None = the default, which is on unless another way of holding the weights is asked for.
    expected_model_type: the family that a family-bound class loads. extra: keyword arguments for transformers'
    `from_pretrained`: `HUB_ARGUMENTS`, `MODEL_ARGUMENTS`, and fields of the checkpoint's config.
    """

    model_name: str = "unsloth/Llama-3.2-1B-Instruct"
    max_seq_length: int = 2048
    dtype: torch.dtype | None = None
    load_in_4bit: bool | None = None
    load_in_8bit: bool = False
    load_in_16bit: bool = False
    full_finetuning: bool = False
    token: str | bool | None = None
    device_map: Any = "sequential"
    rope_scaling: Mapping[str, Any] | None = None
    fix_tokenizer: bool = True
    trust_remote_code: bool = False
    use_gradient_checkpointing: bool | str = "unsloth"
    resize_model_vocab: int | None = None
    revision: str | None = None
    use_exact_model_name: bool = False
    offload_embedding: bool = False
    float32_mixed_precision: bool | None = None
    fast_inference: bool = False
    gpu_memory_utilization: float = 0.5
    float8_kv_cache: bool = False
    random_state: int = 3407
    max_lora_rank: int = 64
    disable_log_stats: bool = True
    qat_scheme: Any = None
    load_in_fp8: bool | str = False
    unsloth_tiled_mlp: bool | int | str = False
    memory_budget: int | str | None = None
    attn_implementation: str | None = None
    use_safetensors: bool | None = None
    expected_model_type: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_call(cls, *args: Any, extra: Mapping[str, Any] | None = None, **named: Any) -> Self:
        """As the constructor; names among `extra` or `named` that are fields become fields, the rest `extra`."""
        return _from_call(cls, args, {**named, **(extra or {})})

    def given(self, argument: str) -> Any:
        """The value of an argument of `from_pretrained`, also of one that only a format of the registry knows."""
        return getattr(self, argument) if argument in self.__dataclass_fields__ else self.extra.get(argument)

    @property
    def asked_storage(self) -> list[str]:
        """The arguments with which the caller asked for a storage format."""
        flags = dict.fromkeys((*formats.load_arguments(), "load_in_fp8"))
        own = ["quantization_config"] if self.own_quantization else []
        return [name for name in flags if self.given(name)] + own

    @property
    def own_quantization(self) -> bool:
        """Whether the caller brings a quantization_config for transformers."""
        return self.extra.get("quantization_config") is not None

    @property
    def weight_format(self) -> str | None:
        """The name of the storage format that the arguments ask for, None = no argument does. Meaningful once validated."""
        asked = [name for name in formats.load_arguments() if self.given(name)]
        if asked:
            return formats.by_load_argument(asked[0]).name
        default = formats.default()
        left_open = self.given(str(default.load_argument)) is None
        return default.name if left_open and not self.asked_storage and not self.full_finetuning else None

    @property
    def quantization(self) -> str:
        """ "own" = by the caller's quantization_config, "none" = not at all, else the storage format's name."""
        if self.own_quantization:
            return "own"
        name = self.weight_format
        return "none" if name is None or formats.named(name).exact else name

    def readable(self) -> Self:
        """These options with values that mean nothing at their defaults, so that the rest can still be checked."""
        defaults = type(self)()
        return dataclasses.replace(self, **{name: getattr(defaults, name) for name in bad_values(self)})

    def problems(self) -> list[str]:
        """Every reason why the call cannot be done that shows without the checkpoint's config, in plain words."""
        return load_problems(self)

    def validate(self) -> None:
        """Raises OptionError with all `problems`, if any."""
        if found := self.problems():
            raise OptionError("from_pretrained", found)


@dataclass(frozen=True)
class AdapterOptions:
    """Every argument of `get_peft_model`. extra: further fields of PEFT's LoraConfig."""

    r: int = 16
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    lora_alpha: int = 16
    lora_dropout: float = 0
    bias: str = "none"
    use_gradient_checkpointing: bool | str = "unsloth"
    random_state: int = 3407
    use_rslora: bool = False
    loftq_config: Mapping[str, Any] | None = None
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: list[int] | int | None = None
    use_dora: bool = False
    init_lora_weights: bool | str = True
    qat_scheme: Any = None
    memory_budget: int | str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_call(cls, *args: Any, extra: Mapping[str, Any] | None = None, **named: Any) -> Self:
        """As the constructor; lists of names become tuples, so that two calls with the same names compare equal."""
        options = _from_call(cls, args, {**named, **(extra or {})})
        lists = {name: getattr(options, name) for name in ("target_modules", "modules_to_save")}
        tuples = {name: tuple(v) for name, v in lists.items() if isinstance(v, Iterable) and not isinstance(v, str)}
        return dataclasses.replace(options, **tuples)

    def problems(self) -> list[str]:
        """Every reason why the call cannot be done that shows without the model, in plain words."""
        return adapter_problems(self)

    def validate(self) -> None:
        """Raises OptionError with all `problems`, if any."""
        if found := self.problems():
            raise OptionError("get_peft_model", found)


O = TypeVar("O", LoadOptions, AdapterOptions)  # noqa: E741


def _from_call(cls: type[O], args: tuple[Any, ...], named: dict[str, Any]) -> O:
    names = [f.name for f in dataclasses.fields(cls) if f.name != "extra"]
    if len(args) > len(names):
        raise OptionError(cls.__name__, [f"{len(args)} positional arguments were given, it takes {len(names)}"])
    fields = {**dict(zip(names, args, strict=False)), **{name: named[name] for name in named if name in names}}
    return cls(**fields, extra={name: value for name, value in named.items() if name not in names})
