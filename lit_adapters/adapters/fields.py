"""Read single fields of an untrusted ``adapter_config.json``, with the type checked."""

from collections.abc import Mapping
from typing import Any

_REQUIRED = object()


def read_field(
    config: Mapping[str, Any],
    key: str,
    kind: type | tuple[type, ...],
    default: Any = _REQUIRED,
) -> Any:
    """Return ``config[key]`` if it has the type ``kind``, ``default`` if it is missing or null.

    Raises:
        ValueError: if the value has another type, or is missing and has no default.
    """
    value = config.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"adapter_config.json lacks the field {key!r}")
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"adapter_config.json: {key!r} must be {expected}, got {value!r}")
    if isinstance(value, int) and abs(value) >= 2**31:
        raise ValueError(f"adapter_config.json: {key!r} is {value}; no adapter is that large")
    return value
