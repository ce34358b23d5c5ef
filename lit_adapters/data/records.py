"""Reading records: the embedded data, a local file or folder, or a data set of the hub.

Every reader returns `Splits`: the name of a split (train, validation, test) and its records.
Nothing here executes code that came with the data.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal

from lit_adapters.data.encoding import decode
from lit_adapters.data.formats import Record

SplitName = Literal["train", "validation", "test"]
Splits = dict[SplitName, list[Record]]

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_SUFFIXES = (".json", ".jsonl")
_TINY = Path(__file__).parent.parent / "assets" / "tasks"
_HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*(?::[\w.-]+)?")


def read_splits(path: str) -> Splits:
    """Read every split of a source.

    Args:
        path: "tiny" (the embedded tasks); a `.json` file (a list of objects) or a `.jsonl` file,
            which is all train; a folder of `train`, `validation` and `test` files of these kinds,
            the last two optional; or a hub id, `owner/name` or `owner/name:config`.

    Raises:
        FileNotFoundError: Nothing is found under `path`.
        ValueError: What is there is empty, malformed, or of another kind.
    """
    if is_hub_id(path):
        return read_hub(path)
    place = _TINY if path == "tiny" else Path(path).expanduser()
    if place.is_dir():
        return read_folder(place)
    return {"train": read_file(place)}


def is_hub_id(path: str) -> bool:
    """Tell whether `path` can only be a hub id: nothing local is there, nor looks meant."""
    local = path == "tiny" or Path(path).expanduser().exists() or path.endswith(_SUFFIXES)
    return not local and _HUB_ID.fullmatch(path) is not None


def read_folder(folder: Path) -> Splits:
    """Read the files of `folder` that are named after a split."""
    splits: Splits = {}
    for split in SPLITS:
        files = [file for suffix in _SUFFIXES if (file := folder / f"{split}{suffix}").is_file()]
        if len(files) > 1:
            raise ValueError(f"{folder} holds {split} twice, as .json and .jsonl; remove one")
        if files:
            splits[split] = read_file(files[0])
    if "train" not in splits:
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no train.jsonl or train.json (found: {found}); "
            "rename a file to that, or give the path of the file itself"
        )
    return splits


def read_file(file: Path) -> list[Record]:
    """Read one `.json` file (a list of objects) or one `.jsonl` file (one object per line)."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {_near_names(file)}")
    if file.suffix not in _SUFFIXES:
        raise ValueError(f"{file} has suffix {file.suffix!r}; expected {' or '.join(_SUFFIXES)}")
    text = decode(file, file.read_bytes())
    if not text.strip():
        raise ValueError(f"{file} is empty; expected at least one record")
    return _parse_lines(file, text) if file.suffix == ".jsonl" else _parse_list(file, text)


def _parse_lines(file: Path, text: str) -> list[Record]:
    lines = text.split("\n")  # not splitlines(): it also splits at U+2028, which JSON text may hold
    return [
        _object(_parse(file, line, number), f"{file}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _parse_list(file: Path, text: str) -> list[Record]:
    values = _parse(file, text)
    if not isinstance(values, list):
        hint = "one object per line is a .jsonl file" if isinstance(values, dict) else "wrap it"
        raise ValueError(
            f"{file} holds {type(values).__name__} at the top; expected a list of objects; {hint}"
        )
    if not values:
        raise ValueError(f"{file} holds an empty list; expected at least one record")
    return [_object(value, f"{file}, record {n}") for n, value in enumerate(values, start=1)]


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
    """Read `owner/name` or `owner/name:config` from the Hugging Face hub, or from its cache.

    Only data files are read: the `datasets` versions we accept run no script of a repository
    unless told to trust it, and we never do.
    """
    name, _, config = hub_id.partition(":")
    try:
        from datasets import load_dataset

        loaded = load_dataset(name, config or None)
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
    splits: Splits = {split: list(loaded[split]) for split in SPLITS if split in loaded}
    if not splits.get("train"):
        raise ValueError(f"{hub_id} has no records in a train split; its splits: {list(loaded)}")
    return splits


def _near_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f"nor does its folder {path.parent}; give another path"
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else "nothing there has a similar name"
