"""The MLP by tiles of rows changes memory, never the loss or a gradient: whole models on the path through modules."""

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_kit import FAMILIES, apart, curve, gradients_apart, gradients_of, lora, sft, small
from training_kit import rows as data_rows

from hasten import FastLanguageModel, report
from hasten.errors import OptionError
from hasten.ops.rows import in_tiles
from hasten.overlays import MLPOverlay
from hasten.patching import restore
from hasten.state import causal_lm_of, state_of
from hasten.testing import relative_error, save_tiny
from hasten.training import checkpointing, tiling
from hasten.training.memory.policy import policy_of

IDS = torch.randint(6, 262, (2, 11), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(11) < 4, -100)
TILE = 4  # 22 rows: five tiles and a ragged one
WAYS = {"lora": {"adapter": lora()}, "nf4": {"adapter": lora(), "nf4": True}, "full": {}}


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(11)
    loss = model(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    return loss.detach(), gradients_of(model)


def tiles_of(model: Any) -> set[int | None]:
    return {module.overlay_config.tile_rows for module in model.modules() if isinstance(module, MLPOverlay)}


class Activations(TorchDispatchMode):
    """heights: how many rows each call of the gate's activation gets."""

    def __init__(self) -> None:
        super().__init__()
        self.heights: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.silu.default, torch.ops.aten.gelu.default):
            self.heights.append(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def heights() -> Iterator[list[int]]:
    with Activations() as seen:
        yield seen.heights


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_rows_at_once(family: str, way: str, heights: list[int]) -> None:
    loss, gradients = step(small(family, True, **WAYS[way]))
    assert heights == [22, 22]
    for mode, runs in ((False, 2), (True, 3)):
        model = small(family, True, **WAYS[way])
        assert tiling.set_tile(model, TILE) == 2
        checkpointing.enable(model, mode)
        heights.clear()
        loss_by_tiles, by_tiles = step(model)
        assert relative_error(loss_by_tiles, loss) < 1e-6
        assert gradients_apart(by_tiles, gradients) < 1e-5
        assert set(heights) == {TILE, 22 % TILE} and len(heights) <= runs * 2 * 6  # layers, tiles


@pytest.mark.parametrize("mode", [False, True])
def test_one_tile_changes_no_bit(mode: bool) -> None:
    found = []
    for tile in (None, 22):
        model = small("llama", True, lora())
        tiling.set_tile(model, tile)
        checkpointing.enable(model, mode)
        found.append(step(model))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][name], gradient) for name, gradient in found[0][1].items())


@pytest.mark.parametrize("mode", [False, True])
def test_dropout_is_the_same_when_a_tile_is_made_again(mode: bool) -> None:
    """Else the gradients are not those of the loss, as its differences show."""
    model = small("llama", True, lora(lora_dropout=0.4)).double()
    tiling.set_tile(model, TILE)
    checkpointing.enable(model, mode)
    _, gradients = step(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moves = {name: torch.randn_like(p) for name, p in parameters.items()}
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(moves[name], alpha=sign * 1e-5)
        losses.append(step(model)[0])
    slope = sum((gradients[name] * move).sum() for name, move in moves.items())
    assert relative_error((losses[0] - losses[1]) / 2e-5, torch.as_tensor(slope)) < 1e-5


def test_nothing_as_wide_as_the_mlp_is_kept() -> None:
    widths = []
    for tile in (None, TILE):
        model = small("llama", True, lora(), intermediate_size=136)
        tiling.set_tile(model, tile)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            model(input_ids=IDS, labels=LABELS)
        widths.append({t.shape[-1] for t in kept if t.dim() and t.untyped_storage().data_ptr() not in own})
    assert 136 in widths[0] and 136 not in widths[1]


def test_inference_goes_by_tiles_too(heights: list[int]) -> None:
    model = small("llama", True).eval()
    with torch.no_grad():
        whole = model(IDS).logits
        tiling.set_tile(model, TILE)
        heights.clear()
        assert relative_error(model(IDS).logits, whole) < 1e-5
        assert heights == [*[TILE] * 5, 2] * 2
        decoded = model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert decoded.shape == (1, 15)


def test_without_gradients_no_tile_is_checkpointed() -> None:
    files: list[str] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        files.extend(frame.filename for frame in traceback.extract_stack())
        return x * 2

    x = torch.ones(5, 2, requires_grad=True)
    with torch.no_grad():
        in_tiles(run, x, 2)
    assert files and torch.utils.checkpoint.__file__ not in files
    in_tiles(run, x, 2)
    assert torch.utils.checkpoint.__file__ in files


def test_a_hooked_projection_sees_all_tokens_at_once() -> None:
    model = small("llama", True, lora())
    tiling.set_tile(model, TILE)
    seen: list[torch.Size] = []
    projection = causal_lm_of(model).model.layers[0].mlp.up_proj
    hook = projection.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    with pytest.warns(UserWarning, match="expects all tokens"):
        model(input_ids=IDS)
    assert seen == [(2, 11, 64)]
    hook.remove()


def test_a_trainer_trains_the_same(tmp_path: Path) -> None:
    curves = []
    for tile in (None, 16):
        model = small("gemma2", True, lora())
        tiling.set_tile(model, tile)
        trainer = sft(model, data_rows(8, seed=2), tmp_path, max_steps=3, gradient_checkpointing=True)
        curves.append(curve(trainer))
    assert apart(curves[1], curves[0]) < 1e-5


@pytest.mark.parametrize(
    ("asked", "rows", "said"),
    [
        (False, None, None),
        (True, tiling.DEFAULT_TILE, f"tiles of {tiling.DEFAULT_TILE} tokens"),
        (16, 16, "2 MLPs run in tiles of 16 tokens"),
        ("auto", tiling.DEFAULT_TILE, "where the memory policy does not choose"),
    ],
)
def test_the_argument_sets_tiles_and_the_report_says_so(tmp_path: Path, asked: Any, rows: Any, said: Any) -> None:
    folder = save_tiny(tmp_path, "llama", num_hidden_layers=2)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, unsloth_tiled_mlp=asked, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    assert tiles_of(model) == {rows}
    assert state_of(model).mlp_tile == asked
    notes = [note for note in report(model).notes if "tiled MLP" in note]
    assert not notes if said is None else said in notes[0] and len(notes) == 1


@pytest.mark.parametrize(("mode", "tile"), [(False, 4096), (True, 4096), ("offload", 4096), ("unsloth", None)])
def test_auto_leaves_tiles_to_the_policy_where_that_plans(tmp_path: Path, mode: Any, tile: int | None) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(save_tiny(tmp_path, "llama", num_hidden_layers=2)), max_seq_length=64, load_in_4bit=False,
        unsloth_tiled_mlp="auto", use_gradient_checkpointing=mode, device_map="cpu",
    )  # fmt: skip
    assert policy_of(model).tile == tile


def test_a_value_that_means_nothing_raises_before_anything_is_read() -> None:
    with pytest.raises(OptionError, match="unsloth_tiled_mlp=8"):
        FastLanguageModel.from_pretrained("nowhere/at-all", unsloth_tiled_mlp=8)


def test_a_model_without_overlays_is_said_not_to_be_tiled() -> None:
    model = restore(small("llama", True))
    assert tiling.enable(model, True) == [
        "tiled MLP: not applied, because no MLP of this model runs as a hasten overlay"
    ]


def test_tiles_of_one_layer_and_off_again() -> None:
    model = small("llama", True, lora())
    layers = causal_lm_of(model).model.layers
    assert tiling.set_tile(layers[1], 16) == 1 and tiles_of(layers[0]) == {None} and tiles_of(layers[1]) == {16}
    assert tiling.set_tile(model, None) == 2 and tiles_of(model) == {None}
