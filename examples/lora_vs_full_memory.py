"""The memory question of the study: what fits a given memory, and how fast it trains.

The largest batch comes from the estimate, which counts tensors as ``python -m lit_adapters
estimate`` does; the speed is measured in real steps of that batch, sequences full and all trained.
"""

import time
from functools import partial
from statistics import median

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lit_adapters.adapters import AdapterSpec
from lit_adapters.data.batches import collate
from lit_adapters.data.tokens import Tokens
from lit_adapters.estimate.estimation import largest_batch, peaks_of
from lit_adapters.estimate.rehearsal import Rehearsal
from lit_adapters.estimate.shapes import Training
from lit_adapters.module import AdapterFineTuneModule

LENGTH = 256  # tokens of a sequence
STEPS = 6  # of which the first warms up


class Clock(Callback):
    """Processor time at the end of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        """Note the time."""
        self.times.append(time.process_time())


def fitting_batch(adapter: AdapterSpec, memory: int) -> int:
    """Return the largest batch whose step needs at most ``memory`` bytes; 0 if there is none."""
    training = Training(AdapterFineTuneModule("tiny", adapter), 8, LENGTH, clip=True)
    rehearsal = Rehearsal(training)
    return largest_batch(partial(peaks_of, rehearsal), memory, 8, rehearsal.farthest)


def speed(adapter: AdapterSpec, batch_size: int) -> float:
    """Return tokens per second of processor time, the median of a few steps."""
    torch.manual_seed(0)
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    ids = torch.randint(10, 500, (STEPS * batch_size, LENGTH)).tolist()
    rows = [Tokens(input_ids=row, labels=row) for row in ids]
    loader = DataLoader(rows, batch_size, collate_fn=partial(collate, pad_id=0))  # type: ignore[arg-type]
    trainer.fit(AdapterFineTuneModule("tiny", adapter), loader)
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return batch_size * LENGTH / median(steps)
