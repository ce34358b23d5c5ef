"""Regular expressions from configs and files: checked, and never run for long."""

import regex

SECONDS = 1.0  # for one name; an ordinary pattern takes microseconds


def check_pattern(pattern: str, field: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        ValueError: naming ``field``, the setting that holds the pattern.
    """
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{field}={pattern!r} is not a regular expression: {error}") from error


def matches(pattern: str, name: str, field: str) -> bool:
    """Return whether ``pattern`` matches the whole of ``name``.

    Raises:
        ValueError: if it takes too long, as some do whatever the engine.
    """
    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(
            f"{field}={pattern!r} takes longer than {SECONDS:g} s on the name {name!r}; write it "
            "with fewer repetitions, or list name endings"
        ) from error
