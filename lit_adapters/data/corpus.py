"""The examples of one or several sources: read, split, weighted and formatted."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lit_adapters.data.examples import Example
from lit_adapters.data.formats import FormatName, choose_format, why
from lit_adapters.data.records import Records, SplitName, Splits, read_splits
from lit_adapters.data.sources import shares, source_names, weights_of
from lit_adapters.data.splits import complete_splits, held_out_of
from lit_adapters.data.streaming import CHUNK, gathered, mixed, part, stream
from lit_adapters.data.templates import Prompting, style_of, to_examples
from lit_adapters.data.tokens import Tokens

Sources = str | list[str] | dict[str, float]


@dataclass
class Corpus:
    """Sources, and how their records become examples; nothing is read before it is needed.

    Args:
        path: As for `read_splits`; or a list of such, or a mapping of them to weights.
        format: How records are read; "auto" decides for each source.
        prompting: How conversations become text.
        val_size: What to hold out of train where there is no validation split.
        seed: Decides what is held out, and how sources are mixed.
        train_limit: Records of each source to train on, at most.
        streaming: Whether training records are read anew for every epoch.
        log: Told which format was found, and how often the records of a source come.
    """

    path: Sources
    format: FormatName = "auto"
    prompting: Prompting = field(default_factory=Prompting)
    val_size: int | float = 0.05
    seed: int = 0
    train_limit: int | None = None
    streaming: bool = False
    log: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self._weights = weights_of(self.path)
        paths = list(self._weights)
        self.sources = dict(zip(source_names(paths), paths, strict=True))
        self._splits: dict[str, Splits] | None = None
        self._formats: dict[str, FormatName] = {}
        self._made: dict[tuple[str, int], tuple[Any, list[Example]]] = {}
        self._held: dict[str, int] = {}  # records at the start of a stream that are validation's

    @property
    def name(self) -> str:
        """What messages call it: its paths."""
        return ", ".join(self.sources.values())

    def examples(
        self, split: SplitName, tokenizer: Any = None, source: str | None = None
    ) -> list[Example]:
        """Return the examples of a split, source after source; of a stream, the first of train.

        Args:
            split: The name of the split.
            tokenizer: Needed for conversations only.
            source: The only one that is wanted; None for all.
        """
        found = []
        for name, splits in self._read_all().items():
            if source in (None, name):
                found += self._kept(splits[split], split, name, tokenizer)
        return found

    def _kept(
        self, records: Records, split: SplitName, source: str, tokenizer: Any
    ) -> list[Example]:
        """The examples of a source; those of evaluation, which are asked for again, made once."""
        if split == "train":
            return self._formatted(records, split, source, tokenizer)
        template = getattr(tokenizer, "chat_template", None)
        made_with = (tokenizer, template, self.prompting)
        key = (source, id(records))  # a test split may be the very validation split
        if key not in self._made or self._made[key][0] != made_with:
            examples = self._formatted(records, split, source, tokenizer)
            self._made[key] = made_with, examples
        return self._made[key][1]

    def count(self, split: SplitName) -> int:
        """Return the number of records of a split, of all sources."""
        return sum(len(splits[split]) for splits in self._read_all().values())

    def resolved(self, tokenizer: Any = None) -> Prompting:
        """Return the prompting with "auto" replaced by what it means for all sources alike."""
        self._read_all()
        styles = {style_of(self.prompting, name, tokenizer) for name in self._formats.values()}
        template = styles.pop() if len(styles) == 1 else "auto"
        return replace(self.prompting, template=template)

    def stream(
        self, epoch: int, tokenizer: Any, encode: Callable[[list[Example]], list[Tokens]]
    ) -> Iterator[Tokens]:
        """Yield the training examples of an epoch, each source in its order."""
        self._read_all()
        sources = [partial(self._streamed, source, tokenizer, encode) for source in self.sources]
        seed = zlib.crc32(f"mixture, seed {self.seed}, epoch {epoch}".encode())
        return mixed(sources, list(self._weights.values()), seed)

    @contextmanager
    def naming(self, split: SplitName, source: str | None = None) -> Iterator[None]:
        """Let an error begin with the data it is about, unless it names its place already."""
        name = self.name if source is None else self.sources[source]
        try:
            yield
        except ValueError as error:
            if name in str(error):
                raise
            raise ValueError(f"{name} ({split}): {error}") from error

    def _formatted(
        self, records: Records, split: SplitName, source: str, tokenizer: Any
    ) -> list[Example]:
        with self.naming(split, source):
            return to_examples(records, self._formats[source], source, self.prompting, tokenizer)

    def _read_all(self) -> dict[str, Splits]:
        """The splits of each source; the records of train as often as its weight says."""
        if self._splits is None:
            found = self._heads() if self.streaming else self._whole()
            if not self.streaming:  # a stream is mixed while it runs
                self._weigh(found)
            for source, splits in found.items():
                self._formats[source] = self._format_of(splits["train"], self.sources[source])
            self._splits = found
        return self._splits

    def _weigh(self, found: dict[str, Splits]) -> None:
        sizes = [len(splits["train"]) for splits in found.values()]
        chosen = shares(sizes, list(self._weights.values()), self.seed)
        for (source, splits), indices in zip(found.items(), chosen, strict=True):
            size = len(splits["train"])
            if len(indices) != size:
                times = len(indices) / size
                self.log(f"{source}: each of {size} training records comes {times:.2f} times")
            splits["train"] = splits["train"].take(indices)

    def _format_of(self, records: Records, path: str) -> FormatName:
        name = choose_format(records, self.format, records.place(0))
        if self.format == "auto":
            self.log(f"{path}: format {name} ({why(name)})")
        return name

    def _whole(self) -> dict[str, Splits]:
        read = {source: read_splits(path) for source, path in self.sources.items()}
        lacking = [source for source, splits in read.items() if "validation" not in splits]
        sizes = [len(read[source]["train"]) for source in lacking]
        held = dict(zip(lacking, held_out_of(self.val_size, sizes), strict=True))
        found = {}
        for source, one in read.items():
            if self.val_size and held.get(source) == 0:
                self.log(f"{source}: too small for a validation record of its own")
            splits = complete_splits(one, held.get(source, 0), self.seed)
            train = splits["train"]
            splits["train"] = train.take(range(len(train))[: self.train_limit])
            found[source] = splits
        return found

    # --- streams ---------------------------------------------------------------------------------

    def _heads(self) -> dict[str, Splits]:
        """The validation and test records of streams, and the first of their training records."""
        given = {s: gathered(stream(path, "validation")) for s, path in self.sources.items()}
        lacking = [source for source, records in given.items() if not records]
        if lacking and not (self.val_size >= 0 and self.val_size % 1 == 0):
            raise ValueError(
                f"val_size {self.val_size} is no count of records, and nobody knows the length of "
                "a stream to hold out a share: give a count (the first ones), or 0, or add a "
                "validation split"
            )
        each, more = divmod(int(self.val_size), max(1, len(lacking)))
        self._held = {source: each + (i < more) for i, source in enumerate(lacking)}
        return {source: self._head(source, given[source]) for source in self.sources}

    def _head(self, source: str, validation: Records) -> Splits:
        path = self.sources[source]
        test = gathered(stream(path, "test"))
        self._held.setdefault(source, 0)
        head = gathered(part(stream(path), 0, self._held[source] + CHUNK))
        held = min(self._held[source], len(head))
        train = head.take(range(held, len(head))[: self.train_limit])
        if not train:
            raise ValueError(f"{path} has no records left to train on; lower val_size ({held})")
        validation = validation or head.take(range(held))
        return {"train": train, "validation": validation, "test": test or validation}

    def _streamed(
        self, source: str, tokenizer: Any, encode: Callable[[list[Example]], list[Tokens]]
    ) -> Iterator[Tokens]:
        held = self._held[source]
        stop = None if self.train_limit is None else held + self.train_limit
        for records in part(stream(self.sources[source]), held, stop):
            yield from encode(self._formatted(records, "train", source, tokenizer))
