"""Tokens on disk, so that the same data is tokenised once."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_adapters.data.tokens import LengthReport, Tokens

WORTH_IT = 2_000_000  # characters; fewer are tokenised in about the time it takes to look them up
FOLDER = Path(HF_HOME) / "lit_adapters" / "tokens"

Tokenised = tuple[list[Tokens], LengthReport]


def once(
    tokenise: Callable[..., Tokenised],
    examples: Sequence[Any],
    tokenizer: Any,
    folder: Path | None,
    say: Callable[[str], None],
    **options: Any,
) -> Tokenised:
    """Return ``tokenise(examples, tokenizer, **options)``, from a file if one holds it.

    A file's name is a hash of all that the result depends on: every text, the whole tokenizer, the
    options, our code and the versions of the libraries that tokenise. A damaged file is made again.

    Args:
        tokenise: What to call.
        examples: Dataclasses whose ``repr`` says all.
        tokenizer: Of Hugging Face; cached is only what one written in Rust makes, for the others do
            not say all they do.
        folder: Where files are; null keeps none.
        say: Told what was read or could not be.
        options: Of ``tokenise``.
    """
    key = None if folder is None else _key(examples, tokenizer, options)
    if folder is None or key is None:
        return tokenise(examples, tokenizer, **options)
    file = folder / f"{key}.safetensors"
    if file.is_file():
        try:
            found = _read(file)
            say(f"Tokens are those of an earlier run, from {file}")
            return found
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            say(f"{file} is damaged ({error}) and is made again")
    made = tokenise(examples, tokenizer, **options)
    try:
        _write(file, *made)
    except OSError as error:
        say(f"Tokens are not kept for the next run: {file} cannot be written ({error})")
    return made


def _key(examples: Sequence[Any], tokenizer: Any, options: dict[str, Any]) -> str | None:
    """Return the hash of all that matters; None where that is too little, or not to be had."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    libraries = [(name, version(name)) for name in ("tokenizers", "transformers")]
    digest = hashlib.sha256(repr((sorted(options.items()), libraries)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):  # another version, other tokens
        digest.update(source.read_bytes())
    size = 0
    for example in examples:
        said = repr(example).encode("utf-8", "surrogatepass")
        size += len(said)
        digest.update(said)
    if size < WORTH_IT:
        return None
    own = sorted(tokenizer.special_tokens_map.items())
    template = getattr(tokenizer, "chat_template", None)
    digest.update(f"{type(tokenizer).__name__} {own} {template} {backend.to_str()}".encode())
    return digest.hexdigest()[:32]


def _write(file: Path, examples: list[Tokens], report: LengthReport) -> None:
    columns = {name: [row[name] for row in examples] for name in ("input_ids", "labels")}
    tensors = {
        name: torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        for name, rows in columns.items()
    }
    tensors["lengths"] = torch.tensor([len(row) for row in columns["input_ids"]], dtype=torch.int32)
    sources = [row.get("source", "") for row in examples]
    names = list(dict.fromkeys(sources))
    numbers = {name: number for number, name in enumerate(names)}
    tensors["sources"] = torch.tensor([numbers[name] for name in sources], dtype=torch.int32)
    notes = {
        "report": json.dumps(asdict(report)),
        "sources": json.dumps(names),
        "checksum": _checksum(tensors),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = file.with_suffix(f".{os.getpid()}.part")
    try:
        save_file(tensors, begun, notes)
        begun.replace(file)  # all or nothing, and nobody minds a file written twice
    finally:
        begun.unlink(missing_ok=True)


def _read(file: Path) -> Tokenised:
    with safe_open(file, "pt") as opened:
        notes = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if notes.get("checksum") != _checksum(tensors):
        raise ValueError("its checksum is another")
    lengths, names = tensors["lengths"].tolist(), json.loads(notes["sources"])
    ids, labels = ([r.tolist() for r in tensors[k].split(lengths)] for k in ("input_ids", "labels"))
    examples = [Tokens(input_ids=i, labels=l) for i, l in zip(ids, labels, strict=True)]  # noqa: E741
    for example, number in zip(examples, tensors["sources"].tolist(), strict=True):
        if names[number]:
            example["source"] = names[number]
    return examples, LengthReport(**json.loads(notes["report"]))


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().tobytes(), value)
    return str(value)
