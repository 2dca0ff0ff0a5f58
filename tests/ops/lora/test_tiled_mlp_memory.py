"""The tiled MLP's peak memory grows with the tile, and not with the number of tokens."""

import weakref
from typing import Any

import pytest
import torch
from lora_kit import DEVICE, everything, linear, trained
from ops_kit import NORM
from test_tiled_mlp import leaf
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.ops import NormInput
from hasten.ops.lora import DenseWeight, LoraLinear, lora_mlp
from hasten.ops.lora.kernels import mlp as kernel


class Peak(TorchDispatchMode):
    """Tracks the peak of live bytes, over storages allocated while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self.alive:
                self._count(storage)
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        self.alive[key] = (weakref.ref(storage, lambda _: self._gone(key)), size)

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)[1]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def peaks(rows: int, tile: int | None, kind: str, inner: int) -> tuple[int, int]:
    """(forward, backward): peak bytes, without input, parameters and the gradient of the output."""
    mlp = tuple(linear(*shape, True, False, torch.float32) for shape in ((inner, 8), (inner, 8), (8, inner)))
    if kind == "trained":
        mlp = tuple(trained(*shape, False) for shape in ((inner, 8), (inner, 8), (8, inner)))
    x = torch.randn(rows, 8, requires_grad=True)
    with Peak() as forward:
        out = lora_mlp(x, mlp, "silu", x, NormInput(x.detach(), torch.ones(8), NORM), tile, "triton")  # pyright: ignore[reportArgumentType]
    upstream = torch.randn_like(out)
    with Peak() as backward:
        torch.autograd.grad(out, [x, *everything(mlp)], upstream)
    return forward.most, backward.most


def glu_bwd_by_rows(d: Any, gate: Any, up: Any, activation: str, into: Any, out: Any = None) -> None:
    """The launcher of the GLU backward in torch, without buffers: the interpreter keeps references to its arguments."""
    for row in range(len(d)):
        cut = torch.sigmoid(gate[row])
        act, slope, upstream = gate[row] * cut, cut * (1 + gate[row] * (1 - cut)), d[row].clone()
        if out is not None:
            out[row] = act * up[row]
        into[0][row], into[1][row] = upstream * up[row] * slope, upstream * act


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the CPU allocates")
@pytest.mark.parametrize("kind", ["lora", "trained"])
def test_peak_memory_grows_with_the_tile_and_not_with_the_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton's interpreter would keep every buffer alive; nothing but these two kernels runs in it here.
    monkeypatch.setattr(kernel, "glu_fwd", lambda gate, up, activation: F.silu(gate).mul_(up))
    monkeypatch.setattr(kernel, "glu_bwd", glu_bwd_by_rows)
    inner = 1024
    few, many, wide = peaks(64, 16, kind, inner), peaks(192, 16, kind, inner), peaks(192, 48, kind, inner)
    whole = [peaks(rows, None, kind, inner) for rows in (64, 192)]
    for direction in range(2):
        per_token = (many[direction] - few[direction]) / 128 / 4
        assert per_token <= 1.5 * 8, "more than one buffer of the hidden size: the output or the gradient of the input"
        assert (whole[1][direction] - whole[0][direction]) / 128 / 4 >= inner, (
            "without tiles the peak does not grow: it is not measured"
        )
        per_tile_token = (wide[direction] - many[direction]) / 32 / 4
        assert 2 * inner < per_tile_token <= 3.1 * inner, "more than gate, up and one more"


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("kind", ["lora", "trained"])
def test_gpu_memory_grows_by_the_residual_stream_alone(kind: str) -> None:
    width, inner, dtype = 512, 8192, torch.bfloat16
    shapes = ((inner, width), (inner, width), (width, inner))
    mlp: Any = tuple(linear(*shape, True, False, dtype, 16) for shape in shapes)
    if kind == "trained":
        mlp = tuple(
            LoraLinear(DenseWeight(leaf(linear(*shape, False, False, dtype).weight.stored, dtype))) for shape in shapes
        )
    found = {}
    for rows in (8192, 32768):
        x = torch.randn(rows, width, device=DEVICE, dtype=dtype, requires_grad=True)
        source = NormInput(x.detach(), torch.ones(width, device=DEVICE, dtype=dtype), NORM)
        for _ in range(2):  # the first call allocates cuBLAS's workspace
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            lora_mlp(x, mlp, "silu", x, source, 2048).sum().backward()
            found[rows] = torch.cuda.max_memory_allocated() - before
            x.grad = None
    per_token = (found[32768] - found[8192]) / 24576 / dtype.itemsize
    assert per_token <= 6 * width < 2 * inner
