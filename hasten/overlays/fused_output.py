"""The output of a training forward whose logits were never computed: every way of reading them raises with the reason.

Everything else works as on transformers' output. The logits are no key, no dataclass field and no attribute, so
traversals (accelerate, FSDP, DDP, pytree) find the tensors that exist. `to_tuple()` keeps their place: what follows
them must not move into it.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NoReturn

import torch.utils._pytree as pytree
from transformers.modeling_outputs import CausalLMOutputWithPast

from hasten.errors import LogitsNotComputedError
from hasten.overlays.cache_name import with_cache_name

logger = logging.getLogger(__name__)

LOGITS = "logits"


def refuse_logits(*_: Any, **__: Any) -> NoReturn:
    """Raises the error of everything that reads the logits."""
    raise LogitsNotComputedError(
        "outputs.logits was read after a fused loss, which never computes them. Call model.eval() first, or "
        "call the model without labels, or with logits_to_keep, to get real logits."
    )


@functools.cache
def _log_lookup() -> None:
    """Logs once, since `hasattr` and `getattr` with a default swallow the error."""
    logger.warning(
        "outputs.logits was looked up after a fused loss, which never computes them: hasattr gives False, and getattr "
        "its default. Call model.eval() first, or call the model without labels, or with logits_to_keep."
    )


class MissingLogits:
    """Holds the place of the logits in a tuple. Whatever is done with it raises, except for identity, type and repr."""

    def __repr__(self) -> str:
        return "<not computed by the fused loss>"

    def __reduce__(self) -> str:
        return "MISSING_LOGITS"

    def __hash__(self) -> int:
        return id(self)

    __getattr__: Callable[..., NoReturn] = refuse_logits
    __torch_function__ = classmethod(refuse_logits)
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = refuse_logits
    __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __float__ = __int__ = __index__ = refuse_logits
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = refuse_logits
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = __abs__ = __array__ = refuse_logits


MISSING_LOGITS = MissingLogits()


class FusedLossTuple(tuple):
    """The tuple of a training output, with `MISSING_LOGITS` in the place of the logits. Iteration and slices work;
    reading that place raises LogitsNotComputedError."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if found is MISSING_LOGITS:
            refuse_logits()
        return FusedLossTuple(found) if isinstance(index, slice) else found


def _flatten(values: FusedLossTuple) -> tuple[list[Any], list[bool]]:
    """Returns what a pytree traversal sees: the values that exist, and which places they have."""
    exists = [value is not MISSING_LOGITS for value in values]
    return [value for value, there in zip(values, exists, strict=True) if there], exists


def _unflatten(values: Iterable[Any], exists: list[bool]) -> FusedLossTuple:
    left: Iterator[Any] = iter(values)
    return FusedLossTuple(next(left) if there else MISSING_LOGITS for there in exists)


pytree.register_pytree_node(
    FusedLossTuple, _flatten, _unflatten, serialized_type_name=f"{__name__}.{FusedLossTuple.__name__}"
)


class FusedLossOutput(CausalLMOutputWithPast):
    """The output of a fused training loss. Takes the arguments of `CausalLMOutputWithPast` except the logits.

    Reading `logits` as attribute, key, index, or with `get` raises LogitsNotComputedError. Assigning logits makes it a
    plain `CausalLMOutputWithPast`.
    """

    __dataclass_fields__ = {k: v for k, v in CausalLMOutputWithPast.__dataclass_fields__.items() if k != LOGITS}
    __match_args__: ClassVar[tuple[str, ...]] = tuple(__dataclass_fields__)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = with_cache_name(kwargs, "FusedLossOutput")
        names = tuple(self.__dataclass_fields__)
        given = {**dict(zip(names, args, strict=False)), **given}
        if len(args) + len(kwargs) > len(given) or len(args) > len(names) or not given.keys() <= set(names):
            raise TypeError(
                f"FusedLossOutput takes {', '.join(names)}; found {len(args)} values and {', '.join(kwargs)}"
            )
        for name in names:
            setattr(self, name, given.get(name))
        self.__post_init__()

    @property
    def logits(self) -> Any:
        _log_lookup()
        return refuse_logits()

    @logits.setter
    def logits(self, value: Any) -> None:
        if value is None:
            return
        others = {name: self.__dict__[name] for name in self.__dataclass_fields__}
        self.clear()
        self.__class__ = CausalLMOutputWithPast  # pyright: ignore[reportAttributeAccessIssue]
        self.__init__(**{**others, LOGITS: value})

    def __getitem__(self, k: Any) -> Any:
        return refuse_logits() if k == LOGITS else super().__getitem__(k)

    def get(self, key: Any, default: Any = None) -> Any:
        """Does what a dictionary's `get` does, except that the logits raise: a default would pass for them."""
        return refuse_logits() if key == LOGITS else super().get(key, default)

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns all values that are not None, with a placeholder after the loss, where the logits would be."""
        names = [*self.keys()]
        names.insert(names.index("loss") + 1 if "loss" in names else 0, LOGITS)
        return FusedLossTuple(MISSING_LOGITS if name == LOGITS else self[name] for name in names)

    def __repr__(self) -> str:
        shown = [f"{name}={self.__dict__[name]!r}" for name in self.__dataclass_fields__]
        shown.insert(1, f"{LOGITS}={MISSING_LOGITS!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not FusedLossOutput:
            return NotImplemented
        mine, theirs = (tuple(one.__dict__[name] for name in self.__dataclass_fields__) for one in (self, other))
        return mine == theirs

    def __reduce__(self) -> Any:
        return _output_of, (dict(self.items()), dict(self.__dict__))


def _output_of(items: dict[str, Any], attributes: dict[str, Any]) -> FusedLossOutput:
    output = FusedLossOutput()
    vars(output).update(attributes)
    for name, value in items.items():
        output[name] = value
    return output
