"""From a record, as its file has it, to a prompt and a response.

A new format is one function from record to `Example` and one line in `FORMATS`.
"""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from lit_adapters.data.templates import alpaca_prompt

Record = Mapping[str, Any]
FormatName = Literal["auto", "alpaca", "question-answer", "prompt-completion"]


@dataclass(frozen=True)
class Example:
    """What the model reads (`prompt`) and what it learns to answer (`response`)."""

    prompt: str
    response: str
    task: str = ""


def alpaca(record: Record) -> Example:
    """Alpaca: `instruction`, `output`, and where present `input` and `task`."""
    prompt = alpaca_prompt(_text(record, "instruction"), _text(record, "input", optional=True))
    return Example(prompt, _text(record, "output"), _text(record, "task", optional=True))


def question_answer(record: Record) -> Example:
    """GSM8K and its like: the question becomes an Alpaca instruction without input."""
    prompt = alpaca_prompt(_text(record, "question"))
    return Example(prompt, _text(record, "answer"), _text(record, "task", optional=True))


def prompt_completion(record: Record) -> Example:
    """Text pairs, taken literally: no template is put around the prompt."""
    prompt, completion = _text(record, "prompt"), _text(record, "completion")
    return Example(prompt, completion, _text(record, "task", optional=True))


# Name -> (the fields by which "auto" knows the format, the function). "auto" takes the first match.
FORMATS: Mapping[str, tuple[tuple[str, ...], Callable[[Record], Example]]] = {
    "alpaca": (("instruction", "output"), alpaca),
    "question-answer": (("question", "answer"), question_answer),
    "prompt-completion": (("prompt", "completion"), prompt_completion),
}


def to_examples(
    records: Sequence[Record], format: FormatName = "auto", source: str = "the data"
) -> list[Example]:
    """Format every record of a split.

    Args:
        records: The records as they were read.
        format: A name in `FORMATS`, or "auto": the first whose fields the first record has.
        source: What error messages call the data, such as a file name.

    Raises:
        ValueError: The format is unknown, or a record lacks a field or holds no text in it.
    """
    if not records:
        return []
    name = detect_format(records[0], source) if format == "auto" else format
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is unknown; use one of: auto, {', '.join(FORMATS)}")
    convert = FORMATS[name][1]
    examples = []
    for number, record in enumerate(records, start=1):
        try:
            examples.append(convert(record))
        except ValueError as error:
            raise ValueError(f"{source}, record {number}: {error} (format {name})") from None
    return examples


def detect_format(record: Record, source: str = "the data") -> str:
    """Name the first format whose fields `record` has."""
    for name, (fields, _) in FORMATS.items():
        if all(field in record for field in fields):
            return name
    known = "; ".join(f"{name}: {' + '.join(fields)}" for name, (fields, _) in FORMATS.items())
    raise ValueError(
        f"{source}: no known format has the fields of record 1 ({_fields(record)}); "
        f"rename them to one of these pairs ({known})"
    )


def _text(record: Record, field: str, optional: bool = False) -> str:
    value = record.get(field)
    if value is None and optional:
        return ""
    if field not in record:
        raise ValueError(f"field {field!r} is missing; found {_fields(record)}; add the field")
    if not isinstance(value, str):
        raise ValueError(
            f"field {field!r} is {type(value).__name__}, expected text; "
            f"found {_fields(record)}; write the value as a string"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half an emoji: tokenizers refuse it without a position
        raise ValueError(
            f"field {field!r} holds half a surrogate pair at character {error.start}; remove it"
        ) from None
    return value


def _fields(record: Record) -> str:
    names = [reprlib.repr(name) for name in islice(record, 10)]
    more = f" and {len(record) - 10} more" if len(record) > 10 else ""
    return (", ".join(names) or "no fields") + more
