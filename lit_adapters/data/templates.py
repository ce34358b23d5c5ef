"""From a conversation to the text of an example.

Alpaca's template is Stanford's, https://github.com/tatsu-lab/stanford_alpaca (the prompts of its
README). The one difference: the prompt ends with a newline, so that the answer starts on its own
line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from lit_adapters.data.chat import ChatTemplate
from lit_adapters.data.examples import Conversation, Example, Span, TrainOn, Turn
from lit_adapters.data.fields import Record
from lit_adapters.data.formats import FORMATS, FormatName, Style, choose_format
from lit_adapters.data.records import Records

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_FIRST_HEADING = "### Instruction:\n"
MAX_TEXT = 100_000  # characters of a template or a task's description; real ones have thousands


@dataclass(frozen=True)
class Prompting:
    """How conversations become text.

    Args:
        template: "alpaca"; "chat" (the tokenizer's own template); "none" (prompt and answer as
            they are); a Jinja file, or its text; or "auto": the chat template, where the tokenizer
            has one, for conversations (messages, sharegpt), none for prompt_completion and text,
            and Alpaca's for everything else.
        task_prompt: A description of the task, put in front: as the system's turn of a chat, else
            as a paragraph before the prompt.
        train_on: "all" answers of a conversation, the "last", or "everything", prompts included.
    """

    template: str = "auto"
    task_prompt: str = ""
    train_on: TrainOn = "all"

    def __post_init__(self) -> None:
        if self.train_on not in get_args(TrainOn):
            raise ValueError(
                f"train_on {self.train_on!r} is unknown; use one of: {', '.join(get_args(TrainOn))}"
            )
        if max(len(self.template), len(self.task_prompt)) > MAX_TEXT:
            raise ValueError(
                f"a template of {len(self.template)} and a task_prompt of {len(self.task_prompt)} "
                f"characters: each may have {MAX_TEXT} at most"
            )
        if not (self.template in ("auto", *get_args(Style)) or self.is_file or self.is_text):
            raise ValueError(
                f"template {self.template!r} is unknown; use one of: auto, "
                f"{', '.join(get_args(Style))}, or the path of a .jinja file"
            )

    @property
    def is_text(self) -> bool:
        """Whether the template is the text of one, in Jinja."""
        return _is_jinja(self.template)

    @property
    def is_file(self) -> bool:
        """Whether the template is a file."""
        return self.template.endswith((".jinja", ".jinja2", ".j2")) and not self.is_text

    def with_text(self) -> "Prompting":
        """Return the same with the text of the file in place of its path."""
        return replace(self, template=_read(self.template)) if self.is_file else self


def alpaca_prompt(instruction: str, input: str = "") -> str:  # noqa: A002 - Alpaca's own field name
    """Return the text the model continues; an empty or blank `input` leaves its section out."""
    template = _WITH_INPUT if input.strip() else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def to_examples(
    records: Sequence[Record],
    format: FormatName = "auto",
    source: str = "",
    prompting: Prompting | None = None,
    tokenizer: Any = None,
) -> list[Example]:
    """Return what the records of one file or split mean to a model.

    Args:
        records: The records as they were read; `Records` lets errors name their places.
        format: A name in `FORMATS`, or "auto": the first whose fields the first record has.
        source: What the examples are marked with.
        prompting: How conversations become text.
        tokenizer: Whose chat template and EOS are meant; needed for conversations only.

    Raises:
        ValueError: The format is unknown, or a record does not fit it or the template; or the
            tokenizer is missing or lacks what the template needs.
    """
    if not records:
        return []
    placed = records if isinstance(records, Records) else Records(records)
    name = choose_format(placed, format, placed.place(0))
    how = prompting or Prompting()
    style, chat = _style(how, name, tokenizer)
    examples = []
    for index, record in enumerate(placed):
        try:
            for conversation in FORMATS[name].convert(record):
                if chat is not None:
                    examples += chat.examples(conversation, how.task_prompt, how.train_on, source)
                else:
                    eos = getattr(tokenizer, "eos_token", None)
                    examples.append(plain(conversation, style, how, source, eos))
        except ValueError as error:
            raise ValueError(f"{placed.place(index)}: {error} (format {name})") from error
    return examples


def style_of(how: Prompting, format: FormatName, tokenizer: Any) -> str:  # noqa: A002
    """Return the template for records of a format: what "auto" means for them."""
    if how.template != "auto":
        return how.template
    default = FORMATS[format].style
    has_none = tokenizer is not None and not getattr(tokenizer, "chat_template", None)
    return "alpaca" if default == "chat" and has_none else default


def _style(
    how: Prompting,
    format: FormatName,  # noqa: A002
    tokenizer: Any,
) -> tuple[Style, ChatTemplate | None]:
    if how.is_file:
        text, name = how.with_text().template, f"template {how.template}"
        return "chat", ChatTemplate.of_text(tokenizer, text, name)
    if how.is_text:
        return "chat", ChatTemplate.of_text(tokenizer, how.template)
    style = style_of(how, format, tokenizer)
    if style == "chat":
        return "chat", ChatTemplate(tokenizer)
    return ("alpaca" if style == "alpaca" else "none"), None


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text


def _read(file: str) -> str:
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"template {file} does not exist; give a .jinja file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"template {file} is not UTF-8 ({error})") from None
    if not _is_jinja(text):
        raise ValueError(
            f"template {file} holds no Jinja, neither {{{{ ... }}}} nor {{% ... %}}; expected a "
            "chat template, which writes the turns of `messages`"
        )
    return text


def plain(
    conversation: Conversation, style: Style, how: Prompting, source: str = "", eos: Any = None
) -> Example:
    """Render by Alpaca's template, or by none; EOS stands behind every answer.

    Raises:
        ValueError: The template has no place for a turn.
    """
    head, exchanges = _exchanges(_up_to_last_answer(conversation.turns))
    if style == "none" and len(exchanges) > 1:
        raise ValueError(
            f"{len(exchanges)} answers, and template 'none' joins one question to one answer; use "
            "template 'chat' or 'alpaca', or a .jinja file"
        )
    if len(exchanges) > 1 and not eos:
        raise ValueError(
            "a conversation of several answers needs the tokenizer's EOS between them, and there "
            "is no tokenizer, or it has none; give one"
        )
    text, spans = "".join(f"{part}\n\n" for part in (how.task_prompt, *head) if part), []
    for number, (question, answer) in enumerate(exchanges):
        text += _question(question, style, number)
        if number < len(exchanges) - 1:
            start, text = len(text), f"{text}{answer.content}{eos}"
            spans += [(start, len(text))] if answer.trained else []
    trained: tuple[Span, ...] = tuple(spans) if how.train_on == "all" else ()
    if how.train_on == "everything" and text:
        trained = ((0, len(text)),)
    return Example(text, exchanges[-1][1].content, conversation.task, source, trained)


def _up_to_last_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
    last = max(i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.trained)
    return turns[: last + 1]


def _exchanges(turns: Sequence[Turn]) -> tuple[list[str], list[tuple[list[Turn], Turn]]]:
    """Return what the system says in front, and each answer with the turns it answers."""
    head: list[str] = []
    exchanges: list[tuple[list[Turn], Turn]] = []
    asked: list[Turn] = []
    for number, turn in enumerate(turns, start=1):
        if turn.role == "system" and not asked and not exchanges:
            head.append(turn.content)
        elif turn.role == "user":
            asked.append(turn)
        elif turn.role != "assistant" or turn.more.get("tool_calls"):
            what = "a call of tools" if turn.role == "assistant" else f"the {turn.role}"
            raise ValueError(
                f"turn {number} is {what}, for which this template has no place; use the "
                "template 'chat' of a tokenizer that has one, or a .jinja file"
            )
        elif not asked and len(turns) > 1 + len(head):
            raise ValueError(f"turn {number} of the assistant answers nothing; remove it")
        else:
            exchanges.append((asked, turn))
            asked = []
    return head, exchanges


def _question(asked: Sequence[Turn], style: Style, number: int) -> str:
    if not asked:  # running text
        return ""
    content = "\n\n".join(turn.content for turn in asked)
    extra = "\n\n".join(turn.input for turn in asked if turn.input.strip())
    if style == "none":
        return f"{content}\n{extra}" if extra else content
    prompt = alpaca_prompt(content, extra)
    if number == 0:
        return prompt
    return f"\n\n{_FIRST_HEADING}{prompt.partition(_FIRST_HEADING)[2]}"
