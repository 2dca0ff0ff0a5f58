"""Trials of a stock forward on a stand-in: an instance of the same class whose tensors and children are made for it.

A stand-in lives on the CPU and has weights or children of its own. So a trial changes nothing in the model, and does
not depend on where the model's weights are, in which dtype or format, and which adapters are around them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hasten.patching.classes import stock_class

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a forward raises that cannot run on a trial input. The reason in the report names it."""

TORCH_OWN = frozenset(nn.Module().__dict__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Refused(Exception):
    """A module stays stock, for the reason that the message gives."""


class Recorder(nn.Module):
    """A child of a stand-in: notes each call's arguments and returns `answer(*args, **kwargs)`."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = answer
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.answer(*args, **kwargs)


def stand_in(module: nn.Module, tensors: Mapping[str, torch.Tensor], children: Mapping[str, nn.Module]) -> Any:
    """An instance of the module's stock class with the module's Python attributes, and these parameters and children."""
    made: Any = object.__new__(stock_class(module))
    nn.Module.__init__(made)
    made.__dict__.update(python_attributes(module))
    own = module.__dict__
    made._parameters.update({name: None for name, tensor in own["_parameters"].items() if tensor is None})
    for name, tensor in tensors.items():
        made._parameters[name] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    made._modules.update({name: None for name, child in own["_modules"].items() if child is None})
    made._modules.update(children)
    return made


def python_attributes(module: nn.Module) -> dict[str, Any]:
    """The instance's own attributes that are no parameters, buffers or children, and not torch's, PEFT's or accelerate's."""
    own = {name: value for name, value in module.__dict__.items() if name not in TORCH_OWN}
    return {name: value for name, value in own.items() if name != "forward" and not name.startswith("_")}


@contextmanager
def trial() -> Iterator[None]:
    """Runs its block on the CPU in fp32, without autocast and with a random state of its own; what a forward raises there
    becomes Refused."""
    dtype = torch.get_default_dtype()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ):
            torch.set_default_dtype(torch.float32)
            yield
    except FAILURES as error:
        raise Refused(f"its forward raised {type(error).__name__} in a trial: {error}") from error
    finally:
        torch.set_default_dtype(dtype)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers on the CPU, drawn from `seed`, in `dtype`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(dtype)


def same(one: Any, other: Any) -> bool:
    """Whether both are the same object, equal plain values, or views of the same memory with the same shape."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        layout = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (one, other)]
        return one is other or layout[0] == layout[1]
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    plain = (bool, int, float, str, type(None))
    return one is other or (isinstance(one, plain) and type(one) is type(other) and one == other)
