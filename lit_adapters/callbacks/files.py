"""Checkpoint files: written whole or not at all, and tried out before hours are spent."""

import os
import tempfile
from pathlib import Path

from lightning.pytorch import Trainer


def write_checkpoint(trainer: Trainer, filepath: str) -> None:
    """Write a trainer checkpoint, on every rank, whole or not at all.

    Raises:
        OSError: naming the file, if it cannot be written; one that was there stays.
    """
    part = Path(f"{filepath}.part")
    try:
        trainer.save_checkpoint(part, weights_only=False)  # on every rank
        if trainer.is_global_zero:
            with part.open("r+b") as handle:
                os.fsync(handle.fileno())
            part.replace(filepath)
    except BaseException as error:
        part.unlink(missing_ok=True)  # a full disk stays no fuller than it was
        if not isinstance(error, OSError):
            raise
        there = Path(filepath).exists()
        kept = "the file from before is whole" if there else "no file is there"
        raise OSError(
            error.errno,
            f"cannot write the checkpoint {filepath}: {error.strerror or error}; {kept}. "
            "Make room, or choose another folder (--checkpoint.dirpath), and resume",
        ) from error
    trainer.strategy.barrier("AdapterCheckpoint")


def check_writable(folder: Path) -> None:
    """Make ``folder`` and see that a file can be written there, before hours are spent.

    Raises:
        OSError: if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write checkpoints into {folder}: {error.strerror or error}. Choose another "
            "folder: AdapterCheckpoint(dirpath=...), --checkpoint.dirpath or "
            "--trainer.default_root_dir",
        ) from error


def is_of_a_search(path: object) -> bool:
    """Whether it is the file to which Lightning's tuner goes back; trainers keep its name."""
    return Path(str(path)).name.startswith((".lr_find_", ".scale_batch_size_"))
