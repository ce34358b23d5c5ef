"""The files of an adapter folder: read with distrust, written all or none."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lit_adapters.adapters.fields import shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
EXTRA = "lit_adapters.json"
CARD = "README.md"

DTYPES = {"F32", "BF16", "F16"}
MAX_JSON_BYTES = 2_000_000  # a pattern for each of 20,000 experts
MAX_HEADER_BYTES = 10_000_000  # the same in safetensors; its library would allow ten times as much
MAX_NOTE = 1000  # characters

Backend = Literal["mmap", "pread"]  # how safetensors reads a file

# Fields of ``lit_adapters.json`` that are looked at, all of them texts, or null.
NOTES = (
    "method",
    "origin",
    "initialiser",
    "taken_from",
    "base_fingerprint",
    "weights_sha256",
)


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into ``folder`` only when all of them are on disk.

    Raises:
        OSError: naming the folder, if something cannot be written; what was there stays.
    """
    try:
        with _scratch(folder) as part:
            yield part
            _move(part, folder)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        kept = (folder / WEIGHTS).exists()
        text = (
            f"cannot write the adapter folder {folder}: "
            f"{getattr(error, 'strerror', None) or error}; "
            f"{'the adapter from before is whole' if kept else 'no adapter is there'}. Make room, "
            "or choose a folder elsewhere"
        )
        raise OSError(*filter(None, [getattr(error, "errno", None)]), text) from error


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        yield Path(scratch)


def _move(part: Path, folder: Path) -> None:
    files = sorted(part.iterdir(), key=lambda file: file.name == WEIGHTS)  # weights last
    new = [file for file in files if _differs(file, folder / file.name)]
    for file in new:
        if file.name != CARD:  # which nothing reads
            with file.open("r+b") as handle:
                os.fsync(handle.fileno())
    if any(file.name in (CONFIG, EXTRA) for file in new):
        # Dying below must not leave old weights with new settings.
        (folder / WEIGHTS).unlink(missing_ok=True)
    for file in new:
        file.replace(folder / file.name)


def _differs(new: Path, old: Path) -> bool:
    """Whether ``new`` has to take the place of ``old``; weights always do."""
    is_file = old.is_file() and not old.is_symlink()
    return new.name == WEIGHTS or not is_file or new.read_bytes() != old.read_bytes()


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whose own `save_file` takes three times as long.

    It would look for memory that tensors share, which is for the caller to know, and find their
    addresses by way of NumPy.

    Raises:
        TypeError: if one is not an ordinary contiguous tensor on the CPU, and so has no address.
    """
    for key, tensor in tensors.items():
        is_ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
        if not is_ordinary or not tensor.is_contiguous():
            raise TypeError(
                f"{key} is a {type(tensor).__name__} on {tensor.device}, whose values are not in "
                "this process's memory as they are to be written; a model that is sharded is saved "
                "by AdapterCheckpoint, which gathers them"
            )
    specs = {
        key: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for key, tensor in tensors.items()
    }
    serialize_file(specs, file, metadata={"format": "pt"})


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the folder.

    Raises:
        ValueError: if it is too large, not JSON or not an object, or says something twice.
    """
    file = file_inside(folder, name)
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(
            f"{file} is {size} bytes long, expected at most {MAX_JSON_BYTES}; that is no config. "
            "Save or download the adapter again"
        )
    try:
        content = _parse(file.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{file} is not valid JSON: {error}. Correct it, or save or download the adapter again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} must hold a JSON object, got {type(content).__name__}; save or download the "
            "adapter again"
        )
    if name == EXTRA:
        _check_notes(file, content)
    return content


def _parse(text: bytes) -> Any:
    """JSON as the standard has it: no NaN, no key twice (readers differ in which one counts)."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(key)} is there {count} times, expected once")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_notes(file: Path, notes: Mapping[str, Any]) -> None:
    for field in NOTES:
        value = notes.get(field)
        if value is not None and not (isinstance(value, str) and len(value) <= MAX_NOTE):
            raise ValueError(
                f"{file}: {field!r} must be a text of at most {MAX_NOTE} characters, got "
                f"{shown(value)}; save or download the adapter again, or remove the field"
            )


def read_tensors(
    folder: Path,
    expected: Mapping[str, Tensor],
    optional: Callable[[], Mapping[str, Tensor]],
    backend: Backend,
) -> dict[str, Tensor]:
    """Return exactly the tensors named in ``expected``, and those of ``optional`` that are there.

    The header, both keys and shapes, is compared before any tensor is read. ``optional`` is asked
    only where the file holds more than is expected. Tensors of the ``backend`` "mmap" are views of
    the file, to be copied; those of "pread" have memory of their own, to be kept.

    Raises:
        ValueError: if a tensor is missing, unexpected, of another shape or not of a floating
            dtype, or holds NaN or infinity, or the file is no whole safetensors file.
    """
    file = file_inside(folder, WEIGHTS)
    try:
        header = _read_header(file)
        with safe_open(file, framework="pt", backend=backend) as reader:  # which checks it
            found = header.keys() - {"__metadata__"}
            more = {} if found <= expected.keys() else optional()
            known = {**more, **expected}
            _check_keys(file, found - (known.keys() - expected.keys()), set(expected))
            for key in found:
                _check_entry(file, key, header[key]["dtype"], header[key]["shape"], known[key])
            tensors = {key: reader.get_tensor(key) for key in found}
    except (SafetensorError, _HeaderError) as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({_clipped(str(error))}); it may be "
            "truncated. Save or download the adapter again"
        ) from error
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    # One number for all of them first: it is NaN or infinite wherever one of theirs is.
    suspect = expected if not get_total_norm(floating).isfinite() else ()
    for key in suspect:
        if not tensors[key].isfinite().all():
            raise ValueError(
                f"{file}: {shown(key)} holds NaN or infinite values; its training diverged. "
                "Use an earlier checkpoint"
            )
    return tensors


class _HeaderError(ValueError):
    """The first bytes of a weights file promise what cannot be."""


def _read_header(file: Path) -> dict[str, Any]:
    """Refuse what safetensors would take memory for, or overlook, before it opens the file."""
    with file.open("rb") as handle:
        length, rest = int.from_bytes(handle.read(8), "little"), file.stat().st_size - 8
        if length > min(rest, MAX_HEADER_BYTES):
            raise _HeaderError(
                f"its header claims {length} bytes, of {max(rest, 0)} in the file and "
                f"{MAX_HEADER_BYTES} allowed"
            )
        try:
            header = _parse(handle.read(length))
        except ValueError as error:
            raise _HeaderError(f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _HeaderError("its header is not a JSON object")
    return header


def _clipped(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."


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
    if name == WEIGHTS and (shards := sorted(folder.glob("*.safetensors.index.json"))):
        return (
            f"{shards[0].name} is there, but adapters in several parts are not read; put the "
            f"tensors of all parts into one {WEIGHTS}, as PEFT's save_pretrained does"
        )
    if (folder / name).is_symlink():
        return "it is a link that leads nowhere; copy the file itself"
    if (folder / name).exists():
        return "what is there under this name is no ordinary file"
    found = sorted(p.name for p in folder.iterdir())
    more = f" and {len(found) - 20} more" if len(found) > 20 else ""
    return f"the folder holds: {', '.join(found[:20]) or 'nothing'}{more}"


def _check_keys(file: Path, found: set[str], expected: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        parts = [
            f"{len(keys)} {kind}, first {shown(keys[0])}"
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
        raise ValueError(
            f"{file}: {key!r} has dtype {dtype}, expected one of {sorted(allowed)}; convert it and "
            "save it again"
        )
    if tuple(shape) != tuple(expected.shape):
        raise ValueError(
            f"{file}: {key!r} has shape {list(shape)}, but this model and {CONFIG} need "
            f"{list(expected.shape)}. Is it the right base, and are both files of one save?"
        )
