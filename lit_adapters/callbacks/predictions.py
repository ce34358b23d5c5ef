"""Write what `predict` answers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lit_adapters.callbacks.answer_tables import metric_table
from lit_adapters.callbacks.prediction_parts import PredictionParts
from lit_adapters.callbacks.sample_files import write_json, write_whole
from lit_adapters.data import PromptLoader
from lit_adapters.fingerprint import fingerprint, sampled
from lit_adapters.metrics import Answer, ExactMatch, TextMetric, score, score_by_task
from lit_adapters.spread import whole
from lit_adapters.trained_state import trained_tensors

SAMPLES = 4096  # values of each trained tensor that tell one training from another


class PredictionWriter(Callback):
    """Write predictions, one JSON object a line with its scores, to a file.

    Rows are in the order of the data, whatever the number of ranks. The file is put in place when
    it is complete; until then its rows gather in ``.part`` files beside it. Where a run of the
    same model, data and settings was broken off, the next goes on from these.

    Args:
        path: The file; ``predictions.jsonl`` below ``default_root_dir`` if null. Scores over all
            answers go to a file beside it that ends in ``.scores.json``.
        metrics: Scores besides exact match, such as ``lit_adapters.metrics.ROUGE``.
    """

    def __init__(self, path: str | None = None, metrics: list[TextMetric] | None = None) -> None:
        self.path = path
        self.metrics = [ExactMatch(), *(metrics or [])]
        self.parts: PredictionParts | None = None
        self.counts = (0, 0)  # rows found, rows added on this rank

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what a broken run has answered already."""
        loader = trainer.predict_dataloaders
        if not isinstance(loader, PromptLoader):
            raise TypeError(
                "PredictionWriter writes the answers to the prompts of an InstructionDataModule; "
                f"the trainer predicts on a {type(loader).__name__}. Leave the callback out and "
                "take what trainer.predict returns, or let predict_dataloader return a PromptLoader"
            )
        if not all(hasattr(pl_module, name) for name in ("model", "max_new_tokens")):
            raise TypeError(
                "PredictionWriter tells by the module's `model` and `max_new_tokens` whether a "
                f"broken run may go on, and {type(pl_module).__name__} lacks them: predict with an "
                "AdapterFineTuneModule on your model, or give the module both"
            )
        key = _key(trainer, pl_module, loader)
        file = Path(self.path or Path(trainer.default_root_dir) / "predictions.jsonl")
        if file.is_dir():
            raise ValueError(
                f"predictions cannot be written to {file}, a folder; name a file in it"
            )
        self.parts = PredictionParts(file, key)
        found: list[int] = []
        if trainer.is_global_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = self.parts.read()
            found = list(rows)
            if self.parts.existing():
                total = len(loader.examples)
                goes_on = f"{len(rows)} of {total} predictions are there already; going on"
                other = "an unfinished prediction of another model, data or settings is left out"
                Console().print(goes_on if rows else other)
            self.parts.start_over(rows.values())
        loader.answered = frozenset(trainer.strategy.broadcast(found))
        self.counts = len(loader.answered), 0
        self.parts.open(trainer.global_rank)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of a batch."""
        if self.parts is not None:
            self.parts.add(outputs)
            found, added = self.counts
            self.counts = found, added + len(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score all rows and put the file in place."""
        if self.parts is None:
            return
        parts, self.parts = self.parts, None
        parts.close()
        found, added = self.counts
        counted = torch.tensor(added, device=pl_module.device)
        total = found + int(trainer.strategy.reduce(counted, reduce_op="sum"))  # waits for all
        if trainer.is_global_zero:
            self._finish(parts, total)
        trainer.strategy.barrier("PredictionWriter")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the parts for the next run."""
        if self.parts is not None:
            self.parts.close()
            if trainer.is_global_zero:
                kept = len(self.parts.read())
                Console().print(f"{kept} predictions are kept; the same command goes on from there")
            self.parts = None

    def _finish(self, parts: PredictionParts, total: int) -> None:
        rows = parts.read()
        if len(rows) != total:
            raise RuntimeError(
                f"{len(rows)} of {total} predictions are in {parts.file.parent}: other machines "
                "have written theirs elsewhere; give --predictions.path a folder they all share"
            )
        answers = [
            Answer(
                row["prompt"],
                row["prediction"],
                row["reference"],
                row["task"],
                row.get("source", ""),
            )
            for row in rows.values()
        ]
        scored = (
            {**row, "metrics": score(answer, self.metrics)}
            for row, answer in zip(rows.values(), answers, strict=True)
        )
        write_whole(parts.file, (json.dumps(row, ensure_ascii=False) + "\n" for row in scored))
        scores = score_by_task(answers, self.metrics)
        plain = {t: {n: v._asdict() for n, v in own.items()} for t, own in scores.items()}
        write_json(parts.file.with_suffix(".scores.json"), {"answers": plain})
        parts.remove()
        console = Console()
        if scores:
            console.print(metric_table("Scores of the predictions", {"score": scores}))
        console.print(f"{len(rows)} predictions written to {parts.file}")


def _key(trainer: Trainer, pl_module: LightningModule, loader: PromptLoader) -> str:
    """Return a digest of all that predictions depend on."""
    model: Any = pl_module.model
    digest = hashlib.sha256(fingerprint(model).encode())
    for name, tensor in trained_tensors(model).items():
        sample = sampled(whole(tensor, tensor), SAMPLES)
        digest.update(name.encode() + sample.float().numpy().tobytes())
    settings = (pl_module.max_new_tokens, trainer.limit_predict_batches, str(trainer.precision))
    examples = [(e.task, e.prompt, e.response) for e in loader.examples]
    read = (list(loader.ids), loader.stop)  # as the tokenizer says
    digest.update(json.dumps([settings, examples, read]).encode())
    return digest.hexdigest()
