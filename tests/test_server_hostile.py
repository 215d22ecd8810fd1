"""Clients that do what they should not, and signals: others feel nothing of it, no slot and no traceback is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server needs it")
httpx = pytest.importorskip("httpx", reason="the client of these tests")

import bitnet  # noqa: E402
from bitnet import checkpoint  # noqa: E402
from bitnet.tokenizer import ByteTokenizer  # noqa: E402

CONFIG = bitnet.BitNetConfig(257, 48, 80, 2, 6, 3, max_position_embeddings=512, initializer_range=0.15)
ENDLESS = {"prompt": "a", "max_tokens": 500, "n": 128, "logit_bias": {"256": -100}}  # eos is never drawn
SECONDS = 20.0  # that what ought to take a fraction of one may take on a busy machine


class Served:
    """`bitnet serve` in a process of its own; what it says, besides that it is ready, is in `log`."""

    def __init__(self, run: Path, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "bitnet.cli", "serve", str(run), "--port", "0", "--slots", "2", "--quiet"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--threads", "1"], stdout=subprocess.PIPE, stderr=file, env=environment, text=True
            )
        assert self.process.stdout is not None
        ready = next((line for line in self.process.stdout if line.startswith("ready: ")), None)
        assert ready is not None, log.read_text()
        self.url = ready.split()[1].rstrip(",")
        self.port = int(self.url.rpartition(":")[2])

    def post(self, body: dict[str, Any], path: str = "/v1/completions") -> Any:
        """The answer to a request."""
        content, headers = json.dumps(body), {"Content-Type": "application/json"}
        return httpx.post(self.url + path, content=content, headers=headers, timeout=SECONDS)

    def begin(self, body: dict[str, Any], size: int | None = None) -> socket.socket:
        """A request on a connection of its own. size: of the body, as the head has it."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port))
        head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {size or len(data)}\r\n\r\n"
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + data)
        return connection

    def gauge(self, name: str) -> int:
        """A value of /metrics."""
        lines = httpx.get(f"{self.url}/metrics", timeout=SECONDS).text.splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def comes_to(self, running: int) -> None:
        """Waits until so many sequences are decoded."""
        end = time.monotonic() + SECONDS
        while self.gauge("bitnet_running") != running or (not running and self.gauge("bitnet_waiting")):
            assert time.monotonic() < end, f"{self.gauge('bitnet_running')} run, not {running}"
            time.sleep(0.02)

    def end(self, number: signal.Signals, again_after: float | None = None) -> tuple[int, float]:
        """Exit status, and how long it took from the first signal on."""
        start = time.monotonic()
        self.process.send_signal(number)
        if again_after is not None:
            time.sleep(again_after)
            self.process.send_signal(number)
        status = self.process.wait(SECONDS)
        return status, time.monotonic() - start

    def close(self) -> None:
        """Leaves no process behind."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "run"
    checkpoint.save(folder, 1, bitnet.BitNetForCausalLM(CONFIG, seed=5), {}, {"step": 1}, ByteTokenizer())
    return folder


@pytest.fixture
def served(run: Path, tmp_path: Path) -> Iterator[Served]:
    with closing(Served(run, tmp_path / "log")) as server:
        yield server


def test_clients_that_leave(served: Served) -> None:
    """In the middle of their requests and of answers: their slots are free again, and the log says nothing."""
    wanted = served.post({"prompt": "def ", "max_tokens": 16, "temperature": 0}).json()["choices"]
    for stream in (True, False):
        connections = [served.begin(ENDLESS | {"stream": stream}) for _ in range(3)]
        served.comes_to(2)
        for connection in connections:
            connection.close()
        served.comes_to(0)
    for _ in range(3):
        served.begin({"prompt": "a"}, size=5000).close()
    assert served.post({"prompt": "def ", "max_tokens": 16, "temperature": 0}).json()["choices"] == wanted
    served.comes_to(0)
    assert served.log.read_text() == ""


def test_half_of_a_surrogate_pair(served: Served) -> None:
    for path, name in (("/tokenize", "content"), ("/v1/completions", "prompt")):
        answer = served.post({name: "a\ud800"}, path)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert served.post({"content": 5}, "/tokenize").json()["error"]["message"] == "content must be a string, not 5"
    assert served.post({"content": "ab"}, "/tokenize").json() == {"tokens": [97, 98]}
    assert served.log.read_text() == ""


def test_long_stops(served: Served) -> None:
    """A stop string of a megabyte costs as much as the text that it may end."""
    body = {"prompt": "a", "max_tokens": 400, "temperature": 0, "logit_bias": {"97": 100, "256": -100}}
    answer = served.post(body | {"stop": ["a" * 10**6, "x" * 10**6]})
    assert answer.json()["choices"][0]["text"] == "a" * 400


def test_ids_that_only_the_model_has(run: Path, tmp_path: Path) -> None:
    """Refused before anything is decoded; a vocabulary may be padded."""
    model = bitnet.BitNetForCausalLM(CONFIG.replace(vocab_size=260), seed=5)
    checkpoint.save(tmp_path / "padded", 1, model, {}, {"step": 1}, ByteTokenizer())
    with closing(Served(tmp_path / "padded", tmp_path / "log")) as server:
        for id_, sentence in ((259, "token id 259 is outside this tokenizer's"), (260, "the prompt has the id 260")):
            answer = server.post({"prompt": [97, id_], "n": 2, "stream": True})
            assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(sentence)


def test_hundreds_of_choices(served: Served) -> None:
    """Their prompts are read as their turns come: others are answered meanwhile."""
    connection = served.begin(ENDLESS | {"prompt": ["ab" * 250] * 2, "n": 128, "stream": True})
    waits = [0.0]
    while sum(waits) < SECONDS:
        start = time.monotonic()
        running = served.gauge("bitnet_running")
        waits.append(time.monotonic() - start)
        if running == 2:
            break
    assert running == 2 and max(waits) < 1
    assert connection.recv(12) == b"HTTP/1.1 200"
    connection.close()
    served.comes_to(0)


@pytest.mark.parametrize(
    ("number", "again_after"), [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGINT, 0.02)]
)
def test_signals(served: Served, number: signal.Signals, again_after: float | None) -> None:
    """Whatever is open, it ends within a second, at once after a second signal, and says to streams why."""
    idle = socket.create_connection(("127.0.0.1", served.port))
    idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert idle.recv(1000).startswith(b"HTTP/1.1 200")
    unfinished = served.begin({"prompt": "a"}, size=5000)
    whole, stream = served.begin(ENDLESS), served.begin(ENDLESS | {"stream": True})
    served.comes_to(2)
    time.sleep(0.05)
    status, took = served.end(number, again_after)
    assert status == 128 + number
    assert took < (1.0 if again_after is None else 0.7)
    if again_after is None:
        stream.settimeout(SECONDS)
        assert b"the server is being stopped" in b"".join(iter(lambda: stream.recv(1 << 16), b""))
    for connection in (idle, unfinished, whole, stream):
        connection.close()
    assert served.log.read_text() == ""


def test_signal_before_the_model_is_open(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bitnet.cli", "serve", str(run), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            assert any(line.startswith("listening on ") for line in process.stdout)
            start = time.monotonic()
            process.send_signal(number)
            assert process.wait(SECONDS) == 128 + number
            assert time.monotonic() - start < 1
            assert process.stderr.read() == ""
