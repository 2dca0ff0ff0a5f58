"""The `hasten` command."""

from hasten.cli.commands import FAILED, app

__all__ = ["FAILED", "app"]
