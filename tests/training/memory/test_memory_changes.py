"""The memory policy of a model that changes between steps, or during one; and of shapes that go on changing."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from memory_kit import policy_of
from product_kit import Products
from test_memory_policy import batch, fix_plan, prepared, step
from torch.utils._python_dispatch import TorchDispatchMode
from training_kit import gradients_apart, gradients_of, lora

from hasten.state import causal_lm_of
from hasten.training import checkpointing
from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.costs import ModelShape, peak
from hasten.training.memory.offload import HostMemory, OffloadedLayer
from hasten.training.memory.plan_key import local_processes, round_up_length
from hasten.training.memory.planner import MAX_EXACT_PLANS

pytestmark = pytest.mark.usefixtures("offload_everything")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no streams")


def planned(**changes: Any) -> Any:
    model = prepared("llama", lora(), **changes)
    checkpointing.enable(model, "auto")
    return model


def test_rounded_lengths_are_few_and_near() -> None:
    for length in range(1, 20_000):
        assert length <= round_up_length(length) <= length * (1 + 1 / 16)
        assert length <= 1024 or round_up_length(length) % 64 == 0
    assert len({round_up_length(length) for length in range(2049, 4097)}) == 16
    assert round_up_length(4096) == 4096 and round_up_length(160_000) == 163_840


def test_many_shapes_need_few_plans() -> None:
    model = planned()
    made: list[tuple[int, int]] = []
    plan = policy_of(model).plan(1, 8)
    planner = policy_of(model).planner
    planner.new_plan = lambda rows, length, pinned: made.append((rows, length)) or plan
    for length in range(4097, 8193):
        assert policy_of(model).plan(2, length) is plan
    assert made[: MAX_EXACT_PLANS - 1] == [(2, length) for length in range(4097, 4096 + MAX_EXACT_PLANS)]
    assert len(made) <= MAX_EXACT_PLANS + 16
    planner.cache_size = 40
    for rows in range(3, 100):
        policy_of(model).plan(rows, 64)
    assert len(planner.plans) == 40


def test_a_plan_is_made_anew_for_another_adapter_or_dtype() -> None:
    model = planned()
    step(model, batch())
    model.zero_grad()
    known = len(policy_of(model).planner.plans)
    step(model, batch())
    model.zero_grad()
    assert len(policy_of(model).planner.plans) == known
    model.add_adapter("wider", lora(r=16))
    model.set_adapter("wider")
    model.to(DEVICE)
    step(model, batch())
    model.zero_grad()
    assert len(policy_of(model).planner.plans) == known + 1
    with torch.autocast(DEVICE, torch.bfloat16):
        model(input_ids=batch(), labels=batch())
    assert len(policy_of(model).planner.plans) == known + 2


def test_gradients_of_a_step_before_take_part_in_the_plan() -> None:
    """All weights train; the budget is enough for a first batch that saves all activations and not for a second one."""
    model = prepared("llama", None, num_hidden_layers=4, vocab_size=2000).requires_grad_(True)
    shape = ModelShape.of_model(model)
    first, second = (peak(shape, 1, 128, ActivationAction.SAVE_ALL, accumulates=there).total for there in (False, True))
    checkpointing.enable(model, "auto", (first + second) // 2)
    planner = policy_of(model).planner
    planner.margin, planner.other_bytes = 0.0, 0
    assert set(policy_of(model).plan(1, 128).actions) == {ActivationAction.SAVE_ALL}
    step(model, batch())
    accumulating = policy_of(model).plan(1, 128)
    assert set(accumulating.actions) != {ActivationAction.SAVE_ALL} and accumulating.fits
    model.zero_grad()
    assert set(policy_of(model).plan(1, 128).actions) == {ActivationAction.SAVE_ALL}


def test_layers_on_several_devices_are_recomputed_and_offloaded() -> None:
    model = prepared("llama", lora())
    causal_lm_of(model).model.layers[1].to("meta")
    (note,) = checkpointing.enable(model, "auto")
    assert "layers are on 2" in note
    assert set(policy_of(model).plan(2, 24).actions) == {ActivationAction.OFFLOAD}


class Other(torch.nn.Module):
    """An MLP of the user's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.only = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x)


@pytest.mark.parametrize(
    ("mode", "action"),
    [(True, ActivationAction.RECOMPUTE), ("offload", ActivationAction.OFFLOAD), ("auto", ActivationAction.OFFLOAD)],
)
def test_a_model_of_unknown_shape_trains(mode: Any, action: ActivationAction, caplog: Any) -> None:
    found = []
    for asked in (False, mode):
        model = prepared("llama", None)
        torch.manual_seed(0)
        causal_lm_of(model).model.layers[1].mlp = Other(64).to(DEVICE)
        checkpointing.enable(model, asked)
        with caplog.at_level(logging.WARNING):
            found.append(step(model, batch()))
    latest = policy_of(model).latest
    assert latest is not None and set(latest.actions) == {action} and "GiB" not in str(policy_of(model))
    assert torch.equal(found[0][0], found[1][0]) and gradients_apart(found[1][1], found[0][1]) < 1e-5
    assert ("no memory plan can be made" in caplog.text) == (mode == "auto")


def test_an_out_of_memory_error_of_such_a_model_stays_what_it_is() -> None:
    model = prepared("llama", None)
    causal_lm_of(model).model.layers[1].mlp = Other(64).to(DEVICE)
    checkpointing.enable(model, True)

    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError("short")

    causal_lm_of(model).model.layers[1].self_attn.register_forward_pre_hook(short)
    with pytest.raises(torch.OutOfMemoryError, match="short"):
        model(input_ids=batch(), labels=batch())


def actions() -> Iterator[list[ActivationAction]]:
    yield from ([one] for one in ActivationAction)
    yield [ActivationAction.OFFLOAD, ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST]


@pytest.mark.parametrize("how", list(actions()), ids=str)
def test_switching_while_a_backward_is_to_come(how: list[ActivationAction]) -> None:
    found = {}
    for switch in (False, True):
        model = planned()
        fix_plan(model, how, 16)
        loss = model(input_ids=batch(), labels=batch()).loss
        if switch:
            checkpointing.switch_off(causal_lm_of(model))
        loss.backward()
        found[switch] = gradients_of(model)
    assert gradients_apart(found[True], found[False]) == 0


@pytest.mark.parametrize("how", list(actions()), ids=str)
def test_a_forward_that_fails_leaves_a_model_that_works(how: list[ActivationAction]) -> None:
    model = planned()
    fix_plan(model, how, 16)
    right = step(model, batch())
    model.zero_grad()
    hook = causal_lm_of(model).model.layers[1].mlp.down_proj.register_forward_pre_hook(_refuse)
    tiled = how != [ActivationAction.SAVE_ALL]
    told = pytest.warns(UserWarning, match="does not run in tiles") if tiled else contextlib.nullcontext()
    with pytest.raises(RuntimeError, match="refused"), told:
        model(input_ids=batch(), labels=batch())
    hook.remove()
    mlps = [layer.mlp for layer in policy_of(model).layers]
    assert all(mlp.overlay_config.tile_rows is None for mlp in mlps)
    loss, gradients = step(model, batch())
    assert torch.equal(loss, right[0]) and gradients_apart(gradients, right[1]) <= (0 if DEVICE == "cpu" else 1e-5)


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("refused")


def test_weights_are_not_offloaded() -> None:
    """With as many tokens as the model is wide, a weight has the shape of a saved activation."""
    model = planned()
    fix_plan(model, [ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST])
    width = causal_lm_of(model).config.hidden_size
    ids = batch(1, width)
    with Copies() as copies:
        model(input_ids=ids, labels=ids).loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert copies.sources and not weights & copies.sources


class Copies(TorchDispatchMode):
    """Addresses of the storages whose bytes are copied, as offloading does."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].dtype == torch.uint8:
            self.sources.add(args[1].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def test_views_of_one_storage_are_copied_once_and_come_back_as_they_were() -> None:
    """q, k and v of one product."""
    made = torch.randn(24, 80, device=DEVICE)
    views = made[:, :40], made[:, 60:], made
    by_heads = made[:, 40:60].view(24, 2, 10).transpose(0, 1)
    memory = HostMemory(made.device)
    layer = OffloadedLayer(memory, (24, 1), frozenset())
    handles = [layer._pack(view) for view in views]
    assert layer._pack(by_heads) is by_heads, "its first dimension is not the tokens"
    chunk = memory.sizes.chunk
    assert memory.allocated - len(memory.free) * chunk == 2 * chunk, "7680 bytes, once"
    layer.release()
    for handle, view in zip(handles, views, strict=True):
        back = layer._unpack(handle)
        assert torch.equal(back, view) and back.stride() == view.stride() and back.data_ptr() != view.data_ptr()


@pytest.mark.skipif(
    DEVICE == "cuda", reason="the fused op has its own tiles there: tests/families/test_tiled_kernels.py"
)
def test_tiles_are_those_of_the_plan_whenever_a_layer_runs() -> None:
    """Seen by the rows of the gate's products: a hook on an MLP would make it run as a whole."""
    model = planned(num_hidden_layers=5)
    fix_plan(model, list(ActivationAction), 16)
    gates = [one.mlp.gate_proj.weight for one in policy_of(model).layers]
    with Products() as products:
        step(model, batch())
    rows = batch().numel()
    tiles = [min(16, rows - start) for start in range(0, rows, 16)]
    again = {ActivationAction.RECOMPUTE, ActivationAction.OFFLOAD}
    for index, action in enumerate(ActivationAction):
        expected = [rows] if action is ActivationAction.SAVE_ALL else 2 * tiles  # each backward recomputes its tile
        if action in again:
            expected += tiles[:-1]  # the layer's recomputation ends where the last tile's input is saved
        gate = gates[index]
        seen = [one.rows for one in products.seen if (one.right, one.columns) == (gate.data_ptr(), len(gate))]
        assert sorted(seen) == sorted(expected), action


def test_a_failed_allocation_of_cpu_memory_loses_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(torch.device("cpu"))
    chunk = memory.sizes.chunk
    memory.free += memory.take(2 * chunk)
    monkeypatch.setattr(torch, "empty", _refuse)
    with pytest.raises(RuntimeError, match="refused"):
        memory.take(3 * chunk)
    assert len(memory.free) * chunk == memory.allocated == 2 * chunk


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_processes() == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_processes() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert local_processes() == 8


# Streams

CYCLES = 200_000_000
"""Some tenth of a second."""


def offloaded(tensor: torch.Tensor) -> tuple[HostMemory, OffloadedLayer]:
    memory = HostMemory(tensor.device)
    return memory, OffloadedLayer(memory, (tensor.shape[0], 1), frozenset())


@on_gpu
def test_the_last_layer_s_memory_waits_for_its_copy_out() -> None:
    """Its tensors come back before they have left, are used and freed; a second backward needs what was sent."""
    tensor = torch.full((256, 64), 3.0, device=DEVICE)
    memory, layer = offloaded(tensor)
    assert memory.to_host is not None
    with torch.cuda.stream(memory.to_host):
        torch.cuda._sleep(CYCLES)
    handle = layer._pack(tensor)
    del tensor
    layer._unpack(handle)
    other = torch.full((256, 64), 7.0, device=DEVICE)
    torch.cuda.synchronize()
    assert bool((layer._unpack(handle) == 3).all()) and bool((other == 7).all())


@on_gpu
@pytest.mark.parametrize("returns", [False, True])
def test_a_layer_that_dies_in_another_stream_does_not_free_what_a_copy_uses(returns: bool) -> None:
    tensor = torch.full((256, 64), 3.0, device=DEVICE)
    memory, layer = offloaded(tensor)
    assert memory.to_host is not None and memory.to_device is not None
    side = memory.to_device if returns else memory.to_host
    if not returns:
        with torch.cuda.stream(side):
            torch.cuda._sleep(CYCLES)
    handle = layer._pack(tensor)
    chunks = next(iter(layer.storages.values())).chunks
    del tensor
    if returns:
        layer.release()
        with torch.cuda.stream(side):
            torch.cuda._sleep(CYCLES)
        layer.fetch()
    with torch.cuda.stream(side):  # where a garbage collection may find itself
        del handle, layer
    other = torch.full((256, 64), 7.0, device=DEVICE)
    torch.cuda.synchronize()
    assert bool((other == 7).all())
    found = torch.cat([chunk.bytes for chunk in chunks])[: other.nbytes].view(torch.float32)
    assert bool((found == 3).all())
