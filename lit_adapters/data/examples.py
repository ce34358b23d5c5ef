"""What a record means (`Conversation`), and what a model reads and learns to write (`Example`)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
TrainOn = Literal["all", "last", "everything"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Args:
        role: Who says it.
        content: Its text.
        input: Alpaca's further input, which its template puts under a heading of its own.
        trained: Whether a turn of the assistant may be trained on.
        more: Other fields of the message, such as `tool_calls`; a chat template may use them.
    """

    role: Role
    content: str
    input: str = ""
    trained: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """A record of any format, before a template makes one text of it; it holds an answer."""

    turns: tuple[Turn, ...]
    task: str = ""
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Example:
    """What the model reads (`prompt`) and what it learns to answer (`response`).

    Args:
        prompt: Everything before the last answer, earlier answers included.
        response: The last answer.
        task: What metrics are grouped by, if a record says.
        source: Where it comes from, if there are several sources.
        trained: Parts of the prompt, (start, end) in characters, that are trained on too.
        end: What a chat template writes behind the answer, and the model learns to write. None
            for plain text, which stands between the tokenizer's own BOS and EOS; text with an
            `end` has its special tokens spelled out, and gets no others.
    """

    prompt: str
    response: str
    task: str = ""
    source: str = ""
    trained: tuple[Span, ...] = ()
    end: str | None = None

    def segments(self) -> Iterator[tuple[str, bool]]:
        """Yield the whole text in pieces, and whether each is trained on; none is empty."""
        at = 0
        for start, stop in self.trained:
            yield from _piece(self.prompt[at:start], False)
            yield from _piece(self.prompt[start:stop], True)
            at = stop
        yield from _piece(self.prompt[at:], False)
        yield from _piece(self.response + (self.end or ""), True)


def _piece(text: str, trained: bool) -> Iterator[tuple[str, bool]]:
    if text:
        yield text, trained
