"""Runs that go wrong: what counts as a spike, where a number was lost first, and what a rollback changes.

A loss is watched by two averages over about fifty steps: its own, and that of its distance from the loss before. A
spike is a loss that lies `spike` such distances above the average, never before the warm-up and the first fifty steps
are over. What follows from trouble is written down as an event, in state.json and metrics.jsonl:

    {"event": "rollback", "step": 121, "to": 100, "skipped": [100, 121], "until": 150, "reason": "..."}

The run went on from the checkpoint of step `to`, with the batches that come after `skipped` (loader positions, end
excluded): it never sees again what led to the trouble. The learning rate is `rollback_lr` times the schedule's there
and rises back to it until step `until`, at the end of a second warm-up that is at least as long as the way lost.

    {"event": "skip", ...}     the same, where no checkpoint was: `to` is the step before, since nothing was updated
    {"event": "spike", ...}    a spike that was trained through: no checkpoint yet, or all rollbacks used up
    {"event": "early_stop", ...}    out of patience, or, where batches were skipped, out of a mixture's capped rows

Everything here is a function of the losses and the options, so a run that was killed repeats its rollbacks exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet import ops
from bitnet._core import Tensor
from bitnet.data import Batch
from bitnet.errors import BitnetError
from bitnet.metrics import Record
from bitnet.model import BitNetForCausalLM
from bitnet.nn import Module

DECAY = 0.98  # of the averages: about the last fifty losses
LEAST_LOSSES = 50  # before a spike can be told
LEAST_DEVIATION = 0.02  # of the average: a loss that hardly moves makes no spike of a ripple
COUNTED = ("rollback", "skip")  # the events that use up a rollback


class DivergenceError(BitnetError, ArithmeticError):
    """A loss or gradient that is no number, and no rollback left; the weights are those of the last good step."""


class Trouble(Exception):
    """A step or evaluation that must not stand. what: one clause, for the reason; where: the first bad tensor."""

    def __init__(self, step: int, what: str, where: str = "") -> None:
        super().__init__(f"step {step}: {what}" + (f"; {where}" if where else ""))
        self.step = step


@dataclass(frozen=True)
class LossWatch:
    """The averages of a run's losses so far; `count` losses made them."""

    mean: float = 0.0
    deviation: float = 0.0  # average distance of a loss from the one before: noise alone, even while losses fall
    count: int = 0
    last: float = 0.0

    def after(self, loss: float) -> LossWatch:
        """The averages with one more loss."""
        share = max(1 - DECAY, 1 / (self.count + 1))  # plain means at first: the first loss does not weigh for long
        distance = abs(loss - self.last) if self.count else 0.0
        mean, deviation = self.mean + share * (loss - self.mean), self.deviation + share * (distance - self.deviation)
        return LossWatch(mean, deviation, self.count + 1, loss)

    def limit(self, spike: float) -> float:
        """The largest loss that is no spike, for a threshold in average deviations (0: any loss is none)."""
        if spike == 0 or self.count < LEAST_LOSSES:
            return math.inf
        return self.mean + spike * max(self.deviation, LEAST_DEVIATION * self.mean)

    @property
    def perplexity(self) -> float:
        """Of the average loss."""
        return math.exp(min(self.mean, 700.0))  # the largest that a float holds is e^709


def rate_factor(events: Iterable[Record], step: int, factor: float) -> float:
    """What the rollbacks so far multiply the learning rate of a step (counted from 0) by."""
    scale = 1.0
    for event in events:
        if event["event"] in COUNTED and event["to"] <= step < event["until"]:
            way = (step - event["to"]) / (event["until"] - event["to"])
            scale *= factor + (1.0 - factor) * way
    return scale


def rollbacks(events: Iterable[Record]) -> int:
    """How many of the run's rollbacks are used up."""
    return sum(event["event"] in COUNTED for event in events)


def describe(event: Record) -> str:
    """A line for the log."""
    if event["event"] not in COUNTED:
        what = {"spike": "warning: {}; training goes on through it", "early_stop": "{}: stopped early"}
        return what[event["event"]].format(event["reason"])
    first, last = event["skipped"][0], event["skipped"][1] - 1
    way = f"rolled back to step {event['to']}" if event["event"] == "rollback" else "not updated"
    batches = f"batch {last}" if first == last else f"batches {first} to {last}"
    return f"warning: {event['reason']}; {way}, past {batches}, with a lower learning rate until step {event['until']}"


# ---- the first bad tensor -------------------------------------------------------------------------------------------


class _FoundError(Exception):
    """Ends a forward pass at the first output that is not finite."""


def bad_weight(model: Module) -> str | None:
    """Name of the first parameter that holds a NaN or an infinity."""
    return next((name for name, weight in model.named_parameters() if not _finite(weight)), None)


def bad_gradient(model: Module) -> str | None:
    """Name of the gradient that was lost first: the backward pass goes from the last parameter to the first."""
    named = reversed(list(model.named_parameters()))
    return next((f"{name}.grad" for name, weight in named if not (weight.grad is None or _finite(weight.grad))), None)


def bad_output(model: BitNetForCausalLM, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> str | None:
    """Name of the first layer whose output is not finite, for tokens and targets (B, T).

    The forward pass runs again without a tape; for this one pass every module's forward looks at what it returns.
    """
    watched = [(name, module) for name, module in model.named_modules() if name]

    def watch(name: str, module: Module) -> None:
        forward = module.forward

        def watching(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            if isinstance(out, Tensor) and not _finite(out):
                raise _FoundError(name)
            return out

        vars(module)["forward"] = watching

    try:
        for name, module in watched:
            watch(name, module)
        with ops.no_grad():
            return None if math.isfinite(model(tokens, targets).item()) else "the loss"
    except _FoundError as found:
        return f"the output of {found}"
    finally:
        for _, module in watched:
            vars(module).pop("forward", None)


def first_bad(model: BitNetForCausalLM, batches: Iterable[Batch] = ()) -> str:
    """A clause that names the first bad tensor: of the parameters, the gradients, then the outputs for each batch."""
    name = bad_weight(model) or bad_gradient(model)
    if name is None:
        name = next((found for found in (bad_output(model, *batch) for batch in batches) if found), None)
    if name is None:
        return "every weight and gradient is finite"
    return f"the first tensor that is not finite is {name}"


def _finite(tensor: Tensor) -> bool:
    values = (ops.convert(tensor, "f32") if tensor.dtype == "q8" else tensor).numpy(copy=True)
    return bool(np.isfinite(values).all())
