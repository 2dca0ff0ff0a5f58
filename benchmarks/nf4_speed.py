"""NF4 dequantise: every candidate launch against a copy of as many bytes and bitsandbytes' own. Under 20 seconds on an H200.

    python -m benchmarks.nf4_speed
Each result is first compared with bitsandbytes'. Times are medians in microseconds with the L2 cache flushed before each call;
the copy moves as many bytes as a dequantisation reads and writes, and has the same launch overhead.
"""

from typing import Any

import torch
from triton.errors import TritonError

from benchmarks.harness.timing import draw, milliseconds
from hasten.ops.nf4 import NF4Weight, kernel

SHAPES = [(14336, 4096), (4096, 14336), (1024, 4096), (4096, 4096), (8192, 8192), (16384, 2048)]


def _microseconds(function: Any) -> float:
    return milliseconds(function, 5, 30) * 1e3


def quantized(shape: tuple[int, int]) -> tuple[NF4Weight, Any]:
    """(weight, bitsandbytes' own dequantisation of it)."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(draw(*shape), blocksize=64, compress_statistics=True, quant_type="nf4")
    assert state is not None and state.state2 is not None and state.code is not None
    outer = state.state2
    weight = NF4Weight(packed, state.code, shape, state.absmax, outer.code, outer.absmax, state.offset)
    return weight, lambda: bnb.dequantize_4bit(packed, state)


def measure(shape: tuple[int, int], gap: int, launches: dict[str, kernel.Launch]) -> dict[str, float]:
    """Name -> microseconds. gap: elements between the rows of the target, 0 = contiguous."""
    weight, theirs = quantized(shape)
    out = torch.empty(shape[0], shape[1] + gap, device="cuda", dtype=torch.bfloat16)[:, : shape[1]]
    source = torch.empty((out.numel() * 2 + out.numel() // 2) // 2, device="cuda", dtype=torch.uint8)
    target, expected = torch.empty_like(source), theirs()
    times = {"copy": _microseconds(lambda: target.copy_(source)), "bitsandbytes": _microseconds(theirs)}
    for name, launch in list(launches.items()):
        try:
            kernel.dequantize_nf4(weight, torch.bfloat16, out, launch)
        except (TritonError, RuntimeError) as error:
            print(f"{name}: does not compile: {str(error).strip().splitlines()[-1]}")
            del launches[name]
            continue
        torch.testing.assert_close(out, expected, rtol=8e-3, atol=1e-6)
        times[name] = _microseconds(lambda: kernel.dequantize_nf4(weight, torch.bfloat16, out, launch))  # noqa: B023
    return times


def main() -> None:
    launches = {f"{launch.words}x{launch.warps}": launch for launch in kernel.LAUNCHES}
    for index, (shape, gap) in enumerate([*((shape, 0) for shape in SHAPES), ((4096, 4096), 64)]):
        times = measure(shape, gap, launches)
        if index == 0:
            print("us (fraction of copy)".ljust(22), *(name.rjust(15) for name in times))
        name = f"{shape[0]} x {shape[1]}{' + ' + str(gap) if gap else ''}"
        print(name.ljust(22), *(f"{t:8.1f} ({times['copy'] / t:4.2f})".rjust(15) for t in times.values()), flush=True)


if __name__ == "__main__":
    main()
