"""Builds the classes of patched modules from transformers' own (stock), hasten's overlay, and classes that other
libraries put over them.

FSDP2's `fully_shard` and `torch.nn.utils.parametrize` set `module.__class__` to a subclass made at run time, as hasten
does. In either order their classes stay outermost: an overlay is put directly over the stock class, and their classes
are rebuilt over it (`type(theirs)(name, bases, namespace)`), so their own removal (`__bases__`, MRO positions) keeps
working.
"""

import functools
import sys
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from hasten.errors import PatchError
from hasten.overlays import Overlay
from hasten.patching import stock_signature
from hasten.weights import register_pickling


def overlay_class(stock: type, overlay: type[Overlay], overlay_config: Any, methods: type | None = None) -> type:
    """Returns the subclass that carries `overlay_config`, with the stock class's name and module, which config.json
    stores.

    methods: a mixin with user-facing methods. Instances pickle by (stock, overlay, overlay_config, methods), and their
    forward has the stock signature. Equal arguments give the same class.
    """
    return _made_class(stock, overlay, overlay_config, methods)


@functools.cache
def _made_class(stock: type, overlay: type[Overlay], overlay_config: Any, methods: type | None) -> type:
    bases = (methods, overlay, stock) if methods is not None else (overlay, stock)
    names = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__reduce_ex__": _reduce,
        "overlay_config": overlay_config,
        "stock_class": stock,
        **overlay.members_over(stock),
    }
    if overlay.moved_config is not Overlay.moved_config:
        names["_apply"] = _apply
    if overlay.forward is not Overlay.forward:
        forward = stock_signature.adapt(overlay.forward, stock)
        arguments = stock_signature.positional(stock.forward)[1:]
        names |= {"forward": forward, "overlay_forward": forward, "stock_arguments": arguments}
    return type(stock.__name__, bases, names)


def _reduce(self: Any, protocol: Any) -> Any:
    """Implements `__reduce_ex__`: unpickling looks the class up by (stock, overlay, config, methods). An object under
    another library's class pickles as that library's objects do."""
    ours = installed_overlay(type(self))
    assert ours is not None
    register_pickling(self)
    reduced = super(ours, self).__reduce_ex__(protocol)
    if type(self) is not ours:
        return reduced
    return _new, (ours.stock_class, overlay_of(ours), ours.overlay_config, methods_of(self)), *reduced[2:]


def _new(stock: type, overlay: type[Overlay], overlay_config: Any, methods: type | None) -> Any:
    return object.__new__(overlay_class(stock, overlay, overlay_config, methods))


def _apply(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """Implements `_apply` (`to`, `half`, ...) for an overlay whose config follows the model's dtype."""
    super(installed_overlay(type(self)), self)._apply(fn, recurse)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    config = self.moved_config(fn)
    if config != self.overlay_config:
        set_class(self, configured(self, config))
    return self


def set_class(module: nn.Module, target: type) -> None:
    """Sets `module.__class__`, and the forward that accelerate's hooks stored with it."""
    hooked = hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__
    module.__class__ = target
    if hooked:  # accelerate calls the forward that it stored; that must be the new class's
        module.__dict__["_old_forward"] = target.forward.__get__(module)


def configured(module: Overlay, overlay_config: Any) -> type:
    """Returns the class for `module` with another `overlay_config`."""
    ours = installed_overlay(type(module))
    assert ours is not None
    made = overlay_class(ours.stock_class, overlay_of(ours), overlay_config, methods_of(module))
    return with_base(module, made)


def overlay_of(ours: type[Overlay]) -> type[Overlay]:
    """Returns the overlay that an `overlay_class` was made from."""
    return ours.__bases__[-2]


def installed_overlay(kind: type) -> type[Overlay] | None:
    """Returns the `overlay_class` that `kind` is or inherits from (other libraries may subclass it); None without an
    overlay."""
    return next((cls for cls in kind.__mro__ if issubclass(cls, Overlay) and "stock_class" in cls.__dict__), None)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """Returns the module's transformers class, without overlays and without classes that other libraries made at run
    time."""
    ours = installed_overlay(type(module))
    return ours.stock_class if ours is not None else _under_runtime_classes(type(module))


def methods_of(module: nn.Module) -> type | None:
    """Returns the mixin that the module's overlay was made with."""
    ours = installed_overlay(type(module))
    return ours.__bases__[0] if ours is not None and len(ours.__bases__) == 3 else None


def with_base(module: nn.Module, base: type) -> type:
    """Returns the class for `module` with `base` (an `overlay_class` or the stock class) in place of its present one.

    Classes that other libraries put over it are rebuilt. Raises PatchError, with the name of the class, if one cannot
    be.
    """
    kind = type(module)
    old = installed_overlay(kind) or stock_class(module)
    return kind if old is base else _rebuilt(kind, old, base)


def _under_runtime_classes(kind: type[nn.Module]) -> type[nn.Module]:
    found = kind
    while _is_runtime_class(found):
        bases = [base for base in found.__bases__ if issubclass(base, nn.Module)]
        if not bases or bases[-1] is nn.Module:
            return kind  # a model class of its own, defined inside a function
        found = bases[-1]
    return found


def _is_runtime_class(kind: type) -> bool:
    """Returns whether the class cannot be found under its own name: made by `type(...)` or inside a function."""
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is not kind


def _rebuilt(kind: type, old: type, new: type) -> type:
    """Rebuilds `kind`, a subclass of `old`, with `new` as its base instead."""
    if kind is old:
        return new
    bases = tuple(_rebuilt(base, old, new) if issubclass(base, old) else base for base in kind.__bases__)
    made_cell = CellType()
    try:
        namespace = {name: _for_class(value, kind, made_cell) for name, value in _own_names(kind).items()}
        made = type(kind)(kind.__name__, bases, namespace)
    except Exception as error:
        raise PatchError(
            f"{kind.__module__}.{kind.__qualname__}, a class that was put over {old.__name__}, cannot be rebuilt over "
            f"another base ({type(error).__name__}: {error}). Take it off first, and put it on again afterwards"
        ) from error
    made_cell.cell_contents = made
    return made


def _own_names(kind: type) -> dict[str, Any]:
    """Returns what the class body defined: without slots, and without wrappers of inherited functions, which
    `__init_subclass__` makes anew (transformers' GradientCheckpointingLayer wraps `forward` so)."""
    slots = kind.__dict__.get("__slots__", ())
    skipped = {"__dict__", "__weakref__", *((slots,) if isinstance(slots, str) else slots)}
    inherited = super(kind, kind)
    return {
        name: value
        for name, value in kind.__dict__.items()
        if name not in skipped
        and not (hasattr(value, "__wrapped__") and value.__wrapped__ is getattr(inherited, name, None))
    }


def _for_class(value: Any, old: type, made: CellType) -> Any:
    """Returns a class attribute whose functions find the new class where they found `old` in a closure (as `super()`
    does)."""
    if isinstance(value, FunctionType):
        return _function_for_class(value, old, made)
    if isinstance(value, (classmethod, staticmethod)):
        return type(value)(_for_class(value.__func__, old, made))
    if isinstance(value, property):
        get, set_, delete = (_for_class(function, old, made) for function in (value.fget, value.fset, value.fdel))
        return property(get, set_, delete, value.__doc__)
    return value


def _function_for_class(function: FunctionType, old: type, made: CellType) -> FunctionType:
    cells = []
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # an empty cell
            content = None
        inner = (
            _for_class(content, old, made) if isinstance(content, FunctionType) and content is not function else content
        )
        cells.append(made if content is old else cell if inner is content else CellType(inner))
    if all(new is cell for new, cell in zip(cells, function.__closure__ or (), strict=True)):
        return function
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
    copy.__kwdefaults__, copy.__doc__ = function.__kwdefaults__, function.__doc__
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    copy.__annotations__ = function.__annotations__
    copy.__dict__.update({name: _for_class(value, old, made) for name, value in function.__dict__.items()})
    return copy
