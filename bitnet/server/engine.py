"""The thread that decodes for all requests: it owns a Batch, and requests join and leave between its steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bitnet.batching import Batch, Event
from bitnet.errors import BitnetError
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler


class StoppedError(BitnetError):
    """An engine that has stopped decodes nothing more."""


STOPPED = StoppedError("the server is being stopped")


@dataclass(eq=False)
class Job:
    """A sequence to decode. `deliver` gets each of its events, and an error that ends it, on the engine's thread.

    top, score_prompt: as in Batch.add. reused_tokens: of the prompt, which the cache held; known with the first event.
    """

    prompt: list[int]
    sampler: Sampler
    max_new_tokens: int
    ends: frozenset[int]
    vocab_size: int
    deliver: Callable[[Event | BitnetError], None]
    top: int | None = None
    score_prompt: bool = False
    reused_tokens: int = 0


@dataclass
class Counters:
    """What an engine has done so far."""

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    drawn_tokens: int = 0
    steps: int = 0
    busy_seconds: float = 0.0


class Engine:
    """Decodes jobs, `slots` of them at once, in the order in which they came.

    capacity, cache_dtype: as in Batch.
    """

    def __init__(
        self, model: BitNetForCausalLM, slots: int, capacity: int | None = None, cache_dtype: str = "f32"
    ) -> None:
        self.model, self.counters = model, Counters()
        self._batch = Batch(model, slots, capacity, cache_dtype)
        self._waiting: deque[Job] = deque()
        self._left: set[Job] = set()  # jobs that nobody waits for any more
        self._live: dict[int, Job] = {}
        self._change = threading.Condition()
        self._stopping = self._closed = False
        self._thread = threading.Thread(target=self._run, name="bitnet engine", daemon=True)
        self._thread.start()

    @property
    def slots(self) -> int:
        """Sequences that are decoded at once."""
        return self._batch.slots

    @property
    def capacity(self) -> int:
        """Tokens of a sequence."""
        return self._batch.capacity

    @property
    def cache_bytes(self) -> int:
        """What keys and values take."""
        return self._batch.cache_bytes

    @property
    def running(self) -> int:
        """Sequences that are decoded now."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """A job joins as soon as a slot is free; it hears a StoppedError where none will be."""
        with self._change:
            if self._closed:
                job.deliver(STOPPED)
                return
            self._waiting.append(job)
            self._change.notify()

    def leave(self, job: Job) -> None:
        """Nobody wants more of a job: it gives up its slot before the next step. Nothing happens if it has ended."""
        with self._change:
            self._left.add(job)
            self._change.notify()

    def stop(self) -> None:
        """Ends after the step that is running; whoever is in it or waits hears so."""
        with self._change:
            self._stopping = True
            self._change.notify()

    def join(self, seconds: float) -> None:
        """Waits until it has ended, so long at most."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while self._admit():
            start = time.perf_counter()
            try:
                events = self._batch.step()
            except Exception as error:  # of whatever kind: those that wait for it must hear of it, and others go on
                self._fail(error if isinstance(error, BitnetError) else BitnetError(f"the server failed: {error!r}"))
                continue
            self.counters.steps += 1
            self.counters.busy_seconds += time.perf_counter() - start
            for event in events:
                self._deliver(event)
        self._close()

    def _admit(self) -> bool:
        """Lets jobs leave and join; waits while there is nothing to do. False when it is time to stop."""
        with self._change:
            self._let_leave()
            while not (self._stopping or self._live or self._waiting):
                self._change.wait()
                self._let_leave()
            if self._stopping:
                return False
            joining = [self._waiting.popleft() for _ in range(min(self._batch.free, len(self._waiting)))]
        for job in joining:
            try:
                number = self._batch.add(
                    job.prompt, job.sampler, job.max_new_tokens, job.ends, job.vocab_size,
                    top=job.top, score_prompt=job.score_prompt,
                )  # fmt: skip
            except BitnetError as error:
                job.deliver(error)
                continue
            self._live[number] = job
            job.reused_tokens = self._batch.reused_by(number)
            self.counters.requests += 1
            self.counters.prompt_tokens += len(job.prompt)
            self.counters.reused_tokens += job.reused_tokens
        return True

    def _let_leave(self) -> None:
        """Wants the lock."""
        if not self._left:
            return
        for number in [number for number, job in self._live.items() if job in self._left]:
            self._batch.remove(number)
            del self._live[number]
        self._waiting = deque(job for job in self._waiting if job not in self._left)
        self._left.clear()

    def _deliver(self, event: Event) -> None:
        job = self._live[event.request]
        self.counters.drawn_tokens += event.token is not None
        if event.finish_reason is not None:
            del self._live[event.request]
        job.deliver(event)

    def _fail(self, error: BitnetError) -> None:
        """A step failed: whoever was in it hears why, and the batch is empty again."""
        for number, job in self._live.items():
            self._batch.remove(number)
            job.deliver(error)
        self._live.clear()

    def _close(self) -> None:
        """Whoever is in the batch or waits hears that nothing more comes."""
        self._fail(STOPPED)
        with self._change:
            self._closed = True
            for job in self._waiting:
                job.deliver(STOPPED)
            self._waiting.clear()
