"""Write what `predict` returns."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console


class PredictionWriter(BasePredictionWriter):
    """Write predictions, one JSON object a line, to a file.

    Prompts and references are as the data module prepared them: cut or dropped where they are
    longer than its ``max_length``.

    Args:
        path: The file; ``predictions.jsonl`` below ``default_root_dir`` if null.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("epoch")
        self.path = path

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Any,
        batch_indices: Any,
    ) -> None:
        """Write the whole epoch's predictions in order."""
        if not trainer.is_global_zero:
            return
        file = Path(self.path or Path(trainer.default_root_dir) / "predictions.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for batch in predictions for row in batch]
        with file.open("w", encoding="utf-8") as handle:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Console().print(f"{len(rows)} predictions written to {file}")
