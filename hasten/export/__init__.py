"""Gets trained models out: merged into a checkpoint of the base's own format, requantised, or as a plain adapter."""

from hasten.export.hub import push_to_hub_merged
from hasten.export.save import Exported, save_merged

__all__ = ["Exported", "push_to_hub_merged", "save_merged"]
