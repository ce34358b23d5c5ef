"""From the bytes of a file to its text, which must be UTF-8; what else it may be is guessed."""

from pathlib import Path

_PROBE = 4096  # bytes that are looked at to name an encoding
_UTF16 = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def decode(file: Path, data: bytes) -> str:
    """Return the text of `file`, less a byte-order mark, which Windows editors add.

    Raises:
        ValueError: It is not UTF-8, or holds zero bytes, which no JSON text does.
    """
    position = data.find(b"\0")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = error.start
    else:
        if position < 0:
            return text
    line = data.count(b"\n", 0, position) + 1
    raise ValueError(f"{file} is not UTF-8 (byte {position}){_remedy(data[:_PROBE], line)}")


def _remedy(start: bytes, line: int) -> str:
    encoding = _UTF16.get(start[:2]) or _wide(start)
    if encoding:
        return f" but looks like UTF-16; convert it with: iconv -f {encoding} -t utf-8"
    control = sum(byte < 9 or 13 < byte < 32 for byte in start)
    if control:
        return (
            " but looks like a binary file (compressed data, a picture, a model?); give a .json or "
            ".jsonl text"
        )
    return f"; convert it, for instance with: iconv -f latin1 -t utf-8, or correct line {line}"


def _wide(start: bytes) -> str | None:
    """Tell UTF-16 without a byte-order mark by its zeros: every second byte of plain English."""
    for offset, encoding in enumerate(("utf-16be", "utf-16le")):
        high, low = start[offset::2], start[1 - offset :: 2]
        if high and high.count(0) > len(high) // 2 and low.count(0) <= len(low) // 20:
            return encoding
    return None
