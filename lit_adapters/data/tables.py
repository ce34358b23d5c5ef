"""Tables: CSV by the standard library, so that a text stays a text; the rest by `datasets`."""

import csv
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from lit_adapters.data.fields import Record

TABLES = (".parquet", ".arrow")
_DATA_SET, _DATA_SETS = "state.json", "dataset_dict.json"  # what `save_to_disk` writes


def read_csv(file: Path, text: str) -> tuple[list[int], list[Record]]:
    """Read comma- (`.tsv`: tab-) separated rows under a line of names; every value is a text.

    Returns:
        The line on which each row ends, and the rows.

    Raises:
        ValueError: A row has another number of fields than there are names, or quotes are wrong.
    """
    delimiter = "\t" if file.suffix == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # its default of 131,072 is less than a long answer
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: list[int] = []
    rows: list[Record] = []
    try:
        names = next(reader, [])
        if len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise ValueError(
                f"{file}, line 1: the names {names} are not all there and different; the first "
                "line names the fields, such as instruction,input,output"
            )
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise ValueError(
                    f"{file}, line {reader.line_num}: {len(row)} fields, but the first line names "
                    f"{len(names)} ({', '.join(names[:10])}); quote texts that hold "
                    f"{'tabs' if delimiter == chr(9) else 'commas'} or line breaks"
                )
            lines.append(reader.line_num)
            rows.append(dict(zip(names, row, strict=True)))
    except csv.Error as error:
        raise ValueError(
            f"{file}, line {reader.line_num}: malformed CSV ({error}); write a quote within a "
            'quoted text twice ("")'
        ) from None
    return lines, rows


def read_table(file: Path) -> Iterable[Record]:
    """Read a Parquet or Arrow file, all of it."""
    try:
        from datasets import load_dataset

        kind = file.suffix.removeprefix(".")
        # Streamed, it is read where it is instead of being written into a cache first.
        rows = load_dataset(kind, data_files=str(file), split="train", streaming=True)
        return list(rows)
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
