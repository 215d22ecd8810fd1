"""What an engine does, in the text format that Prometheus reads."""

from __future__ import annotations

from bitnet.server.engine import Engine

FAMILIES = (
    ("bitnet_requests_total", "counter", "sequences that joined"),
    ("bitnet_prompt_tokens_total", "counter", "tokens of their prompts"),
    ("bitnet_prompt_tokens_reused_total", "counter", "of these, held by the cache already"),
    ("bitnet_generated_tokens_total", "counter", "tokens drawn"),
    ("bitnet_steps_total", "counter", "passes of the model"),
    ("bitnet_busy_seconds_total", "counter", "seconds in them"),
    ("bitnet_running", "gauge", "sequences that are decoded now"),
    ("bitnet_waiting", "gauge", "sequences that wait for a slot"),
    ("bitnet_slots", "gauge", "sequences that can be decoded at once"),
)


def exposition(engine: Engine) -> str:
    """All families with their present values. Source: Prometheus, "Exposition formats", text format 0.0.4."""
    c = engine.counters
    values = (
        c.requests, c.prompt_tokens, c.reused_tokens, c.drawn_tokens, c.steps, round(c.busy_seconds, 6),
        engine.running, engine.waiting, engine.slots,
    )  # fmt: skip
    lines = []
    for (name, kind, about), value in zip(FAMILIES, values, strict=True):
        lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", f"{name} {value}"]
    return "\n".join(lines) + "\n"
