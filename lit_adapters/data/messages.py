"""Conversations: lists of turns with `role` and `content`, or `from` and `value`."""

import json
from collections.abc import Mapping
from typing import Any

from lit_adapters.data.examples import Conversation, Role, Turn
from lit_adapters.data.fields import Record, names_of, text_of, whole

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_KEYS = (("role", "content"), ("from", "value"))
_OWN = {"role", "content", "from", "value", "weight"}


def conversation(record: Record, field: str) -> Conversation:
    """Read the turns of `field`, in either spelling, and what stands beside them.

    A `system` field is the first turn, `tools` are for the chat template. A turn of the assistant
    with `weight` 0 is read and not trained on. Content in parts is joined if all are text.

    Raises:
        ValueError: A turn is none, its role is unknown, its content is no text, or the assistant
            says nothing that could be trained on.
    """
    value = record.get(field)
    if not isinstance(value, list) or not value:
        found = "empty" if isinstance(value, list) else type(value).__name__
        what = found if field in record else "missing"
        raise ValueError(
            f"field {field!r} is {what}, expected a list of turns; found {names_of(record)}"
        )
    turns = [_turn(item, f"turn {number}") for number, item in enumerate(value, start=1)]
    if system := text_of(record, "system", optional=True):
        turns.insert(0, Turn("system", system))
    if not any(turn.role == "assistant" and turn.trained for turn in turns):
        raise ValueError(
            f"no turn of the assistant to train on (roles: {', '.join(t.role for t in turns)}); "
            "add the answer, or remove the record"
        )
    return Conversation(tuple(turns), text_of(record, "task", optional=True), _tools(record))


def _turn(item: Any, place: str) -> Turn:
    if not isinstance(item, Mapping):
        raise ValueError(
            f"{place} is {type(item).__name__}, expected an object with role and content"
        )
    keys = next((pair for pair in _KEYS if pair[0] in item), None)
    if keys is None:
        raise ValueError(
            f"{place} has neither 'role' nor 'from' (found {names_of(item)}); say who speaks"
        )
    said = item[keys[0]]
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise ValueError(f"{place} has the unknown role {said!r}; use one of: {', '.join(ROLES)}")
    more = {key: value for key, value in item.items() if key not in _OWN and value is not None}
    content = item.get(keys[1])
    if content is None and more.get("tool_calls"):
        content = ""
    return Turn(
        role,
        _content(content, f"{place} ({said}): {keys[1]!r}"),
        trained=_weight(item, place) > 0,
        more=more,
    )


def _weight(item: Mapping[str, Any], place: str) -> int:
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"{place} has weight {weight!r}; use 0 (not trained on) or 1")
    return 1 if weight is None else int(weight)


def _content(value: Any, what: str) -> str:
    if isinstance(value, list):
        parts: list[Any] = [p.get("text") if isinstance(p, Mapping) else p for p in value]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{what} has parts that are no text (images?); only text is trained")
        value = "".join(parts)
    if not isinstance(value, str):
        kind = "missing" if value is None else type(value).__name__
        raise ValueError(f"{what} is {kind}, expected text; write the value as a string")
    return whole(value, what)


def _tools(record: Record) -> tuple[Any, ...]:
    tools = record.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError("field 'tools' is no JSON list; correct it") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("field 'tools' is no list of objects (JSON schemas); correct it")
    return tuple(tools)
