"""The messages of a chat request, as templates read them.

Roles and contents are those of the OpenAI API reference ("Create chat completion", messages). The role developer is its
newer name of system. Tools, images and sound, which no model here knows, are refused.
"""

from __future__ import annotations

from bitnet.chat_template import Message
from bitnet.server.fields import UNSUPPORTED, Fields, checked_text, refusal, shown

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def messages(value: object) -> tuple[Message, ...]:
    """The field "messages". ApiError for what is no conversation of texts."""
    if not isinstance(value, list) or not value:
        raise refusal("messages", f"must be a list of messages, at least one, not {shown(value)}")
    return tuple(_message(Fields(message, f"messages[{at}]")) for at, message in enumerate(value))


def _message(fields: Fields) -> Message:
    """A message; its name is ignored, since no template here has a place for it."""
    role = fields.get("role")
    if role in ("tool", "function"):
        raise fields.refusal("role", f"is not supported by this server when it is {shown(role)}", UNSUPPORTED)
    if not isinstance(role, str) or role not in ROLES:
        raise fields.refusal("role", f"must be one of {', '.join(ROLES)}, not {shown(role)}")
    fields.neutral("tool_calls", [])
    for name in ("function_call", "audio", "refusal"):
        fields.neutral(name)
    content = fields.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        return Message(ROLES[role], _joined(content, fields.path("content")))
    return Message(ROLES[role], checked_text(content, fields.path("content")))


def _joined(parts: list[object], name: str) -> str:
    """Text of the parts of one message, one behind the other."""
    if not parts:
        raise refusal(name, "must not be an empty list")
    texts = []
    for at, part in enumerate(parts):
        fields = Fields(part, f"{name}[{at}]")
        kind = checked_text(fields.get("type"), fields.path("type"))
        if kind != "text":
            raise fields.refusal(
                "type", f'is not supported by this server unless it is "text", not {shown(kind)}', UNSUPPORTED
            )
        texts.append(checked_text(fields.get("text"), fields.path("text")))
    return "".join(texts)
