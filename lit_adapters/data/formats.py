"""From a record, as its file has it, to a conversation.

A new format is one function from record to conversations and one line in `FORMATS`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lit_adapters.data.examples import Conversation, Turn
from lit_adapters.data.fields import Record, names_of, text_of
from lit_adapters.data.messages import conversation

FormatName = Literal[
    "auto",
    "alpaca",
    "dolly",
    "self_instruct",
    "question_answer",
    "prompt_completion",
    "messages",
    "sharegpt",
    "text",
]
Style = Literal["alpaca", "chat", "none"]


def alpaca(record: Record) -> list[Conversation]:
    """Alpaca: `instruction`, `output`; where present `input`, `system`, `history`, `task`."""
    return [_exchange(record, "instruction", "input", "output")]


def dolly(record: Record) -> list[Conversation]:
    """Dolly: `instruction`, `response`, and where present `context`."""
    return [_exchange(record, "instruction", "context", "response")]


def question_answer(record: Record) -> list[Conversation]:
    """GSM8K and its like: the question is an instruction without input."""
    return [_exchange(record, "question", None, "answer")]


def prompt_completion(record: Record) -> list[Conversation]:
    """Text pairs, taken literally: no template is put around the prompt."""
    return [_exchange(record, "prompt", None, "completion")]


def text(record: Record) -> list[Conversation]:
    """Running text, of which every token is trained on."""
    answer = Turn("assistant", text_of(record, "text"))
    return [Conversation((answer,), text_of(record, "task", optional=True))]


def self_instruct(record: Record) -> list[Conversation]:
    """Self-Instruct: an `instruction` and its `instances`, each an `input` and an `output`."""
    instances = record.get("instances")
    if not isinstance(instances, list) or not instances:
        raise ValueError(
            f"field 'instances' is {type(instances).__name__}, expected a list of objects with "
            "'input' and 'output'"
        )
    found = []
    for number, instance in enumerate(instances, start=1):
        if not isinstance(instance, Mapping):
            raise ValueError(f"instance {number} is {type(instance).__name__}, expected an object")
        found += alpaca({**instance, "instruction": record.get("instruction")})
    return found


def messages(record: Record) -> list[Conversation]:
    """A list `messages` of turns, each `role` and `content`."""
    return [conversation(record, "messages")]


def sharegpt(record: Record) -> list[Conversation]:
    """A list `conversations` of turns, each `from` and `value`."""
    return [conversation(record, "conversations")]


class Format(NamedTuple):
    """How a kind of record is known and read, and the template it gets by default."""

    fields: tuple[str, ...]
    convert: Callable[[Record], list[Conversation]]
    style: Style


# "auto" takes the first whose fields the first record has.
FORMATS: Mapping[FormatName, Format] = {
    "alpaca": Format(("instruction", "output"), alpaca, "alpaca"),
    "dolly": Format(("instruction", "response"), dolly, "alpaca"),
    "self_instruct": Format(("instruction", "instances"), self_instruct, "alpaca"),
    "question_answer": Format(("question", "answer"), question_answer, "alpaca"),
    "prompt_completion": Format(("prompt", "completion"), prompt_completion, "none"),
    "messages": Format(("messages",), messages, "chat"),
    "sharegpt": Format(("conversations",), sharegpt, "chat"),
    "text": Format(("text",), text, "none"),
}


def choose_format(
    records: Sequence[Record], format: FormatName = "auto", place: str = "record 1"
) -> FormatName:
    """Return `format`, or for "auto" the first in `FORMATS` whose fields the first record has.

    Raises:
        ValueError: The format is unknown, or none fits.
    """
    if format != "auto":
        if format not in FORMATS:
            known = ", ".join(("auto", *FORMATS))
            raise ValueError(f"format {format!r} is unknown; use one of: {known}")
        return format
    first = records[0]
    for name, one in FORMATS.items():
        if all(field in first for field in one.fields):
            return name
    kinds = "; ".join(f"{name}: {' + '.join(one.fields)}" for name, one in FORMATS.items())
    raise ValueError(
        f"{place}: no known format has the fields of this record ({names_of(first)}); "
        f"rename them to those of one format ({kinds})"
    )


def why(format: FormatName) -> str:
    """Say by what "auto" knows a format."""
    return "the first record has " + " and ".join(map(repr, FORMATS[format].fields))


def _exchange(record: Record, question: str, more: str | None, answer: str) -> Conversation:
    turns = []
    if system := text_of(record, "system", optional=True):
        turns.append(Turn("system", system))
    for asked, said in _history(record):
        turns += [Turn("user", asked), Turn("assistant", said)]
    extra = text_of(record, more, optional=True) if more else ""
    turns.append(Turn("user", text_of(record, question), extra))
    turns.append(Turn("assistant", text_of(record, answer)))
    return Conversation(tuple(turns), text_of(record, "task", optional=True))


def _history(record: Record) -> list[tuple[str, str]]:
    """Earlier questions and answers, as some Alpaca files have them: a list of pairs."""
    value: Any = record.get("history") or []
    pairs = [tuple(pair) for pair in value] if isinstance(value, list | tuple) else None
    if pairs is None or not all(len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        raise ValueError("field 'history' is no list of [question, answer] texts; correct it")
    return pairs
