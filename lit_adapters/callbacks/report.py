"""Two tables: what is about to be trained, and what came of it."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_adapters.callbacks.checkpoint import AdapterCheckpoint
from lit_adapters.footprint import footprint, optimizer_bytes, peak_bytes


class RunReport(Callback):
    """Print sizes when a fit starts, and losses, speed, memory and files when it ends."""

    def __init__(self) -> None:
        self.started = 0.0
        self.first_loss: Tensor | None = None
        self.trained = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what is trained and what is frozen."""
        self.started, self.first_loss, self.trained = time.perf_counter(), None, False
        sizes = footprint(pl_module)
        rows = {
            "trainable parameters": f"{sizes.trainable:,} of {sizes.total:,} ({sizes.share:.2%})",
            "frozen base": _bytes(sizes.base_bytes),
            "adapter": _bytes(sizes.adapter_bytes),
            "optimizer steps": f"{trainer.estimated_stepping_batches:,}",
        }
        _print(trainer, "Training", rows)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the loss of the first step."""
        self.trained = True
        if self.first_loss is None:
            self.first_loss = trainer.callback_metrics.get("train/loss")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the outcome."""
        metrics = trainer.callback_metrics
        rows = {
            "train loss": f"{_number(self.first_loss)} -> {_number(metrics.get('train/loss'))}",
            "validation loss": _number(metrics.get("val/loss")),
            "validation perplexity": _number(metrics.get("val/perplexity")),
            "time": f"{time.perf_counter() - self.started:.1f} s",
            "peak memory": _bytes(peak_bytes(pl_module.device)),
            "optimizer state": _bytes(sum(map(optimizer_bytes, trainer.optimizers))),
        }
        if not self.trained and trainer.ckpt_path is not None:
            rows["trained"] = (
                f"nothing: the checkpoint stands at step {trainer.global_step:,}, epoch "
                f"{trainer.current_epoch}{_where_it_ends(trainer)}"
            )
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, AdapterCheckpoint) and callback.adapter_path:
                rows["adapter folder"] = _folder(callback.adapter_path)
                if callback.last_model_path:
                    rows["to resume"] = f"--ckpt_path {_relative(Path(callback.last_model_path))}"
        _print(trainer, "Done", rows)


def _where_it_ends(trainer: Trainer) -> str:
    limits = {
        "max_steps": (trainer.global_step, trainer.max_steps),
        "max_epochs": (trainer.current_epoch, trainer.max_epochs),
    }
    reached = [
        f"{name} {limit}"
        for name, (done, limit) in limits.items()
        if limit not in (None, -1) and done >= limit
    ]  # none, if `max_time` is over or there is no batch
    return f", where {' and '.join(reached)} ends; raise it to go on" if reached else ""


def _print(trainer: Trainer, title: str, rows: dict[str, str]) -> None:
    if trainer.is_global_zero:
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows.items():
            table.add_row(*row)
        Console().print(table)


def _number(value: Tensor | None) -> str:
    return "-" if value is None else f"{value.item():.3f}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _folder(path: Path) -> str:
    weights = path / "adapter_model.safetensors"
    size = f" ({_bytes(weights.stat().st_size)})" if weights.exists() else ""
    return f"{_relative(path)}{size}"


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
