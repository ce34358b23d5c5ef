"""Reading records: the embedded data, a local file or folder, or a data set of the hub.

Every reader returns `Splits`: the name of a split (train, validation, test) and its records.
Nothing here executes code that came with the data.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from lit_adapters.data.encoding import decode
from lit_adapters.data.fields import Record
from lit_adapters.data.tables import TABLES, csv_rows, read_saved, table_rows, was_saved

SplitName = Literal["train", "validation", "test"]


class Records(list[Record]):
    """Records that know where they come from, to name the place in an error.

    Args:
        records: The records.
        name: What errors call their file or data set.
        places: The number of each, as a line of a text file or else as a record; counted if None.
        unit: What those numbers count.
    """

    def __init__(
        self,
        records: Iterable[Record],
        name: str = "the data",
        places: Sequence[int] | None = None,
        unit: Literal["line", "record"] = "record",
    ) -> None:
        super().__init__(records)
        self.name = name
        self.places = range(1, len(self) + 1) if places is None else places
        self.unit: Literal["line", "record"] = unit

    def place(self, index: int) -> str:
        """Return where a record stands, such as `data.jsonl, line 3`."""
        return f"{self.name}, {self.unit} {self.places[index]}"

    def take(self, indices: Sequence[int]) -> "Records":
        """Return some of them, in the order of `indices`."""
        places = [self.places[index] for index in indices]
        return Records((self[index] for index in indices), self.name, places, self.unit)


Splits = dict[SplitName, Records]

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", *TABLES)
_TINY = Path(__file__).parent.parent / "assets" / "tasks"
_HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*(?::[\w.-]+)?")
_SHARD = r"-\d{5}-of-\d{5}"


def read_splits(path: str) -> Splits:
    """Read every split of a source.

    Args:
        path: "tiny" (the embedded tasks); a file, which is all train: `.json` (a list of objects),
            `.jsonl`, `.csv`, `.tsv`, `.parquet` or `.arrow`; a folder of `train`, `validation` and
            `test` files of these kinds, the last two optional; a folder that `save_to_disk` of the
            package datasets wrote; or a hub id, `owner/name` or `owner/name:config`.

    Raises:
        FileNotFoundError: Nothing is found under `path`.
        ValueError: What is there is empty, malformed, or of another kind.
    """
    if is_hub_id(path):
        return read_hub(path)
    place = _TINY if path == "tiny" else Path(path).expanduser()
    if place.is_dir():
        return _named(read_saved(place), str(place)) if was_saved(place) else read_folder(place)
    return {"train": read_file(place)}


def is_hub_id(path: str) -> bool:
    """Tell whether `path` can only be a hub id: nothing local is there, nor looks meant."""
    local = path == "tiny" or Path(path).expanduser().exists() or path.endswith(_SUFFIXES)
    return not local and _HUB_ID.fullmatch(path) is not None


def read_folder(folder: Path) -> Splits:
    """Read the files of `folder` that are named after a split, in one piece or in shards."""
    return {
        split: _joined([read_file(file) for file in files], folder)
        for split, files in split_files(folder).items()
    }


def split_files(folder: Path) -> dict[SplitName, list[Path]]:
    """Return the files of each split, shards in their order; there is always a train."""
    splits: dict[SplitName, list[Path]] = {}
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for split in SPLITS:
        pattern = re.compile(rf"{split}(?:{_SHARD})?({'|'.join(map(re.escape, _SUFFIXES))})")
        named = [file for file in files if pattern.fullmatch(file.name)]
        whole = [file for file in named if file.stem == split]
        if len(whole) > 1 or (whole and len(named) > 1):
            also = ", ".join(file.name for file in named)
            raise ValueError(f"{folder} holds {split} twice ({also}); remove one")
        if named:
            splits[split] = named
    if "train" not in splits:
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no train.jsonl or train.json (or .csv, .tsv, .parquet, .arrow; found: "
            f"{found}); rename a file to that, or give the path of the file itself"
        )
    return splits


def _joined(parts: list[Records], folder: Path) -> Records:
    if len(parts) == 1:
        return parts[0]
    return Records((record for part in parts for record in part), f"{folder} (shards)")


def read_file(file: Path) -> Records:
    """Read one file of records by its suffix."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {_near_names(file)}")
    if file.suffix not in _SUFFIXES:
        raise ValueError(f"{file} has suffix {file.suffix!r}; expected {' or '.join(_SUFFIXES)}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty; expected at least one record")
    if file.suffix in TABLES:
        records = Records(table_rows(file), str(file))
    else:
        records = _read_text(file, decode(file, file.read_bytes()))
    if not records:
        raise ValueError(f"{file} holds no records; expected at least one")
    return records


def _read_text(file: Path, text: str) -> Records:
    if not text.strip():
        raise ValueError(f"{file} is empty; expected at least one record")
    if file.suffix == ".json":
        return _parse_list(file, text)
    if file.suffix == ".jsonl":
        return _parse_lines(file, text)
    rows = list(csv_rows(file, StringIO(text, newline="")))
    return Records((row for _, row in rows), str(file), [line for line, _ in rows], "line")


def _parse_lines(file: Path, text: str) -> Records:
    lines = text.split("\n")  # not splitlines(): it also splits at U+2028, which JSON text may hold
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    records = (parse_line(file, lines[number - 1], number) for number in numbers)
    return Records(records, str(file), numbers, "line")


def parse_line(file: Path, text: str, number: int) -> Record:
    """Return the object of one line of a `.jsonl` file."""
    return _object(_parse(file, text, number), f"{file}, line {number}")


def _parse_list(file: Path, text: str) -> Records:
    values = _parse(file, text)
    if not isinstance(values, list):
        hint = "one object per line is a .jsonl file" if isinstance(values, dict) else "wrap it"
        raise ValueError(
            f"{file} holds {type(values).__name__} at the top; expected a list of objects; {hint}"
        )
    if not values:
        raise ValueError(f"{file} holds an empty list; expected at least one record")
    records = (_object(value, f"{file}, record {n}") for n, value in enumerate(values, start=1))
    return Records(records, str(file))


def _parse(file: Path, text: str, line: int = 1) -> Any:
    where = f"{file}, line {line}" if file.suffix == ".jsonl" else str(file)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; expected objects with texts") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {line + error.lineno - 1}: malformed JSON ({error.msg}, column "
            f"{error.colno}); correct that line, or rename the file if it is "
            f"{'one list (.json)' if file.suffix == '.jsonl' else 'one object per line (.jsonl)'}"
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{where} cannot be read ({error}); write texts instead") from None


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: found {type(value).__name__}, expected an object with named fields, "
            'such as {"instruction": ..., "output": ...}'
        )
    return value


def read_hub(hub_id: str) -> Splits:
    """Read `owner/name` or `owner/name:config` from the Hugging Face hub, or from its cache."""
    return _named(load_hub(hub_id), hub_id)


def load_hub(hub_id: str, streaming: bool = False) -> Mapping[str, Iterable[Record]]:
    """Return the splits of a data set of the hub, to be read; streamed, nothing is stored.

    Only data files are read: the `datasets` versions we accept run no script of a repository
    unless told to trust it, and we never do.
    """
    name, _, config = hub_id.partition(":")
    try:
        from datasets import load_dataset

        loaded = load_dataset(name, config or None, **({"streaming": True} if streaming else {}))
    except ImportError as error:
        raise ValueError(
            f"{hub_id!r} is no local file or folder ({_near_names(Path(hub_id))}), and reading a "
            f"data set of the hub needs the package datasets ({error}); pip install datasets"
        ) from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{hub_id!r} is neither a local file or folder ({_near_names(Path(hub_id))}) "
            f"nor a data set the hub could give ({error})"
        ) from error
    return loaded


def _named(loaded: Mapping[str, Iterable[Record]], name: str) -> Splits:
    splits: Splits = {
        split: Records(loaded[split], f"{name} ({split})") for split in SPLITS if split in loaded
    }
    if not splits.get("train"):
        raise ValueError(f"{name} has no records in a train split; its splits: {list(loaded)}")
    return splits


def _near_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f"nor does its folder {path.parent}; give another path"
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else "nothing there has a similar name"
