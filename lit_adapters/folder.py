"""The files of an adapter folder: read with distrust, written all or none."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
EXTRA = "lit_adapters.json"
CARD = "README.md"

DTYPES = {"F32", "BF16", "F16"}
MAX_JSON_BYTES = 10_000_000


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into ``folder`` only when all of them are on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        part = Path(scratch)
        yield part
        files = sorted(part.iterdir(), key=lambda file: file.name == WEIGHTS)  # weights last
        for file in files:
            with file.open("r+b") as handle:
                os.fsync(handle.fileno())
        weights = folder / WEIGHTS
        if any(_differs(part / name, folder / name) for name in (CONFIG, EXTRA)):
            weights.unlink(missing_ok=True)  # dying below must not leave old weights, new settings
        for file in files:
            file.replace(folder / file.name)


def _differs(new: Path, old: Path) -> bool:
    return new.exists() and (not old.exists() or new.read_bytes() != old.read_bytes())


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the folder.

    Raises:
        ValueError: if it is too large, not JSON or not an object.
    """
    file = file_inside(folder, name)
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{file} is larger than {MAX_JSON_BYTES} bytes; that is no config")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def read_tensors(
    folder: Path, expected: Mapping[str, Tensor], optional: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return exactly the tensors named in ``expected``, and those of ``optional`` that are there.

    The header, both keys and shapes, is compared before any tensor is read.

    Raises:
        ValueError: if a tensor is missing, unexpected, of another shape or not of a floating
            dtype, or holds NaN or infinity, or the file is no whole safetensors file.
    """
    file = file_inside(folder, WEIGHTS)
    try:
        with safe_open(file, framework="pt") as reader:
            found = set(reader.keys())
            known = {**optional, **expected}
            _check_keys(file, found - (known.keys() - expected.keys()), set(expected))
            for key in found:
                entry = reader.get_slice(key)
                _check_entry(file, key, entry.get_dtype(), entry.get_shape(), known[key])
            tensors = {key: reader.get_tensor(key) for key in found}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({error}); it may be truncated. "
            "Save or download the adapter again"
        ) from error
    for key in expected:
        if not tensors[key].isfinite().all():
            raise ValueError(
                f"{file}: {key!r} holds NaN or infinite values; its training diverged. "
                "Use an earlier checkpoint"
            )
    return tensors


def file_inside(folder: Path, name: str) -> Path:
    """Return the file ``name`` of a folder; a link may lead into the hub's cache, no further.

    Raises:
        FileNotFoundError: if folder or file is missing.
        ValueError: if the file is a link that leads out.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; expected an adapter folder with {CONFIG} and {WEIGHTS}"
        )
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {_advice(folder, name)}")
    target, home = file.resolve(), folder.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(cache)):
        raise ValueError(f"{file} is a link that leads out of the folder, to {target}; refused")
    return file


def _advice(folder: Path, name: str) -> str:
    if name == WEIGHTS and (folder / "adapter_model.bin").exists():
        return (
            "adapter_model.bin is there, but pickle files run code when loaded and are never "
            "read; load it with PEFT in a place you trust and save it as safetensors"
        )
    return f"the folder holds: {', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}"


def _check_keys(file: Path, found: set[str], expected: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        parts = [
            f"{len(keys)} {kind}, first {keys[0]!r}"
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise ValueError(
            f"{file} does not hold the tensors that {CONFIG} implies on this model: "
            f"{'; '.join(parts)}. Is it the right base, and are both files of one save?"
        )


def _check_entry(file: Path, key: str, dtype: str, shape: list[int], expected: Tensor) -> None:
    allowed = DTYPES if expected.is_floating_point() else {"I64"}  # a counter of BatchNorm
    if dtype not in allowed:
        raise ValueError(f"{file}: {key!r} has dtype {dtype}, expected one of {sorted(allowed)}")
    if tuple(shape) != tuple(expected.shape):
        raise ValueError(
            f"{file}: {key!r} has shape {list(shape)}, but this model and {CONFIG} need "
            f"{list(expected.shape)}"
        )
