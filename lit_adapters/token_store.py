"""The tokens of every split of a corpus: asked as in training, made once, reported, kept."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lit_adapters.data import Corpus, LengthReport, Overlong, Prompting, SplitName, Tokens, tokenise
from lit_adapters.data.cache import FOLDER, once
from lit_adapters.prompting import choose, to_note


class TokenStore:
    """Tokenises a split, or what one source gives to it, once for each tokenizer.

    Args:
        corpus: The examples.
        cache_dir: Where the next run finds them; "auto" is our folder, None keeps nothing.
        given: `template` and `task_prompt`; None where nothing is said.
    """

    def __init__(
        self, corpus: Corpus, cache_dir: str | None, given: Mapping[str, str | None]
    ) -> None:
        self.corpus = corpus
        self.cache_dir = cache_dir
        self.given = given
        self.reports: dict[str, LengthReport] = {}
        self._tokens: dict[str, list[Tokens]] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._size = 0  # of its vocabulary, which an adapter's new tokens enlarge
        self._recorded: Prompting | None = None  # what loaded adapters said

    def ask_as(self, recorded: Prompting | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Ask as in the training that is ``recorded``, where nothing else is given."""
        if recorded == self._recorded:
            return
        self._recorded = recorded
        chosen, differs = choose(self.given, recorded)
        own = self.corpus.prompting, self.corpus.resolved(tokenizer)
        if to_note(chosen) not in map(to_note, own):
            self.corpus.prompting = replace(chosen, train_on=self.corpus.prompting.train_on)
            self.forget()
            if recorded is not None:
                rank_zero_info("Prompts are made as in the training of the loaded adapter.")
        if differs:
            rank_zero_info(f"Note: {differs}.")

    def forget(self) -> None:
        """Forget all tokens: the texts are others now."""
        self._tokens, self.reports = {}, {}

    def tokens(
        self,
        split: SplitName,
        source: str | None,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        overlong: Overlong,
        loggers: Iterable[Logger] = (),
    ) -> list[Tokens]:
        """Return the tokens of a split, of all sources or of one; log their statistics once."""
        if tokenizer is not self._tokenizer or len(tokenizer) != self._size:
            self._tokenizer, self._size = tokenizer, len(tokenizer)
            self.forget()
        name = split if source is None else f"{split}/{source}"
        if name not in self._tokens:
            tokens: list[Tokens] = []
            if examples := self.corpus.examples(split, tokenizer, source):
                with self.corpus.naming(split, source):
                    tokens, self.reports[name] = once(
                        tokenise,
                        examples,
                        tokenizer,
                        self._folder(),
                        rank_zero_info,
                        max_length=max_length,
                        overlong=overlong,
                    )
                self._say(name, split, source, loggers)
            self._tokens[name] = tokens
        return self._tokens[name]

    def _say(
        self, name: str, split: SplitName, source: str | None, loggers: Iterable[Logger]
    ) -> None:
        report = self.reports[name]
        path = self.corpus.name if source is None else self.corpus.sources[source]
        rank_zero_info(f"{path} ({split}): {report}")
        for logger in loggers:
            values = report.metrics().items()
            logger.log_metrics({f"data/{name}/{key}": v for key, v in values}, step=0)

    def _folder(self) -> Path | None:
        if self.cache_dir == "auto":
            return FOLDER
        return None if self.cache_dir is None else Path(self.cache_dir).expanduser()
