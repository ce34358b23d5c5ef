"""Read single fields of an untrusted ``adapter_config.json``, with the type checked."""

import reprlib
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 10_000  # characters: a regular expression with all its alternatives
MAX_ENTRIES = 50_000  # of a list of names: more than any model has modules
MAX_PATTERNS = 4_096  # of a table of patterns, each of which is tried on every module

_REQUIRED = object()


def shown(value: Any) -> str:
    """Return ``repr(value)``, cut where it is long: a file may put megabytes into a message."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 200
    brief.maxlong = 40
    return brief.repr(value)


def read_field(
    config: Mapping[str, Any],
    key: str,
    kind: type | tuple[type, ...],
    default: Any = _REQUIRED,
) -> Any:
    """Return ``config[key]`` if it has the type ``kind``, ``default`` if it is missing or null.

    Raises:
        ValueError: if the value has another type, is larger than any adapter needs, or is missing
            and has no default.
    """
    value = config.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(
                f"the field {key!r} is missing; save or download the adapter again, or add it"
            )
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(k.__name__ for k in kinds)
        raise ValueError(
            f"{key!r} must be {expected}, got {shown(value)}; correct the field, or save or "
            "download the adapter again"
        )
    _check_size(key, value)
    return value


def _check_size(key: str, value: Any) -> None:
    if isinstance(value, int) and abs(value) >= 2**31:
        raise ValueError(f"{key!r} is {shown(value)}; no adapter is that large")
    limits = {"str": MAX_TEXT, "list": MAX_ENTRIES, "dict": MAX_PATTERNS}
    limit = limits.get(type(value).__name__)
    if limit is not None and len(value) > limit:
        unit = "characters" if isinstance(value, str) else "entries"
        raise ValueError(
            f"{key!r} has {len(value)} {unit}, expected at most {limit}; shorten it, for instance "
            "to name endings"
        )
    entries = [*value, *value.values()] if isinstance(value, dict) else value
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, str) and len(entry) > MAX_TEXT:
            raise ValueError(
                f"{key!r} has an entry of {len(entry)} characters, {shown(entry)}; no module has "
                "such a name. Save or download the adapter again"
            )
