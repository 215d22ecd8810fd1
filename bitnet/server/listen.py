"""An Application on a socket, until a signal ends it."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import uvicorn

from bitnet.errors import ConfigError
from bitnet.server.app import Application

GRACE = 1  # seconds that answers have to end after a signal


class _Server(uvicorn.Server):
    """uvicorn's, which does not raise a signal again when it has ended: listen() says how it ended."""

    received: int | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.received is not None
        self.received, self.should_exit = sig, True


def listen(application: Application, host: str, port: int) -> int:
    """Serves on an address until SIGINT or SIGTERM; returns 128 and the signal's number, as shells have it.

    Raises ConfigError for an address that cannot be had, and whatever kept the model from being opened.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"cannot listen on {host} port {port}: a port is 0 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        place = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    # Accepted sockets have it from this one, whose protocol number asyncio does not know for TCP: without it, a token
    # may wait 40 ms for the acknowledgement of the one before.
    place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        application.starlette(), log_level="warning", timeout_graceful_shutdown=GRACE, lifespan="on", ws="none",
        server_header=False,
    )  # fmt: skip
    server = _Server(config)
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    url = f"http://{shown}:{place.getsockname()[1]}"

    def loaded() -> None:
        if application.failure is not None:
            server.should_exit = True
        else:
            print(f"ready: {url}, the API at {url}/v1; Ctrl-C ends it", flush=True)

    application.on_loaded = loaded
    print(f"listening on {url}", flush=True)
    with contextlib.closing(place):
        server.run(sockets=[place])
    if application.failure is not None:
        raise application.failure
    print("stopped", flush=True)
    return 0 if server.received is None else 128 + server.received
