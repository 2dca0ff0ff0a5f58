"""Shared by the tests of the ops: a norm's config, NF4 weights, the accuracy rule, and NaN-poisoned allocations."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from device_kit import DEVICE

from hasten.ops import NormConfig
from hasten.ops.nf4 import NF4Weight
from hasten.testing import relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORM = NormConfig(1e-5)
"""As Llama's."""
both = pytest.mark.parametrize("backend", ["reference", "triton"])


def assert_as_good_as_torch(
    ours: Callable[..., torch.Tensor],
    formula: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """err(ours, fp64) <= 2 x err(the formula at `dtype`, fp64) + a rounding, for the output and each gradient."""
    exact = [x.detach().to(DEVICE, dtype).double().requires_grad_() for x in inputs]
    low = [x.detach().to(DEVICE, dtype).requires_grad_() for x in inputs]
    mine = [x.detach().to(DEVICE, dtype).requires_grad_() for x in inputs]
    results = []
    upstream = None
    for function, values in ((formula, exact), (formula, low), (ours, mine)):
        out = function(*values)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)) if upstream is None else upstream
        results.append([out, *torch.autograd.grad(out, values, upstream.to(out.device, out.dtype))])
    for index, (reference, torchs, hastens) in enumerate(zip(*results, strict=True)):
        assert hastens.shape == reference.shape
        limit = 2 * relative_error(torchs, reference) + 2 * torch.finfo(dtype).eps
        assert relative_error(hastens, reference) <= limit, f"result {index} at {dtype}"


def quantized(shape: tuple[int, int], double: bool, block: int = 64) -> tuple[NF4Weight, torch.Tensor]:
    """A random NF4 matrix and its dense values. double: with doubly quantised scales."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    packed, state = bnb.quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type="nf4")
    nested = (
        {"scale_code": state.state2.code, "scale_of_scales": state.state2.absmax, "offset": state.offset}
        if double
        else {}
    )
    ours = NF4Weight(packed, state.code, shape, state.absmax, block=block, **nested)
    return ours, bnb.dequantize_4bit(packed, state)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills newly allocated memory with NaN (integers: the largest value), so that elements a kernel does not write show up."""
    kept = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = kept
