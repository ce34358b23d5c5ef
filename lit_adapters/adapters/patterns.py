"""Regular expressions from configs and files: checked, and never run for long."""

from functools import lru_cache

import regex

from lit_adapters.adapters.fields import shown

SECONDS = 1.0  # for one name; an ordinary pattern takes microseconds
MAX_REPEATS = 1000  # of one count; each is unrolled
_COUNT = regex.compile(r"\{[\s\d,]*?(\d+)\s*\}")
_UNBOUNDED = regex.compile(r"\(\?(?:R|&|P>|[+-]?\d)")  # calls of a group or of the whole
MAX_LENGTH = 20_000  # characters: a long list of names takes a second to compile


def check_pattern(pattern: str, field: str) -> None:
    """Refuse what is no regular expression, or one too large to be meant.

    Raises:
        ValueError: naming ``field``, the setting that holds the pattern.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(
            f"{field}={shown(pattern)} has {len(pattern)} characters, expected at most "
            f"{MAX_LENGTH}; list name endings instead"
        )
    if (odd := _UNBOUNDED.search(pattern)) or any(
        int(count) > MAX_REPEATS for count in _COUNT.findall(pattern)
    ):
        what = f"{odd[0]!r} refers to itself" if odd else f"a count above {MAX_REPEATS}"
        raise ValueError(
            f"{field}={shown(pattern)}: {what}, which can take all memory; list name endings "
            "instead"
        )
    try:
        _compiled(pattern)
    except regex.error as error:
        raise ValueError(
            f"{field}={shown(pattern)} is not a regular expression: {error}. Correct it, or list "
            "name endings"
        ) from error
    except RecursionError:
        raise ValueError(
            f"{field}={shown(pattern)} is nested too deeply for a regular expression; list name "
            "endings instead"
        ) from None


def matches(pattern: str, name: str, field: str) -> bool:
    """Return whether ``pattern`` matches the whole of ``name``.

    Raises:
        ValueError: if it takes too long, as some do whatever the engine.
    """
    try:
        return _compiled(pattern).fullmatch(name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(
            f"{field}={shown(pattern)} takes longer than {SECONDS:g} s on the name {shown(name)}; "
            "write it with fewer repetitions, or list name endings"
        ) from error


@lru_cache(maxsize=8192)  # regex's own keeps 500: a pattern per module would be compiled each time
def _compiled(pattern: str) -> "regex.Pattern[str]":
    return regex.compile(pattern)
