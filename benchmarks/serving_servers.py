"""The servers of serving.py, each a process of its own on a port that was free."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO

STARTS = 300.0  # seconds that a server has to open its model
ENDS = 10.0  # seconds that it has to end
LLAMA_ABOUT = "import llama_cpp, llama_cpp.server.app as _; print(llama_cpp.__version__)"


class Server:
    """A command that says where it listens; `url` is what `where` finds in its output. Ends with the `with` block.

    Raises OSError, with its last words, for one that ends before, or takes too long.
    """

    def __init__(self, command: list[str], where: str) -> None:
        self.words: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (a pipe could fill)
        self.process = subprocess.Popen(command, stdout=self.words, stderr=self.words, stdin=subprocess.DEVNULL,
                                        env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
        try:
            self.url = self._find(re.compile(where))
        except BaseException:
            self.close()
            raise

    def _find(self, where: re.Pattern[str]) -> str:
        deadline = time.monotonic() + STARTS
        while True:
            ended = self.process.poll() is not None  # before the words are read, so that the last ones are
            said = os.pread(self.words.fileno(), 1 << 20, 0).decode(errors="replace")  # the child's place in it stays
            found = where.search(said)
            if found is not None:
                return found[1]
            if ended or time.monotonic() > deadline:
                last = (said.strip().splitlines() or ["no word"])[-1]
                how = f"ended with status {self.process.returncode}" if ended else f"took over {STARTS:.0f} s"
                raise OSError(f"{' '.join(self.process.args[:4])} {how}: {last}")  # type: ignore[index]
            time.sleep(0.05)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        try:
            self.process.wait(ENDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.words.close()


def bitnet(file: Path, slots: int, context: int, threads: int, form: list[str]) -> Server:
    """`bitnet serve` of a .bitnet file; form: flags of how its weights are kept."""
    options = ["--port", "0", "--quiet", "--slots", str(slots), "--context", str(context), "--threads", str(threads)]
    return Server([sys.executable, "-m", "bitnet.cli", "serve", str(file), *options, *form], r"ready: (\S+),")


def llama_version(python: str) -> str:
    """Of llama-cpp-python, whose server this interpreter can run. Raises OSError, which says why it cannot."""
    run = subprocess.run([python, "-c", LLAMA_ABOUT], capture_output=True, text=True, check=False)
    if run.returncode:
        raise OSError(f"{python} cannot run llama_cpp.server: {run.stderr.strip().splitlines()[-1]}")
    return run.stdout.strip()


def llama_cpp(python: str, file: Path, context: int, threads: int) -> Server:
    """llama-cpp-python's own server of a GGUF file.

    It decodes one request at a time. Told otherwise than its defaults: logits of a prompt's last token alone, and a
    stream goes on when the next request comes, instead of being cut off.
    """
    options = {
        "model": file, "port": 0, "n_ctx": context, "n_threads": threads, "n_threads_batch": threads,
        "logits_all": "false", "interrupt_requests": "false", "verbose": "false",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return Server([python, "-m", "llama_cpp.server", *words], r"Uvicorn running on (http://[^\s/]+:\d+)")
