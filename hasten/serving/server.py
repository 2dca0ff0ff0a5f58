"""Runs the HTTP server. The address is taken before the model is loaded, so that a port in use is an error of
seconds."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hasten.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from hasten.serving.service import Service

log = logging.getLogger(__name__)

LOOPBACK = ("localhost", "127.0.0.1", "::1")
GRACE = 3
"""Seconds that open calls have at the end."""


def require_extra() -> None:
    """Raises MissingExtraError where FastAPI or uvicorn is not installed."""
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtraError("hasten serve", package, "serve")


def bind(host: str, port: int, has_key: bool) -> socket.socket:
    """Takes an address. port: 0 = any free one. Raises InputError where it cannot be had, and warns where other
    machines can reach it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"the address {host}, port {port} cannot be used ({error}). Pass another --port or --host."
        ) from error
    if host not in LOOPBACK:
        open_to_all = "" if has_key else ", without a key; pass --api-key"
        log.warning("--host %s: other machines can send requests to this server%s", host, open_to_all)
    return taken


def hosts_of(host: str) -> Sequence[str] | None:
    """Returns the names that calls may use for the server, None = any."""
    return LOOPBACK if host in LOOPBACK else None


def serve(service: Service, taken: socket.socket, api_key: str | None, hosts: Sequence[str] | None) -> None:
    """Serves until the process is interrupted."""
    import uvicorn

    from hasten.serving.app import create_app

    app = create_app(service, api_key, hosts)
    service.warm_up()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE))
    try:
        server.run([taken])
    except KeyboardInterrupt:
        log.info("interrupted")  # uvicorn raises it once more when it has shut down
