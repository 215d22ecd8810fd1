"""An Application on a socket, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import Any

import uvicorn

from bitnet.errors import ConfigError
from bitnet.server.app import Application

# Seconds after a signal that answers have to end, that those which have not are given to say so, and that it takes to
# notice that a connection was cut. The process ends within a second.
GRACE, FAREWELL, CUT = 0.3, 0.1, 0.26
POLL_SECONDS = 0.01


class _Server(uvicorn.Server):
    """uvicorn's, but for how it ends.

    It does not raise a signal again when it has ended: listen() says how it ended. And it cancels no task, which would
    be logged with a traceback: it cuts connections, and the tasks end as they do when a client goes away.
    """

    def __init__(self, config: uvicorn.Config, application: Application) -> None:
        super().__init__(config)
        self._application = application
        self.received: int | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.received is not None
        self.received, self.should_exit = sig, self.started

    async def main_loop(self) -> None:
        """Until a signal, which may have come before it."""
        if self.received is None:
            await super().main_loop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets answers end, then tells the others that it stops, then cuts them off; at once after a second signal."""
        for place in (*self.servers, *(sockets or ())):
            place.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()  # those at rest; the others after their answer
        await self._answered(GRACE)
        self._application.stop()
        await self._answered(FAREWELL)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self.force_exit = False
        await self._answered(CUT)
        await self.lifespan.shutdown()

    async def _answered(self, seconds: float) -> None:
        """Waits until nothing is being answered, so long at most, or until a second signal."""
        end = time.monotonic() + seconds
        while self.server_state.tasks and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(POLL_SECONDS)


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
        application.starlette(), log_level="warning", lifespan="on", ws="none", server_header=False,
    )  # fmt: skip
    server = _Server(config, application)
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    url = f"http://{shown}:{place.getsockname()[1]}"

    def loaded() -> None:
        if application.failure is not None:
            server.should_exit = True
        else:
            print(f"ready: {url}, the API at {url}/v1; Ctrl-C ends it", flush=True)

    application.on_loaded = loaded
    with contextlib.closing(place), server.capture_signals():
        print(f"listening on {url}", flush=True)
        server.run(sockets=[place])
    if application.failure is not None:
        raise application.failure
    print("stopped", flush=True)
    return 0 if server.received is None else 128 + server.received
