"""From examples to token ids and labels, with an account of what that cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict, get_args

from lit_adapters.data.formats import Example

IGNORED = -100
"""The label of a token that is read but not trained on."""

Overlong = Literal["truncate", "truncate-prompt", "drop"]


class Tokenizer(Protocol):
    """What we ask of a Hugging Face tokenizer."""

    name_or_path: str
    eos_token_id: Any  # int | None; tokenizers resolve it dynamically

    def __call__(self, text: Any, **options: Any) -> Any:
        """Return a mapping with `input_ids`: a list of ids, or one list per text."""


class Tokens(TypedDict):
    """One tokenised example; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]


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

    def __str__(self) -> str:
        """One paragraph for a person to read before the first step."""
        prompts = (
            f"The prompt alone fills max_length in {self.long_prompts} of all. "
            if self.long_prompts
            else ""
        )
        return (
            f"{self.kept} of {self.examples} examples kept, {self.truncated} of them truncated to "
            f"{self.max_length} tokens, {self.dropped} dropped. {prompts}"
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
    kept, truncated = _fit(whole, max_length, overlong, len(before))
    report = _report(whole, kept, truncated, max_length)
    if not kept:
        cut = "let overlong='truncate-prompt' cut prompts, or " if overlong == "truncate" else ""
        raise ValueError(
            f"none of {len(whole)} examples has a trained token within max_length {max_length} "
            f"(lengths: half within {report.p50} tokens, longest {report.longest}); {cut}raise "
            "max_length" + (" or use overlong='truncate'" if overlong == "drop" else "")
        )
    return kept, report


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer puts before every text: usually BOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return full[: next(starts, 0)]


def trained_tokens(labels: Sequence[int]) -> int:
    """Count the labels a causal model is trained on; nothing predicts the first token."""
    return sum(label != IGNORED for label in labels[1:])


def _encode(examples: Sequence[Example], tokenizer: Tokenizer, before: list[int]) -> list[Tokens]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no EOS token, so the model would never "
            "learn to stop; set tokenizer.eos_token to a token of its vocabulary"
        )
    # verbose=False: "longer than the model's maximum" is noise here, max_length comes after
    options = {"add_special_tokens": False, "verbose": False}
    prompts = tokenizer([example.prompt for example in examples], **options)["input_ids"]
    responses = tokenizer([example.response for example in examples], **options)["input_ids"]
    return [
        _join(before, prompt, [*response, eos])
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _join(before: list[int], prompt: list[int], response: list[int]) -> Tokens:
    if prompt[: len(before)] != before:  # a prompt may spell BOS out: never two of them
        prompt = before + prompt
    return Tokens(input_ids=prompt + response, labels=[IGNORED] * len(prompt) + response)


def _fit(
    whole: list[Tokens], max_length: int, overlong: Overlong, lead: int
) -> tuple[list[Tokens], int]:
    """Return the examples that fit or were made to, and how many were truncated.

    `lead` tokens at the start of a prompt are never cut.
    """
    kept, truncated = [], 0
    for tokens in whole:
        ids, labels = tokens["input_ids"], tokens["labels"]
        excess = len(ids) - max_length
        too_long = excess > 0
        if too_long and overlong == "truncate-prompt":
            cut = min(excess, _prompt_tokens(tokens) - lead)
            ids, labels = ids[:lead] + ids[lead + cut :], labels[:lead] + labels[lead + cut :]
        ids, labels = ids[:max_length], labels[:max_length]
        if (too_long and overlong == "drop") or not trained_tokens(labels):
            continue
        kept.append(Tokens(input_ids=ids, labels=labels))
        truncated += too_long
    return kept, truncated


def _prompt_tokens(tokens: Tokens) -> int:
    return tokens["labels"].count(IGNORED)


def _report(
    whole: list[Tokens], kept: list[Tokens], truncated: int, max_length: int
) -> LengthReport:
    lengths = sorted(len(tokens["input_ids"]) for tokens in whole)
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
        long_prompts=sum(_prompt_tokens(tokens) >= max_length for tokens in whole),
    )
