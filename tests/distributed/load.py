"""Measures what loading costs each rank in memory (`python load.py CASES OUT`, as a rank)."""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lightning.pytorch import Trainer, seed_everything

import lit_adapters.module
from lit_adapters import AdapterFineTuneModule
from tests.data.word_tokenizer import word_tokenizer
from tests.distributed.train import STRATEGIES, built


def status(key):
    """A line of what the kernel says of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


class Measured(AdapterFineTuneModule):
    """Notes the memory that building the model takes at its peak."""

    def configure_model(self):
        gc.collect()  # the model of the case before
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        super().configure_model()
        self.peak = status("VmHWM") - before


def run(case):
    """Train nothing, for which the model is built; return bytes."""
    seed_everything(0, verbose=False)
    real = lit_adapters.module.obstacle_of
    if case.get("everywhere"):
        lit_adapters.module.obstacle_of = lambda module: "it is to be compared"
    module = Measured(case["base"], built("LoRA(rank=4)"), tokenizer=word_tokenizer())
    trainer = Trainer(
        default_root_dir=case["folder"],
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=STRATEGIES[case["strategy"]](),
        callbacks=[built(text) for text in case.get("callbacks", [])],
        logger=False,
        max_steps=0,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    try:
        trainer.fit(module, [{"input_ids": torch.ones(1, 2, dtype=torch.int64)}])
    finally:
        lit_adapters.module.obstacle_of = real
    return module.peak


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Give large tensors back when they are freed, whatever was freed before: M_MMAP_THRESHOLD.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = {name: run(case) for name, case in cases.items()}
    Path(sys.argv[2], os.environ["RANK"]).write_text(json.dumps(found))
