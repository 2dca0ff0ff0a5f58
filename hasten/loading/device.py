"""Chooses device and dtype of the weights for this machine."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from hasten.options import PLACEMENTS


def default_dtype(fp16_safe: bool, half: bool = False) -> torch.dtype:
    """Returns bf16 if the device supports it, else fp16; fp32 on a CPU without bf16 instructions, or if fp16 would
    overflow.

    half: the caller asked for 16 bits, so a CPU uses bf16 even where that is slow.
    """
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if fp16_safe else torch.float32
    return torch.bfloat16 if half or cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Returns whether the CPU has bf16 matmul instructions: AVX512-BF16 or AMX on x86, BF16 on ARM."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def resolve_device_map(device_map: Any) -> tuple[Any, list[str]]:
    """Returns (what transformers gets, notes). Without CUDA everything is on the CPU.

    Under torchrun every process takes the GPU of its local rank, since each has a whole model.
    """
    if not isinstance(device_map, str) or device_map not in PLACEMENTS:
        return (dict(device_map), []) if isinstance(device_map, Mapping) else ({"": torch.device(device_map)}, [])
    if not torch.cuda.is_available():
        return {"": torch.device("cpu")}, []
    # These variables are the only way in which torchrun passes ranks to its processes.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return {"": device}, [f"device: {device}, the GPU of this process's local rank"]
    return device_map, []


def is_all_cpu(device_map: Any) -> bool:
    """Returns whether a resolved device map uses the CPU alone."""
    return isinstance(device_map, Mapping) and all(str(device) in ("cpu", "disk") for device in device_map.values())
