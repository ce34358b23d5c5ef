"""Rows of an unfinished prediction, from which a broken run goes on."""

import glob
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from lit_adapters.callbacks.sample_files import write_whole

Row = Mapping[str, Any]


class PredictionParts:
    """Files beside the one that is to come, one for each rank, that grow by whole rows.

    Their first line is a key of everything the rows depend on; files of another key are not read.

    Args:
        file: What the rows will be written to in the end.
        key: Of model, data and settings.
    """

    def __init__(self, file: Path, key: str) -> None:
        self.file = file
        self.key = key
        self._handle: TextIO | None = None

    def path(self, rank: int) -> Path:
        """Return the part of a rank."""
        return self.file.with_name(f"{self.file.name}.part{rank}")

    def existing(self) -> list[Path]:
        """Return all parts that are there, whatever their key."""
        return sorted(self.file.parent.glob(f"{glob.escape(self.file.name)}.part*"))

    def read(self) -> dict[int, Row]:
        """Return the rows of all parts with this key, by index and in its order."""
        rows = (row for path in self.existing() for row in self._rows(path))
        return dict(sorted((row["index"], row) for row in rows))

    def start_over(self, rows: Iterable[Row]) -> None:
        """Let one part hold these rows, and remove the others; on one rank only."""
        write_whole(self.path(0), [self._header(), *map(_line, rows)])
        for path in self.existing():
            if path != self.path(0):
                path.unlink()

    def open(self, rank: int) -> None:
        """Begin to add rows to the part of a rank."""
        self._handle = self.path(rank).open("a", encoding="utf-8")
        if not self._handle.tell():
            self._handle.write(self._header())

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows; they survive if the process is killed right after."""
        assert self._handle is not None
        self._handle.writelines(map(_line, rows))
        self._handle.flush()

    def close(self) -> None:
        """Stop adding."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def remove(self) -> None:
        """Remove all parts."""
        for path in self.existing():
            path.unlink()

    def _header(self) -> str:
        return _line({"key": self.key})

    def _rows(self, path: Path) -> list[Row]:
        header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        if header + "\n" != self._header():
            return []
        return [json.loads(line) for line in lines[:-1]]  # the last one has no end: it is broken


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
