"""Writes trained models: merged into a checkpoint with the base's layout, requantised, or as a plain adapter."""

from hasten.export.hub import push_to_hub_merged
from hasten.export.save import Exported, save_merged

__all__ = ["Exported", "push_to_hub_merged", "save_merged"]
