"""Tables: CSV by the standard library, so that a text stays a text; the rest by `datasets`."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lit_adapters.data.fields import Record

TABLES = (".parquet", ".arrow")
_DATA_SET, _DATA_SETS = "state.json", "dataset_dict.json"  # what `save_to_disk` writes


def csv_rows(file: Path, text: TextIO) -> Iterator[tuple[int, Record]]:
    """Yield the rows under a line of names, separated by commas or, in a `.tsv`, by tabs.

    Every value is a text. With each row comes the line on which it ends.

    Raises:
        ValueError: A row has another number of fields than there are names, or quotes are wrong.
    """
    delimiter = "\t" if file.suffix == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # its default of 131,072 is less than a long answer
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise ValueError(
                f"{file}, line 1: the names {names} are not all there and different; the first "
                "line names the fields, such as instruction,input,output"
            )
        for row in filter(None, reader):
            if len(row) != len(names):
                raise ValueError(
                    f"{file}, line {reader.line_num}: {len(row)} fields, but the first line names "
                    f"{len(names)} ({', '.join(names[:10])}); quote texts that hold "
                    f"{'tabs' if file.suffix == '.tsv' else 'commas'} or line breaks"
                )
            yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{file}, line {reader.line_num}: malformed CSV ({error}); write a quote within a "
            'quoted text twice ("")'
        ) from None


def table_rows(file: Path) -> Iterator[Record]:
    """Yield the records of a Parquet or Arrow file."""
    kind = file.suffix.removeprefix(".")
    try:
        from datasets import load_dataset

        # Streamed, it is read where it is instead of being written into a cache first.
        yield from load_dataset(kind, data_files=str(file), split="train", streaming=True)
    except ImportError as error:
        raise _needs_datasets(file, error) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{file} cannot be read as {kind} ({reason}); is it whole, and of that kind?"
        ) from error


def was_saved(folder: Path) -> bool:
    """Tell whether `save_to_disk` of the package datasets wrote this folder."""
    return (folder / _DATA_SET).is_file() or (folder / _DATA_SETS).is_file()


def read_saved(folder: Path) -> Mapping[str, Iterable[Record]]:
    """Return the splits of a folder that `save_to_disk` wrote; a single one is train."""
    try:
        from datasets import load_from_disk

        loaded: Any = load_from_disk(str(folder))
    except ImportError as error:
        raise _needs_datasets(folder, error) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{folder} cannot be read as a saved data set ({reason})") from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _needs_datasets(place: Path, error: ImportError) -> ValueError:
    return ValueError(f"{place} needs the package datasets ({error}); pip install datasets")
