"""What a trainer does about trouble: tells a spike, goes back to the last good checkpoint, finds the first bad tensor.

bitnet/stability.py says what trouble is and how it is written down; here it changes the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bitnet import checkpoint, ops, stability
from bitnet.data import Batch
from bitnet.ramp import blended
from bitnet.stability import DivergenceError, Trouble

if TYPE_CHECKING:
    from bitnet.trainer import Trainer


def first_bad(t: Trainer, batches: Iterable[Batch] = (), share: float = 1.0) -> str:
    """stability.first_bad of the model as it trains, its layers ternary by this share."""
    with ops.precision(t.config.precision), blended(t.model, share):
        return stability.first_bad(t.model, batches)


def spike(t: Trainer, loss: float) -> str | None:
    """Trouble if a loss is a spike and a rollback is possible; what to report if it is not; None for no spike."""
    c = t.config
    assert c.warmup is not None
    limit = t.watch.limit(c.spike)
    if t.step < c.warmup or loss <= limit:
        return None
    trouble = Trouble(t.step + 1, f"the loss {loss:.4g} is a spike: {limit:.4g} would not be")
    t.keeper.settle()
    if t.keeper.good >= 0 and stability.rollbacks(t.events) < c.rollbacks:
        raise trouble
    return str(trouble)


def recover(t: Trainer, trouble: Trouble) -> None:
    """Back to the last checkpoint and past the batches since then; without one, past the batch of this step.

    Where that leaves no rows under a mixture's epoch caps, the run ends at the step that it went back to.
    Raises DivergenceError if neither can be, or all rollbacks are used up.
    """
    c = t.config
    assert c.warmup is not None
    start = time.perf_counter()
    with t.interrupts.held():
        t.keeper.settle()
        lost = trouble.step > t.step  # before the update: nothing has changed yet
        end = t.position + (c.grad_accum if lost else 0)
        if stability.rollbacks(t.events) >= c.rollbacks:
            used = f"all {c.rollbacks} rollbacks are used up; " if c.rollbacks else ""
            raise DivergenceError(f"{trouble}; {used}{_advice(t)}") from None
        good = t.keeper.good_checkpoint()
        if good is None and (not lost or stability.bad_weight(t.model) is not None):
            raise DivergenceError(f"{trouble}; there is no checkpoint to roll back to; {_advice(t)}") from None
        if good is not None:
            assert t.out is not None
            checkpoint.remove_newer(t.out, good.state["step"])
            t.keeper.restore(good)
            # Of the way that is lost, the rollbacks stay and nothing else.
            past = [e for e in t.events if e["event"] in stability.COUNTED or e["step"] <= t.step]
            t.events[:] = past
            t.history[:] = [record for record in t.history if record["step"] <= t.step]
        event = {
            "event": "skip" if good is None else "rollback",
            "step": trouble.step,
            "to": t.step,
            "skipped": [t.position, end],
            "until": t.step + max(1, c.warmup, trouble.step - t.step),
            "reason": str(trouble),
        }
        t.position, t.pending = end, None
        t.report(event)
        t.over = False  # where time is up, one more step ends the run as usual: evaluated and saved
        t.seconds += time.perf_counter() - start
        short = t.out_of_rows()
        if short is not None:
            t.over = True
            t.report({"event": "early_stop", "step": t.step, "reason": f"step {t.step}: {short}"})
            if t.out is not None:
                t.save(due=True)  # with the position past all rows: a resumed run has nothing left to do


def _advice(t: Trainer) -> str:
    """How to go on after trouble that no rollback ended."""
    if t.out is None or t.keeper.saved < 0:
        return f"the weights are those of step {t.step}"
    command = f"{t.resume_command} --lr {t.config.lr / 2:g}"
    return f"go on from step {t.keeper.saved} with a lower rate: {command}"
