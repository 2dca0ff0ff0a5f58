"""The memory policy changes what is kept and where, never a loss or a gradient."""

import copy
import gc
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from memory_kit import policy_of
from training_kit import FAMILIES, curve, gradients_apart, gradients_of, lora, rows, sft, small

from hasten.errors import OptionError
from hasten.overlays.layer import LayerCheckpoint
from hasten.state import causal_lm_of
from hasten.training import checkpointing, tiling
from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.costs import Peak
from hasten.training.memory.plan import LayerPlan
from hasten.training.memory.policy import MemoryPolicy

TILE = 16
KINDS = {"LoRA": (lora(), False), "QLoRA": (lora(), True), "full": (None, False)}
NOWHERE = Peak("never", 0, 0, 0, 0, 0)
pytestmark = pytest.mark.usefixtures("offload_everything")


def fix_plan(model: Any, actions: list[ActivationAction], tile: int | None = None) -> None:
    """Gives the layers these actions, whatever would fit."""
    planner = policy_of(model).planner
    plan = LayerPlan(tuple(actions[i % len(actions)] for i in range(len(planner.layers))), tile, NOWHERE)
    planner.new_plan = lambda batch, length, pinned: plan


def prepared(family: str, adapter: Any, nf4: bool = False, **changes: Any) -> Any:
    return small(family, True, adapter, nf4, **changes).to(DEVICE)


def batch(rows: int = 2, length: int = 24, seed: int = 5) -> torch.Tensor:
    return torch.randint(6, 90, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def step(model: Any, ids: torch.Tensor, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(11)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), gradients_of(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_gives_the_same_loss_and_gradients(kind: str, family: str) -> None:
    found = {}
    for mode in (False, True, "offload", "auto"):
        model = prepared(family, *KINDS[kind])
        checkpointing.enable(model, mode)
        found[mode] = step(model, batch())
    loss, gradients = found[False]
    for mode in (True, "offload", "auto"):
        assert torch.equal(found[mode][0], loss)
        assert gradients_apart(found[mode][1], gradients) <= (0 if DEVICE == "cpu" else 1e-5)


@pytest.mark.grid(1)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_action_gives_the_same_too(family: str, autocast: bool) -> None:
    reference = step(prepared(family, lora(), num_hidden_layers=4), batch(), autocast)
    for actions in [[one] for one in ActivationAction] + [
        [ActivationAction.OFFLOAD, ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST],
        list(ActivationAction),
    ]:
        for tile in (None, TILE):
            model = prepared(family, lora(), num_hidden_layers=4)
            checkpointing.enable(model, "auto")
            fix_plan(model, actions, tile)
            for _ in range(2):  # the second step runs over host memory that was used before
                model.zero_grad()
                loss, gradients = step(model, batch(), autocast)
            assert abs(float(loss - reference[0])) <= (2e-2 if autocast else 1e-5)
            assert gradients_apart(gradients, reference[1]) < (5e-2 if autocast else 1e-5), (actions, tile)


@pytest.mark.parametrize("action", [ActivationAction.RECOMPUTE, ActivationAction.OFFLOAD])
def test_dropout_is_the_same_when_a_layer_runs_again(action: ActivationAction) -> None:
    reference = step(prepared("llama", lora(lora_dropout=0.3)), batch())
    model = prepared("llama", lora(lora_dropout=0.3))
    checkpointing.enable(model, "auto")
    fix_plan(model, [action])
    loss, gradients = step(model, batch())
    assert torch.equal(loss, reference[0]) and gradients_apart(gradients, reference[1]) == 0


def test_dropout_keeps_a_plan_from_tiles() -> None:
    model = prepared("llama", lora(lora_dropout=0.3))
    checkpointing.enable(model, "auto", 1)  # nothing fits
    plan = policy_of(model).plan(2, 24)
    assert plan.tile is None and not plan.fits
    assert not {ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST, ActivationAction.RECOMPUTE_MLP} & set(plan.actions)


def test_several_forwards_before_one_backward() -> None:
    """Preference losses run the model twice; gradient accumulation leaves nothing behind."""
    losses = {}
    for mode in (False, "offload"):
        model = prepared("llama", lora())
        checkpointing.enable(model, mode)
        first, second = (model(input_ids=ids, labels=ids).loss for ids in (batch(seed=1), batch(1, 40, seed=2)))
        (first - 0.5 * second).backward()
        losses[mode] = gradients_of(model)
    assert gradients_apart(losses["offload"], losses[False]) < 1e-6


def test_a_second_backward_over_one_forward() -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, "auto")
    fix_plan(model, [ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST], TILE)
    if DEVICE == "cpu":  # on a GPU the MLP refuses one, since it writes over what it kept
        loss = model(input_ids=batch(), labels=batch()).loss
        loss.backward(retain_graph=True)
        once = gradients_of(model)
        once = {name: gradient.clone() for name, gradient in once.items()}
        loss.backward()
        assert gradients_apart(gradients_of(model), {name: 2 * one for name, one in once.items()}) < 1e-6


def test_memory_goes_round_and_does_not_grow() -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, "auto")
    fix_plan(model, [ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST, ActivationAction.OFFLOAD], TILE)
    taken, allocated = [], []
    for count in range(500):
        step(model, batch(1, 8 + count % 17))
        model.zero_grad()
        if count % 100 == 99:
            gc.collect()
            (memory,) = policy_of(model).runner.host.values()
            assert len(memory.free) * memory.sizes.chunk == memory.allocated - held_now(policy_of(model))
            taken.append(memory.allocated)
            allocated.append(torch.cuda.memory_allocated() if DEVICE == "cuda" else 0)
    assert len(set(taken)) == 1 and len(set(allocated)) == 1


def held_now(policy: MemoryPolicy) -> int:
    """Bytes of the last offloaded layer, which the runner holds until the next layer runs."""
    storages = [stored for layer in policy.runner.outgoing.values() for stored in layer.storages.values()]
    return sum(chunk.bytes.numel() for stored in storages for chunk in stored.chunks)


def test_a_graph_that_is_thrown_away_gives_its_memory_back() -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, "offload")
    loss = model(input_ids=batch(), labels=batch()).loss
    del loss
    gc.collect()
    (memory,) = policy_of(model).runner.host.values()
    assert len(memory.free) * memory.sizes.chunk == memory.allocated - held_now(policy_of(model))


def test_two_models_do_not_meet() -> None:
    models = {mode: prepared("llama", lora()) for mode in (True, "offload", "auto")}
    for mode, model in models.items():
        checkpointing.enable(model, mode)
    found = [step(model, batch()) for model in models.values()]
    assert all(torch.equal(loss, found[0][0]) for loss, _ in found)
    assert len({id(policy_of(model)) for model in models.values()}) == 3
    assert [policy_of(model).mode for model in models.values()] == [True, "offload", "auto"]


def test_a_copy_of_a_model_has_a_policy_of_its_own() -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, "offload")
    loss, _ = step(model, batch())
    twin = copy.deepcopy(model)
    assert policy_of(twin) is not policy_of(model) and policy_of(twin).planner.model is causal_lm_of(twin)
    assert not policy_of(twin).runner.host and policy_of(twin).layers[0] is causal_lm_of(twin).model.layers[0]
    assert torch.equal(step(twin, batch())[0], loss)


def test_auto_keeps_all_where_there_is_room_and_least_where_there_is_none() -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, "auto")
    step(model, batch())
    assert set(policy_of(model).plan(2, 24).actions) == {ActivationAction.SAVE_ALL}
    checkpointing.enable(model, "auto", 1)
    plan = policy_of(model).plan(2, 24)
    assert ActivationAction.SAVE_ALL not in plan.actions and not plan.fits


def test_a_tile_that_was_asked_for_leaves_no_layer_that_keeps_all() -> None:
    model = prepared("llama", lora())
    tiling.enable(model, TILE)
    checkpointing.enable(model, "auto")
    plan = policy_of(model).plan(2, 24)
    assert set(plan.actions) == {ActivationAction.RECOMPUTE_MLP} and plan.tile == TILE
    reference = step(prepared("llama", lora()), batch())
    assert gradients_apart(step(model, batch())[1], reference[1]) < 1e-5


def test_a_plan_is_made_anew_when_shapes_grow() -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, "auto")
    room = policy_of(model).plan(1, 8).peak.total + (policy_of(model).planner.other_bytes or 0)
    checkpointing.enable(model, "auto", int(room * 1.1))
    assert set(policy_of(model).plan(1, 8).actions) == {ActivationAction.SAVE_ALL}
    assert set(policy_of(model).plan(64, 200).actions) != {ActivationAction.SAVE_ALL}


def test_evaluation_and_no_grad_run_plainly() -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, "offload")
    with torch.no_grad():
        model(input_ids=batch())
    model.eval()(input_ids=batch())
    assert not policy_of(model).runner.host


@pytest.mark.parametrize("mode", [True, "offload", "auto"])
def test_switching_off_leaves_only_advice(mode: Any) -> None:
    model = prepared("llama", lora())
    checkpointing.enable(model, mode)
    checkpointing.enable(model, False)
    base = causal_lm_of(model)
    step(model, batch())
    assert policy_of(model).latest is None and not policy_of(model).runner.host
    assert not any(
        isinstance(value, LayerCheckpoint) for module in base.modules() for value in module.__dict__.values()
    )


def test_a_trainer_that_switches_checkpointing_on_gets_the_policy(tmp_path: Any) -> None:
    data = rows(8, seed=2)
    found = {}
    for mode in (False, "offload"):
        model = small("llama", True, lora())
        checkpointing.enable(model, mode)
        found[mode] = curve(sft(model, data, tmp_path, max_steps=4, gradient_checkpointing=True))
        assert not mode or policy_of(model).runner.host
    assert torch.equal(found[False], found["offload"])


def test_a_budget_needs_auto() -> None:
    from hasten.options import LoadOptions

    assert any(
        "memory_budget" in one
        for one in LoadOptions("x", use_gradient_checkpointing=True, memory_budget="8GiB").problems()
    )
    assert any("memory_budget" in one for one in LoadOptions("x", memory_budget="8 apples").problems())
    assert not LoadOptions("x", memory_budget="8.2GiB").problems()
    with pytest.raises(OptionError, match="use_gradient_checkpointing"):
        checkpointing.enable(prepared("llama", lora()), "Offload")
