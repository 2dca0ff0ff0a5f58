"""Applies overlays to a transformers model and removes them: check, plan, then change all classes or none."""

from hasten.patching.apply import apply, is_patched, patched, restore
from hasten.patching.plan import Action, Plan, Skip, family_of, plan
from hasten.patching.report import Report, report

__all__ = [
    "Action",
    "Plan",
    "Report",
    "Skip",
    "apply",
    "family_of",
    "is_patched",
    "patched",
    "plan",
    "report",
    "restore",
]
