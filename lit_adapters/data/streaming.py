"""Records that are read while they are trained on, for data that fits neither memory nor disk.

A stream is a sequence of windows, each a small data set that `TrainOrder` shuffles and shares
among devices as it does a whole one. The order of records depends on the seed and the epoch only;
to resume, what was trained is read again and left out.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Literal, TypeVar

import torch

from lit_adapters.data.batches import Batch, TrainOrder, collate
from lit_adapters.data.fields import Record
from lit_adapters.data.records import (
    Records,
    SplitName,
    is_hub_id,
    load_hub,
    parse_line,
    read_file,
    split_files,
)
from lit_adapters.data.tables import TABLES, csv_rows, read_saved, table_rows, was_saved
from lit_adapters.data.tokens import Tokens

CHUNK = 1000  # records that are read, formatted and tokenised together
T = TypeVar("T")


def stream(path: str, split: SplitName = "train") -> Iterator[Records]:
    """Yield the records of a split, some at a time; nothing if there is no such split.

    Args:
        path: As for `read_splits`; `.json` files and "tiny" are read whole.
        split: The name of the split.

    Raises:
        FileNotFoundError: Nothing is found under `path`.
        ValueError: What is there is malformed, or of another kind.
    """
    place = Path(path).expanduser()
    if is_hub_id(path):
        yield from _chunks(_counted(load_hub(path, streaming=True).get(split, ())), path, "record")
    elif place.is_dir() and was_saved(place):
        yield from _chunks(_counted(read_saved(place).get(split, ())), path, "record")
    else:
        folder = Path(__file__).parent.parent / "assets" / "tasks" if path == "tiny" else place
        files = split_files(folder).get(split, []) if folder.is_dir() else [folder]
        for file in files if folder.is_dir() or split == "train" else []:
            yield from _file(file)


def _file(file: Path) -> Iterator[Records]:
    if file.suffix in TABLES and file.is_file():
        yield from _chunks(_counted(table_rows(file)), str(file), "record")
    elif file.suffix == ".jsonl" and file.is_file():
        with file.open("rb") as handle:
            yield from _chunks(_lines(file, handle), str(file), "line")
    elif file.suffix in (".csv", ".tsv") and file.is_file():
        with file.open(encoding="utf-8-sig", newline="") as text:
            yield from _chunks(csv_rows(file, text), str(file), "line")
    else:
        yield read_file(file)  # which also says what is wrong with it


def _lines(file: Path, handle: Iterable[bytes]) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(handle, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}, line {number} is not UTF-8 (byte {error.start} of the line); convert "
                "the file, for instance with: iconv -f latin1 -t utf-8"
            ) from None
        if text.strip():
            yield number, parse_line(file, text, number)


def _counted(records: Iterable[Record]) -> Iterator[tuple[int, Record]]:
    return enumerate(records, start=1)


def _chunks(
    rows: Iterator[tuple[int, Record]], name: str, unit: Literal["line", "record"]
) -> Iterator[Records]:
    while rows_here := list(islice(rows, CHUNK)):
        places = [place for place, _ in rows_here]
        yield Records((record for _, record in rows_here), name, places, unit)


def part(chunks: Iterable[Records], start: int, stop: int | None = None) -> Iterator[Records]:
    """Yield the records from `start` up to `stop`, all of the rest if None."""
    seen = 0
    for chunk in chunks:
        end = len(chunk) if stop is None else min(stop - seen, len(chunk))
        if wanted := range(max(start - seen, 0), end):
            yield chunk.take(wanted)
        seen += len(chunk)
        if stop is not None and seen >= stop:
            return


def gathered(chunks: Iterable[Records]) -> Records:
    """Return the records of all chunks; their places are kept if they are of one file."""
    parts = list(chunks)
    records = [record for one in parts for record in one]
    names = {one.name for one in parts}
    if len(names) != 1:
        return Records(records, ", ".join(sorted(names)) or "the data")
    places = [place for one in parts for place in one.places]
    return Records(records, parts[0].name, places, parts[0].unit)


def mixed(
    sources: Sequence[Callable[[], Iterator[T]]], weights: Sequence[float | None], seed: int
) -> Iterator[T]:
    """Yield from several sources: one after the other, or drawn by weight where they have any.

    By weight, a source that ends begins again, until each has ended once: every record comes at
    least once, as in `shares`. What ends only then is not begun again.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        yield from chain.from_iterable(source() for source in sources)
        return
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.tensor(given, dtype=torch.float64)
    running, ended = [source() for source in sources], [False] * len(sources)
    while True:
        index = int(torch.multinomial(probabilities, 1, generator=generator))
        item = next(running[index], None)
        if item is None:
            ended[index] = True
            if all(ended):
                return
            running[index] = sources[index]()
            item = next(running[index], None)
        if item is not None:
            yield item


class StreamLoader:
    """Batches of a stream; each iteration is one epoch, of a length that nobody knows before.

    Args:
        examples: Returns the tokenised examples of an epoch, in the order of the data.
        order: How a window of examples becomes batches; `lengths` and `seed` are set here.
        pad_id: Token id for padding.
        window: Examples that are shuffled together, rounded to whole steps of all devices; more are
            mixed better and take more memory.
        packed: Concatenate the examples of a batch instead of padding them.
    """

    def __init__(
        self,
        examples: Callable[[int], Iterator[Tokens]],
        order: Mapping[str, int | bool],
        pad_id: int,
        window: int,
        packed: bool = False,
    ) -> None:
        self.examples = examples
        self.order = dict(order)
        self.pad_id = pad_id
        step = max(1, self.order["batch_size"] * self.order["devices"])  # 0 is TrainOrder's to say
        self.window = max(1, window // step) * step
        self.packed = packed
        self._next = (0, 0)

    def __iter__(self) -> Iterator[Batch]:
        epoch, done = self.start()
        batches: Iterator[list[Tokens]] = islice(self._batches(epoch), done, None)
        first = next(batches, None)
        if first is None and done:  # the epoch was trained whole, which nobody could know before
            epoch, batches = epoch + 1, self._batches(epoch + 1)
            first = next(batches, None)
        if first is None:
            raise ValueError(
                "the stream holds no example for every device that has a trained token within "
                "max_length; raise max_length, or use overlong='truncate-prompt'"
            )
        self._next = (epoch + 1, 0)
        for tokens in chain([first], batches):
            yield collate(tokens, self.pad_id, self.packed)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch to begin with next."""
        return {"epoch": self._next[0]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin with the epoch of the state; a trainer's progress says where in it."""
        self._next = (state["epoch"], 0)

    def start(self) -> tuple[int, int]:
        """Return where an iteration begins: the epoch, and the batches of it to leave out."""
        return self._next

    def _batches(self, epoch: int) -> Iterator[list[Tokens]]:
        examples, number = self.examples(epoch), 0
        while tokens := list(islice(examples, self.window)):
            if len(tokens) < self.order["devices"]:
                return  # fewer than devices are left: they come in another epoch's order, or not
            lengths = [len(one["input_ids"]) for one in tokens]
            seed = zlib.crc32(f"window {number}, seed {self.order['seed']}".encode())
            order = TrainOrder(lengths, **{**self.order, "seed": seed})  # type: ignore[arg-type]
            yield from ([tokens[index] for index in batch] for batch in order.batches(epoch))
            number += 1
