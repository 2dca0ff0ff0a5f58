"""The MLP some rows at a time, so that peak memory grows with the residual stream alone: `unsloth_tiled_mlp`."""

from typing import Any

from hasten.overlays import MLPOverlay
from hasten.patching.apply import reconfigure
from hasten.state import state_of

DEFAULT_ROWS = 4096
"""A product reads its weight once for so many rows: some ten times what a GPU needs to be bound by its multipliers and not by
memory, so tiles cost no speed. Gate, up and their product take 0.33 GiB then in an 8B model (14336 channels, 16 bits)."""


def rows_of(asked: bool | int | str) -> int | None:
    """Rows of a tile that `unsloth_tiled_mlp` asks for; None = none. "auto" is as True where nobody plans."""
    return None if asked is False else DEFAULT_ROWS if isinstance(asked, bool | str) else asked


def asked_tile(model: Any, planned: bool) -> int | None:
    """The tile that the MLPs of a causal LM have. None where there is none, or where a plan is made and may choose it."""
    if planned and state_of(model).mlp_tile == "auto":
        return None
    tiles = (m.overlay_config.tile_rows for m in model.modules() if isinstance(m, MLPOverlay))
    return next((rows for rows in tiles if rows), None)


def set_tile(model: Any, rows: int | None) -> int:
    """Makes every MLP under an overlay run `rows` rows at a time (None: all at once). Returns how many there are.

    model: a causal LM, the PeftModel around it, or any part of them, a single layer say.
    """
    found = [module for module in model.modules() if isinstance(module, MLPOverlay)]
    for module in found:
        reconfigure(module, tile_rows=rows)
    return len(found)


def enable(model: Any, asked: bool | int | str) -> list[str]:
    """Sets the tiles that `unsloth_tiled_mlp` asks for and returns notes for the report.

    asked: False; True = tiles of DEFAULT_ROWS; a number of rows; "auto" = as True, but where the memory policy plans it decides.
    """
    rows = rows_of(asked)
    state_of(model).mlp_tile = asked
    count = set_tile(model, rows)
    if rows is None:
        return []
    if not count:
        return ["tiled MLP: nothing is tiled, no MLP of this model runs under an overlay"]
    unless = " where the memory policy does not choose" if asked == "auto" else ""
    return [f"tiled MLP: {count} MLPs run {rows} rows at a time{unless}, and keep nothing but their input"]
