"""Chat templates: which part of the text that they make is what the model should write."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_adapters.data.examples import Conversation, Example, Span, TrainOn, Turn
from lit_adapters.data.markers import has_markers, with_visible_markers, without_markers

Message = dict[str, Any]

_PROBE = "lit-adapters-probe"


@dataclass(frozen=True)
class Written:
    """A conversation up to one answer, and where in its text the model writes.

    `text[start:stop]` is the answer, `text[stop:end]` what the template ends it with.
    """

    text: str
    start: int
    stop: int
    end: int


class ChatTemplate:
    """The template of a tokenizer, or another for it.

    What is trained on is what the model would have to write: the text after the prompt for
    generation, up to and including the end-of-turn token. Where the template itself marks this by
    `{% generation %}`, its marks are taken; else each answer is rendered as the last of its
    conversation and compared with its prompt. Some templates write earlier turns differently once
    later ones follow (Qwen3 leaves out their reasoning). Such a conversation becomes several
    examples, so that every answer is trained on in the very text in which it would be written.

    Args:
        tokenizer: Of the transformers library.
        template: Jinja text; None takes the tokenizer's own.

    Raises:
        ValueError: There is no tokenizer, or it has no template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if tokenizer is None:
            raise ValueError("a chat template needs a tokenizer, and there is none; give one")
        if template is None and not tokenizer.chat_template:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; use template 'alpaca' "
                "or a .jinja file, or the tokenizer of the instruction-tuned model"
            )
        self.tokenizer = tokenizer
        own: str = tokenizer.get_chat_template() if template is None else template
        self.marked = has_markers(own)
        self.template = with_visible_markers(own)
        special = _one_of(tokenizer.all_special_tokens)
        either = _one_of([*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens])
        self._special = re.compile(special)
        self._token = re.compile(either)
        self._ending = re.compile(rf"(?:\s*(?:{either}))+\Z")
        self._said: set[str] = set()
        self._takes_system: bool | None = None

    @classmethod
    def of_text(cls, tokenizer: Any, text: str, name: str = "the template") -> "ChatTemplate":
        """Take a Jinja text; it runs in a sandbox, without access to anything but the record.

        Raises:
            ValueError: It is no Jinja, as an error that calls it ``name``; or as above.
        """
        found = cls(tokenizer, text)
        try:
            found.render([{"role": "user", "content": "a"}], prompt=True)
        except ValueError as error:
            line = getattr(error.__cause__, "lineno", None)
            if line is not None:  # of Jinja's syntax errors; others are those of the probe
                message = f"{name}, line {line}: {error.__cause__}; correct it"
                raise ValueError(message) from error
        return found

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), prompt: bool = False
    ) -> str:
        """Return the text of messages; with `prompt`, ready for the next answer."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    chat_template=self.template,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            )
        except Exception as error:  # whatever a template raises, it cannot take this conversation
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def examples(
        self,
        conversation: Conversation,
        task_prompt: str = "",
        train_on: TrainOn = "all",
        source: str = "",
    ) -> list[Example]:
        """Return the example of a conversation, or several where the template rewrites it.

        Raises:
            ValueError: The template refuses it, leaves something out, or writes an answer in a
                way that cannot be told from its prompt.
        """
        if all(turn.role == "assistant" for turn in conversation.turns):
            raise ValueError("running text is no chat; use template 'none'")
        trained = [
            number
            for number, turn in enumerate(conversation.turns)
            if turn.role == "assistant" and turn.trained
        ]
        turns = conversation.turns[: trained[-1] + 1]
        messages = self._messages(turns, task_prompt)
        shift = len(messages) - len(turns)  # a system turn came in front, or went into the next
        answers = [number + shift for number in trained]
        if train_on != "all":
            answers = answers[-1:]
        find = self._marked_texts if self.marked else self._texts
        texts = find(messages, answers, conversation.tools)
        self._check_complete(messages, texts[-1][0].text)
        return [
            self._example(whole, spans, train_on, conversation.task, source)
            for whole, spans in texts
        ]

    # --- messages --------------------------------------------------------------------------------

    def _messages(self, turns: Sequence[Turn], task_prompt: str) -> list[Message]:
        messages = [
            {
                **turn.more,
                "role": turn.role,
                "content": f"{turn.content}\n\n{turn.input}" if turn.input else turn.content,
            }
            for turn in turns
        ]
        if task_prompt:
            own = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
            content = f"{task_prompt}\n\n{own}" if own else task_prompt
            messages.insert(0, {"role": "system", "content": content})
        if messages[0]["role"] == "system" and not self.takes_system:
            system, first = messages[:2]
            if first["role"] != "user":
                raise ValueError("the chat template has no system turn, nor a user's to put it in")
            self._say("the chat template has no system turn: its text goes before the first user's")
            merged = {**first, "content": f"{system['content']}\n\n{first['content']}"}
            messages[:2] = [merged]
        return messages

    @property
    def takes_system(self) -> bool:
        """Whether the template writes what the system says."""
        if self._takes_system is None:
            probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "a"}]
            try:
                self._takes_system = _PROBE in self.render(probe, prompt=True)
            except ValueError:
                self._takes_system = False
        return self._takes_system

    def _check_complete(self, messages: Sequence[Message], text: str) -> None:
        for number, message in enumerate(messages, start=1):
            if spelt := self._special.search(str(message["content"])):
                self._say(
                    f"turn {number} ({message['role']}) spells the special token {spelt[0]!r} in "
                    "its text, and the model reads it as that token; there may be more such turns"
                )
            said = message["role"] in ("system", "user")
            if said and message["content"].strip() not in text:
                raise ValueError(
                    f"the chat template leaves out turn {number} ({message['role']}) or rewrites "
                    "it; use another template"
                )

    # --- where the model writes ------------------------------------------------------------------

    def _texts(
        self, messages: Sequence[Message], answers: Sequence[int], tools: Sequence[Any]
    ) -> list[tuple[Written, list[Span]]]:
        """Return texts, each with its last answer and the spans of the earlier ones in it."""
        left = [self._written(messages[: number + 1], tools) for number in answers]
        texts = []
        while left:
            whole = left.pop()
            places = [(one, self._place(one, whole.text)) for one in left]
            texts.append((whole, [place for _, place in places if place is not None]))
            left = [one for one, place in places if place is None]
            if left:
                self._say(
                    "the chat template writes an earlier answer otherwise than it writes the last; "
                    "such conversations become several examples"
                )
        return texts[::-1]

    def _written(self, messages: Sequence[Message], tools: Sequence[Any]) -> Written:
        answer = messages[-1]
        text = self.render(messages, tools)
        start = self._start(messages, tools, text)
        content = str(answer["content"])
        ending = self._ending.search(text.rstrip(), start)
        if ending is not None:
            stop, end = ending.start(), ending.end()
        else:
            at = text.rfind(content, start) if content else -1
            stop = end = at + len(content) if at >= 0 else max(start, len(text.rstrip()))
        visible = content.rpartition("</think>")[2].strip()
        if visible not in text[start:end]:
            raise ValueError(
                f"the chat template does not write the answer of turn {len(messages)} as it is, "
                "so that what to train on is unknown; mark it by {% generation %} in the template"
            )
        return Written(text, start, stop, end)

    def _start(self, messages: Sequence[Message], tools: Sequence[Any], text: str) -> int:
        """Return where in `text` the last message is written, behind its prompt."""
        before = messages[:-1]
        prompt = self.render(before, tools, prompt=True)
        prompted = text.startswith(prompt)
        if prompted and prompt != self.render(before, tools):
            return len(prompt)
        # No prompt of its own: what the template writes before any answer must be read, not written
        probe = self.render([*before, {**messages[-1], "content": _PROBE}], tools)
        head = probe.partition(_PROBE)[0]
        if not text.startswith(head):
            raise ValueError(
                f"the chat template writes turn {len(messages)} in a way that cannot be told from "
                "its prompt; mark answers by {% generation %} in the template"
            )
        if not prompted:
            self._say(
                f"the chat template prompts for an answer by {prompt[-40:]!r} but writes answers "
                f"after {head[-40:]!r}; the latter is trained"
            )
            return len(head)
        return len(prompt) if head[len(prompt) :].isspace() else max(len(head), len(prompt))

    def _place(self, one: Written, text: str) -> Span | None:
        """Return where `text` repeats an answer with its end of turn, if it does."""
        if not text.startswith(one.text[: one.stop]):
            return None
        ends = [match.end() for match in self._token.finditer(one.text, one.stop, one.end)]
        for end in reversed(ends):
            if text.startswith(one.text[one.stop : end], one.stop):
                return one.start, end
        return None

    def _marked_texts(
        self, messages: Sequence[Message], answers: Sequence[int], tools: Sequence[Any]
    ) -> list[tuple[Written, list[Span]]]:
        """Return the one text and its spans, as the template's own markers say."""
        text, spans = without_markers(self.render(messages, tools))
        said = [number for number, m in enumerate(messages) if m["role"] == "assistant"]
        if len(spans) != len(said):
            raise ValueError(
                f"the chat template marks {len(spans)} texts by {{% generation %}}, for "
                f"{len(said)} turns of the assistant; correct its markers"
            )
        chosen = [self._closed(text, spans[said.index(number)]) for number in answers]
        start, end = chosen[-1]
        ending = self._ending.search(text[:end].rstrip(), start)
        stop = ending.start() if ending is not None else end
        return [(Written(text, start, stop, end), chosen[:-1])]

    def _closed(self, text: str, span: Span) -> Span:
        """Let a marked text end with the end-of-turn token that follows it."""
        start, end = span
        if self._ending.search(text[start:end].rstrip()):
            return span
        following = self._token.match(text, end)
        return (start, following.end()) if following else span

    # --- the outcome -----------------------------------------------------------------------------

    def _example(
        self, whole: Written, spans: list[Span], train_on: TrainOn, task: str, source: str
    ) -> Example:
        end = whole.text[whole.stop : whole.end]
        if not self._token.search(end):
            self._say("the chat template ends answers by no special token; EOS is put behind them")
            end += self.tokenizer.eos_token or ""
        prompt = whole.text[: whole.start]
        trained = ((0, len(prompt)),) if train_on == "everything" else tuple(spans)
        return Example(prompt, whole.text[whole.start : whole.stop], task, source, trained, end)

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)


def _one_of(tokens: Sequence[str]) -> str:
    """Return the pattern of any of these tokens, those of white space left out."""
    longest_first = sorted({t for t in tokens if t.strip()}, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or r"(?!)"
