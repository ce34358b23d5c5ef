"""BLEU as sacrebleu computes it."""

from collections.abc import Sequence
from typing import Any

import regex

from lit_adapters.metrics.base import Answer, TextMetric

ORDER = 4
_HAN = regex.compile(r"\p{Han}")
_OTHER_UNSPACED = regex.compile(r"[\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


class BLEU(TextMetric):
    """BLEU of the whole corpus, 0 to 100, by sacrebleu (Post 2018, arXiv 1804.08771).

    Args:
        tokenize: sacrebleu's tokenizer, such as 13a, intl, zh or char. auto takes zh where a
            reference has Chinese characters, char where it is in another script without spaces,
            and 13a, sacrebleu's own choice, for all others.
    """

    names = ("bleu",)
    width = 2 * ORDER + 2

    def __init__(self, tokenize: str = "auto") -> None:
        super().__init__()
        self.tokenize = tokenize
        self._by_tokenizer: dict[str, Any] = {}
        self._bleu("13a" if tokenize == "auto" else tokenize)  # a mistake shows at once

    def count(self, answer: Answer) -> list[float]:
        """Return matched and possible n-grams of each order, and both lengths."""
        name = tokenizer_for(answer.reference) if self.tokenize == "auto" else self.tokenize
        found = self._bleu(name).sentence_score(answer.prediction, [answer.reference])
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    def scores(self, sums: Sequence[float], answers: int) -> list[float]:
        """Return the one score; orders that no answer is long enough for are left out."""
        *grams, ours, theirs = map(int, sums)
        computed = _sacrebleu().compute_bleu(
            grams[:ORDER], grams[ORDER:], ours, theirs, smooth_method="exp", effective_order=True
        )
        return [computed.score]

    def _bleu(self, tokenizer: str) -> Any:
        if tokenizer not in self._by_tokenizer:
            known = _sacrebleu().TOKENIZERS
            if tokenizer not in known:
                raise ValueError(
                    f"tokenize {tokenizer!r} is unknown; use auto or one of sacrebleu's: "
                    f"{', '.join(known)}"
                )
            made = _sacrebleu()(tokenize=tokenizer, effective_order=True)
            self._by_tokenizer[tokenizer] = made
        return self._by_tokenizer[tokenizer]


def _sacrebleu() -> Any:
    try:
        import sacrebleu.metrics
    except ImportError as error:
        raise ValueError(
            f"BLEU needs the package sacrebleu ({error}): pip install 'lit_adapters[eval]', or "
            "take ROUGE, which needs nothing more"
        ) from error
    return sacrebleu.metrics.BLEU


def tokenizer_for(text: str) -> str:
    """Name the tokenizer that splits a text in its script into words or characters."""
    if _OTHER_UNSPACED.search(text):
        return "char"
    return "zh" if _HAN.search(text) else "13a"
