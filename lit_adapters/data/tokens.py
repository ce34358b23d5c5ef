"""From examples to token ids and labels, with an account of what that cost."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, get_args

from lit_adapters.data.examples import Example

IGNORED = -100
"""The label of a token that is read but not trained on."""

Overlong = Literal["truncate", "truncate-prompt", "drop"]


class Tokenizer(Protocol):
    """What we ask of a Hugging Face tokenizer."""

    name_or_path: str
    eos_token_id: Any  # int | None; tokenizers resolve it dynamically

    def __call__(self, text: Any, **options: Any) -> Any:
        """Return a mapping with `input_ids`: a list of ids, or one list per text."""


class _Tokens(TypedDict):
    input_ids: list[int]
    labels: list[int]


class Tokens(_Tokens, total=False):
    """One tokenised example; both lists have the same length.

    `source` is there if there are several sources.
    """

    source: str


@dataclass(frozen=True)
class LengthReport:
    """What tokenising did to a split; lengths are in tokens, before truncation."""

    examples: int
    kept: int
    truncated: int
    dropped: int
    max_length: int
    p10: int
    p50: int
    p90: int
    longest: int
    trained_share: float
    long_prompts: int = 0

    def metrics(self) -> dict[str, float]:
        """Return what a logger takes: counts, lengths and shares."""
        shares = {
            "truncated_share": self.truncated / self.examples,
            "dropped_share": self.dropped / self.examples,
        }
        return {**asdict(self), **shares}

    def __str__(self) -> str:
        """One paragraph for a person to read before the first step."""
        prompts = (
            f"The prompt alone fills max_length in {self.long_prompts} of all. "
            if self.long_prompts
            else ""
        )
        return (
            f"{self.kept} of {self.examples} examples kept, {self.truncated} of them truncated to "
            f"{self.max_length} tokens ({self.truncated / self.examples:.1%}), {self.dropped} "
            f"dropped. {prompts}"
            f"Lengths in tokens: 10% within {self.p10}, half within {self.p50}, 90% within "
            f"{self.p90}, longest {self.longest}. "
            f"{self.trained_share:.0%} of the kept tokens are trained on."
        )


def tokenise(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_length: int = 512,
    overlong: Overlong = "truncate",
) -> tuple[list[Tokens], LengthReport]:
    """Tokenise examples; trained on are the response and the end-of-sequence token.

    `input_ids` = what the tokenizer puts before a text (usually BOS, once) + prompt + response +
    EOS. Prompt and response are tokenised apart, so that training sees the very prompt ids that
    generation starts from. EOS keeps its label even where it doubles as the padding token. A
    truncated example loses its EOS: the model must not learn to stop at the cut.

    Args:
        examples: At least one example.
        tokenizer: Must have an EOS token.
        max_length: Tokens per example, prompt included.
        overlong: What happens to longer examples. "truncate" cuts them on the right, and drops
            those that are left without a trained token: their prompt alone is too long.
            "truncate-prompt" cuts the start of the prompt, behind BOS, before any of the response.
            "drop" leaves them out.

    Raises:
        ValueError: The tokenizer has no EOS, or no example is left.
    """
    if overlong not in get_args(Overlong):
        raise ValueError(
            f"overlong {overlong!r} is unknown; use 'truncate' or 'drop', or 'truncate-prompt'"
        )
    if max_length < 2:
        raise ValueError(
            f"max_length {max_length} leaves no token to predict; give at least 2, better hundreds"
        )
    if not examples:
        raise ValueError("there are no examples to tokenise; expected at least one")
    before = leading_ids(tokenizer)
    whole = _encode(examples, tokenizer, before)
    kept, truncated = _fit(whole, max_length, overlong, before)
    report = _report(whole, kept, truncated, max_length)
    if not kept:
        cut = "let overlong='truncate-prompt' cut prompts, or " if overlong == "truncate" else ""
        raise ValueError(
            f"none of {len(whole)} examples has a trained token within max_length {max_length} "
            f"(lengths: half within {report.p50} tokens, longest {report.longest}); {cut}raise "
            "max_length" + (" or use overlong='truncate'" if overlong == "drop" else "")
        )
    return kept, report


def kept_tokens(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_length: int = 512,
    overlong: Overlong = "truncate",
) -> list[Tokens]:
    """Tokenise a part of a split as `tokenise` does; that nothing is left of it is no error."""
    before = leading_ids(tokenizer)
    return _fit(_encode(examples, tokenizer, before), max_length, overlong, before)[0]


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer puts before every text: usually BOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return full[: next(starts, 0)]


def trained_tokens(labels: Sequence[int]) -> int:
    """Count the labels a causal model is trained on; nothing predicts the first token."""
    predicted = labels[1:]
    return len(predicted) - predicted.count(IGNORED)


def prompt_ids(examples: Sequence[Example], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the prompts as training sees them: what generation must start from."""
    prompts = _prompts(examples, tokenizer, leading_ids(tokenizer))
    return [_ids_of(pieces) for pieces in prompts]


Piece = tuple[list[int], bool]  # ids, and whether they are trained on


class _Whole(NamedTuple):
    """An example before it is cut: its tokens, and how many of them are its prompt."""

    tokens: Tokens
    prompt: int


def _encode(examples: Sequence[Example], tokenizer: Tokenizer, before: list[int]) -> list[_Whole]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no EOS token, so the model would never "
            "learn to stop; set tokenizer.eos_token to a token of its vocabulary"
        )
    prompts = _prompts(examples, tokenizer, before)
    plain = [example for example in examples if example.end is None]
    answers = iter(_ids(tokenizer, [example.response for example in plain]))
    whole = []
    for example, prompt in zip(examples, prompts, strict=True):
        if example.end is None:
            pieces = [*prompt, ([*next(answers), eos], True)]
        else:
            pieces = _continued(tokenizer, example)
        labels = [token if trained else IGNORED for ids, trained in pieces for token in ids]
        tokens = Tokens(input_ids=_ids_of(pieces), labels=labels)
        if example.source:
            tokens["source"] = example.source
        whole.append(_Whole(tokens, len(_ids_of(prompt))))
    return whole


def _ids_of(pieces: Sequence[Piece]) -> list[int]:
    return [token for ids, _ in pieces for token in ids]


def _prompts(
    examples: Sequence[Example], tokenizer: Tokenizer, before: list[int]
) -> list[list[Piece]]:
    texts = iter(_ids(tokenizer, [e.prompt for e in examples if not e.trained]))
    prompts: list[list[Piece]] = []
    for example in examples:
        if example.trained:
            prompt = replace(example, response="", end=None if example.end is None else "")
            pieces = _continued(tokenizer, prompt)
        else:
            pieces = [(next(texts), False)]
        # A prompt may spell BOS out: never two of them. A chat template writes its own, or none.
        head = pieces[0][0] if pieces else []
        if example.end is None and head[: len(before)] != before:
            pieces = [(before, False), *pieces]
        prompts.append(pieces)
    return prompts


def _continued(tokenizer: Tokenizer, example: Example) -> list[Piece]:
    """Tokenise the pieces of a text so that each piece leaves the ids before it as they are.

    Where the ids of a text begin with those of its beginning, it is tokenised as one: a tokenizer
    may treat the start of a text as the start of a word. Elsewhere a token would span the border
    of what is trained, or the prompt would not be that of generation: then piece by piece.
    """
    pieces: list[Piece] = []
    text = ""
    before: list[int] = []
    for segment, trained in example.segments():
        text += segment
        (joined,) = _ids(tokenizer, [text])
        continues = joined[: len(before)] == before
        ids = joined[len(before) :] if continues else _ids(tokenizer, [segment])[0]
        before = before + ids
        pieces.append((ids, trained))
    return pieces


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: "longer than the model's maximum" is noise here, max_length comes after
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _fit(
    whole: list[_Whole], max_length: int, overlong: Overlong, before: list[int]
) -> tuple[list[Tokens], int]:
    """Return the examples that fit or were made to, and how many were truncated.

    What the tokenizer puts before a text is never cut.
    """
    kept: list[Tokens] = []
    truncated = 0
    for tokens, prompt in whole:
        ids, labels = tokens["input_ids"], tokens["labels"]
        excess = len(ids) - max_length
        too_long = excess > 0
        if too_long and overlong == "truncate-prompt":
            lead = len(before) if ids[: len(before)] == before else 0
            cut = min(excess, prompt - lead)
            ids, labels = ids[:lead] + ids[lead + cut :], labels[:lead] + labels[lead + cut :]
        ids, labels = ids[:max_length], labels[:max_length]
        if (too_long and overlong == "drop") or not trained_tokens(labels):
            continue
        fitting = tokens.copy()
        fitting["input_ids"], fitting["labels"] = ids, labels
        kept.append(fitting)
        truncated += too_long
    return kept, truncated


def _report(
    whole: list[_Whole], kept: list[Tokens], truncated: int, max_length: int
) -> LengthReport:
    lengths = sorted(len(tokens["input_ids"]) for tokens, _ in whole)
    p10, p50, p90 = (lengths[math.ceil(share * len(lengths)) - 1] for share in (0.1, 0.5, 0.9))
    total = sum(len(tokens["input_ids"]) for tokens in kept)
    trained = sum(trained_tokens(tokens["labels"]) for tokens in kept)
    return LengthReport(
        examples=len(whole),
        kept=len(kept),
        truncated=truncated,
        dropped=len(whole) - len(kept),
        max_length=max_length,
        p10=p10,
        p50=p50,
        p90=p90,
        longest=lengths[-1],
        trained_share=trained / total if total else 0.0,
        long_prompts=sum(prompt >= max_length for _, prompt in whole),
    )
