"""The choice of backend, and the context in which CPU tensors take the kernels."""

import threading
from typing import Any

import pytest
import torch
from device_kit import DEVICE

from hasten.ops.backend import ATTENTION, backend_for, interpreted_kernels

CPU = torch.ones(2)


def test_without_it_a_cpu_tensor_takes_the_reference_and_a_name_wins() -> None:
    assert backend_for(CPU) == backend_for(CPU, op=ATTENTION) == "reference"
    assert backend_for(CPU, "triton") == "triton"
    with interpreted_kernels():
        assert backend_for(CPU, "reference") == "reference"


def test_fp64_takes_the_reference() -> None:
    """The kernels accumulate in fp32, and those of attention refuse it: `model.double()` must run in fp64 on a GPU too."""
    wide = torch.ones(2, dtype=torch.float64, device=DEVICE)
    with interpreted_kernels():
        assert backend_for(wide) == backend_for(wide, op=ATTENTION) == "reference"
        assert backend_for(wide, "triton") == backend_for(wide.float()) == "triton"


def test_every_op_or_one_and_only_inside() -> None:
    with interpreted_kernels(ATTENTION):
        assert (backend_for(CPU), backend_for(CPU, op=ATTENTION)) == ("reference", "triton")
        with interpreted_kernels():
            assert (backend_for(CPU), backend_for(CPU, op=ATTENTION)) == ("triton", "triton")
        assert (backend_for(CPU), backend_for(CPU, op=ATTENTION)) == ("reference", "triton")
    with pytest.raises(KeyError), interpreted_kernels():
        raise KeyError
    assert backend_for(CPU) == backend_for(CPU, op=ATTENTION) == "reference"


def test_other_threads_are_left_alone() -> None:
    found: list[Any] = []
    with interpreted_kernels():
        thread = threading.Thread(target=lambda: found.append(backend_for(CPU)))
        thread.start()
        thread.join()
    assert found == ["reference"]


def test_a_compiled_graph_is_not_broken() -> None:
    """Dynamo refuses ContextVar.get in a whole graph."""
    compiled = torch.compile(lambda x: x * 2 if backend_for(x) == "reference" else x, backend="eager", fullgraph=True)
    assert torch.equal(compiled(CPU), CPU * 2)
