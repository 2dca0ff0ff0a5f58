"""Runs MLPs in tiles of tokens, so that peak memory grows with the hidden states alone: `unsloth_tiled_mlp`."""

from typing import Any

from hasten.overlays import MLPOverlay
from hasten.patching.apply import reconfigure
from hasten.state import state_of

DEFAULT_TILE = 4096
"""Tokens per tile. Each tile reads the weights once; this is about ten times the size from which a GPU's matmuls are limited by
compute and not by memory bandwidth, so tiles cost no speed. Gate, up and their activation then take 0.33 GiB in an 8B model (14336
channels, 16 bits)."""


def tile_of(asked: bool | int | str) -> int | None:
    """Returns the tokens per tile for a value of `unsloth_tiled_mlp`, None = no tiles. "auto" without a plan is as True."""
    return None if asked is False else DEFAULT_TILE if isinstance(asked, bool | str) else asked


def requested_tile(model: Any, planned: bool) -> int | None:
    """Returns the tile of a causal LM's MLPs; None without tiles, or where the memory policy plans and may choose it ("auto")."""
    if planned and state_of(model).mlp_tile == "auto":
        return None
    tiles = (m.overlay_config.tile_rows for m in model.modules() if isinstance(m, MLPOverlay))
    return next((tile for tile in tiles if tile), None)


def set_tile(model: Any, tile: int | None) -> int:
    """Makes every MLP overlay run in tiles of `tile` tokens (None: all tokens at once). Returns how many there are.

    model: a causal LM, the PeftModel around it, or any part of them, such as a single layer.
    """
    mlps = [module for module in model.modules() if isinstance(module, MLPOverlay)]
    for mlp in mlps:
        reconfigure(mlp, tile_rows=tile)
    return len(mlps)


def enable(model: Any, asked: bool | int | str) -> list[str]:
    """Sets the tiles that `unsloth_tiled_mlp` asks for and returns notes for the report.

    asked: False; True = tiles of DEFAULT_TILE tokens; a number of tokens; "auto" = as True unless the memory policy plans, which
    then chooses.
    """
    tile = tile_of(asked)
    state_of(model).mlp_tile = asked
    count = set_tile(model, tile)
    if tile is None:
        return []
    if not count:
        return ["tiled MLP: not applied, because no MLP of this model runs as a hasten overlay"]
    unless = " where the memory policy does not choose" if asked == "auto" else ""
    return [f"tiled MLP: {count} MLPs run in tiles of {tile} tokens{unless}, and save only their input"]
