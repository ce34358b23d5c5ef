"""Texts out of a record's fields."""

import reprlib
from collections.abc import Mapping
from itertools import islice
from typing import Any

Record = Mapping[str, Any]


def text_of(record: Record, field: str, optional: bool = False) -> str:
    """Return the text of a field.

    Raises:
        ValueError: It is missing, holds no text, or text that no tokenizer takes.
    """
    value = record.get(field)
    if value is None and optional:
        return ""
    if field not in record:
        raise ValueError(f"field {field!r} is missing; found {names_of(record)}; add the field")
    if not isinstance(value, str):
        raise ValueError(
            f"field {field!r} is {type(value).__name__}, expected text; "
            f"found {names_of(record)}; write the value as a string"
        )
    return whole(value, f"field {field!r}")


def whole(text: str, what: str) -> str:
    """Return `text` if it is Unicode without half an emoji, of which tokenizers say no position."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half a surrogate pair at character {error.start}; remove it"
        ) from None
    return text


def names_of(record: Record) -> str:
    """List a record's fields, the first ten of them."""
    names = [reprlib.repr(name) for name in islice(record, 10)]
    more = f" and {len(record) - 10} more" if len(record) > 10 else ""
    return (", ".join(names) or "no fields") + more
