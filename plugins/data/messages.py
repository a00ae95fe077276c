"""Messages and tools as rows have them (OpenAI's form, or ShareGPT's) -> as chat templates take them."""

import json
from typing import Any

from plugins.spec import UserError
from plugins.types import Message

# What ShareGPT calls them. Its "function_call" is a turn of the assistant too: the call is the text, as JSON.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


def messages_of(found: object, field: str, *, role: str = "role", content: str = "content") -> list[Message]:
    """The messages of a row's `field`; `role` and `content` are what a message calls them.

    What else a message has goes to the template with it, but for nulls: columns of other messages leave them behind.
    Raises UserError for what is no message.
    """
    if not isinstance(found, list) or not found:
        raise UserError(f"field {field!r} must be a list of messages")
    return [_message(message, field, role, content) for message in found]


def tools_of(found: object, field: str) -> list[dict[str, Any]]:
    """The schemas of the tools in a row's `field`: a list, or JSON of one. Raises UserError for what is no tool."""
    tools = _decoded(found or [], field)
    if not isinstance(tools, list):
        raise UserError(f"field {field!r} must be a list of tools, found {tools!r}")
    return [_function(tool, field, "tool") for tool in tools]


def _message(found: object, field: str, role: str, content: str) -> Message:
    if not isinstance(found, dict) or not isinstance(speaker := found.get(role), str):
        raise UserError(f"field {field!r}: each message needs {role!r} and {content!r}, found {found!r}")
    said = found.get(content)
    extra = {key: value for key, value in found.items() if key not in (role, content) and value is not None}
    calls = _decoded(extra.pop("tool_calls", []), field) or []
    if speaker == "function_call":
        calls, said = [said], None
    if not isinstance(calls, list):
        raise UserError(f"field {field!r}: 'tool_calls' must be a list, found {calls!r}")
    if calls:
        extra["tool_calls"] = [_call(call, field) for call in calls]
        said = said or ""
    if not isinstance(said, str):
        raise UserError(f"field {field!r}: {content!r} must be text, found {said!r}")
    return Message(ROLES.get(speaker, speaker), said, extra)


def _call(found: object, field: str) -> dict[str, Any]:
    """A call as templates take it: its arguments an object, which OpenAI sends as JSON."""
    call = _function(found, field, "call")
    arguments = _decoded(call["function"].get("arguments") or {}, field)
    if not isinstance(arguments, dict):
        raise UserError(f"field {field!r}: the arguments of a call must be an object, found {arguments!r}")
    return call | {"function": call["function"] | {"arguments": arguments}}


def _function(found: object, field: str, kind: str) -> dict[str, Any]:
    """{"type": "function", "function": {...}}, also where only what is inside was written."""
    found = _decoded(found, field)
    whole = found if isinstance(found, dict) and "function" in found else {"type": "function", "function": found}
    function = whole["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"field {field!r}: a {kind} needs a name, found {found!r}")
    return whole


def _decoded(found: object, field: str) -> Any:
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found)
    except json.JSONDecodeError as error:
        wrong = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise UserError(f"field {field!r} is not JSON ({wrong}): {found[:80]!r}") from error
