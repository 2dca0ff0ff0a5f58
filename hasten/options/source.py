"""Checks where a model is read from (`model_name`)."""

from collections.abc import Mapping
from typing import Any

from hasten.options.values import Rule, seed


def hub_id_or_folder(value: Any) -> str | None:
    """Validates `model_name`."""
    return None if isinstance(value, str) and value.strip() else "must be a hub id or the path of a folder"


RULES: Mapping[str, Rule] = {"model_name": hub_id_or_folder, "random_state": seed}
