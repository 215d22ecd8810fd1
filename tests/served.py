"""A server on a free port of this machine, in this process, for tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from bitnet import BitNetForCausalLM
from bitnet.chat_template import choose
from bitnet.server.answers import Defaults
from bitnet.server.app import Access, Application, Service
from bitnet.server.engine import Engine
from bitnet.tokenizer import Tokenizer


def service_of(model: BitNetForCausalLM, tokenizer: Tokenizer, slots: int = 4, **engine: object) -> Service:
    """As `bitnet serve` makes it."""
    return Service(
        "tiny",
        Engine(model, slots, **engine),
        tokenizer,
        choose("auto", tokenizer),
        Defaults(),  # type: ignore[arg-type]
    )


@contextmanager
def served(load: Callable[[], Service], access: Access | None = None) -> Iterator[tuple[str, Application]]:
    """(address, application) of a server that opens its model by load()."""
    application = Application(load, access or Access(), lambda line: None)
    place = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application.starlette(), log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: server.run(sockets=[place]), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}", application
    finally:
        server.should_exit = True
        thread.join(10)
        place.close()
        assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Returns when it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
