"""Estimated peaks beside measured ones.

    python benchmarks/estimate.py [--device cpu|cuda] [--only NAME ...] [--json FILE]

For each configuration, a child process trains a random Llama with the real trainer and measures
the peak of three steps: the tensors that are there when the first begins, and the most that the
allocator handed out above that, from the profiler's allocator events, so the figure does not vary.
On CUDA it is ``torch.cuda.max_memory_allocated``. The estimate sees config.json alone. Exit status
1 if a ratio is outside 0.85 to 1.15.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, Trainer
from machine import named
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_adapters import DoRA, FullFineTuning, GaLore, InitAdapters, LoRA, PiSSA
from lit_adapters.data.batches import collate
from lit_adapters.data.tokens import Tokens
from lit_adapters.estimate import Rehearsal, Training, estimate
from lit_adapters.module import AdapterFineTuneModule

LOWEST, HIGHEST = 0.85, 1.15
SMALL = {"hidden": 256, "layers": 6, "vocabulary": 8_000, "batch": 4, "length": 128}
WIDE = {"hidden": 512, "layers": 6, "vocabulary": 32_000, "batch": 2, "length": 256}
LONG = {"hidden": 256, "layers": 8, "vocabulary": 8_000, "batch": 2, "length": 512}
MANY = {"hidden": 256, "layers": 6, "vocabulary": 64_000, "batch": 8, "length": 64}
QUANTISED = {"hidden": 512, "layers": 6, "vocabulary": 8_000, "batch": 4, "length": 128}

# Name: sizes, then settings of the module (as code would give them) and of the trainer.
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "LoRA": (SMALL, {"adapter": LoRA(rank=8)}),
    "LoRA, wide": (WIDE, {"adapter": LoRA(rank=16)}),
    "LoRA, all logits": (WIDE, {"adapter": LoRA(rank=8), "loss": "full"}),
    "LoRA, large vocabulary": (MANY, {"adapter": LoRA(rank=8)}),
    "LoRA, checkpointing": (LONG, {"adapter": LoRA(rank=8), "gradient_checkpointing": True}),
    "LoRA, dropout": (SMALL, {"adapter": LoRA(rank=8, dropout=0.1)}),
    "LoRA, bf16-true": (WIDE, {"adapter": LoRA(rank=8), "precision": "bf16-true"}),
    "LoRA, bf16-mixed": (WIDE, {"adapter": LoRA(rank=8), "precision": "bf16-mixed"}),
    "DoRA": (SMALL, {"adapter": DoRA(rank=8)}),
    "PiSSA, pinned": (SMALL, {"adapter": LoRA(rank=32), "initialiser": PiSSA()}),
    "full": (SMALL, {"adapter": FullFineTuning()}),
    "full, wide": (WIDE, {"adapter": FullFineTuning()}),
    "full, checkpointing": (LONG, {"adapter": FullFineTuning(), "gradient_checkpointing": True}),
    "full, bf16-mixed": (WIDE, {"adapter": FullFineTuning(), "precision": "bf16-mixed"}),
    "full, accumulating": (SMALL, {"adapter": FullFineTuning(), "accumulate": 2}),
    "GaLore": (WIDE, {"adapter": FullFineTuning(), "galore": 32}),
    "GaLore, checkpointing": (
        LONG,
        {"adapter": FullFineTuning(), "galore": 16, "gradient_checkpointing": True},
    ),
    "QLoRA": (QUANTISED, {"adapter": LoRA(rank=8), "quantization": "nf4"}),
    "QLoRA, bf16, checkpointing": (
        QUANTISED,
        {
            "adapter": LoRA(rank=8),
            "quantization": "nf4",
            "precision": "bf16-true",
            "gradient_checkpointing": True,
        },
    ),
}
OF_TRAINER = ("precision", "accumulate", "galore", "initialiser")


def training(name: str, base: str, device: str) -> Training:
    sizes, settings = CASES[name]
    given = {key: value for key, value in settings.items() if key not in OF_TRAINER}
    rank = settings.get("galore")
    return Training(
        module=AdapterFineTuneModule(base=base, **given),
        batch_size=sizes["batch"],
        max_length=sizes["length"],
        precision=settings.get("precision", "32-true"),
        accumulate=settings.get("accumulate", 1),
        clip=True,
        # A new subspace at every step, so that the measured one has it.
        galore=None if rank is None else GaLore(rank=rank, update_gap=1),
        initialiser=settings.get("initialiser"),
        device=device,
    )


def config(sizes: dict[str, int]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["hidden"] * 11 // 4,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["hidden"] // 64,
        num_key_value_heads=sizes["hidden"] // 64,
        tie_word_embeddings=False,
    )


# --- the child process ---------------------------------------------------------------------------


class Recorder(Callback):
    """Measures from the first batch to the last one."""

    peak = 0

    def __init__(self, last: int) -> None:
        self.last = last
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Start."""
        if index != 0:
            return
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        self.before = held()
        self.profile.start()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Stop, and keep the peak."""
        if index != self.last:
            return
        if module.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
            return
        self.profile.stop()
        self.peak = self.before + handed_out(self.profile)


def held() -> int:
    """Bytes of all tensors that Python knows."""
    gc.collect()
    tensors = (t for t in gc.get_objects() if isinstance(t, torch.Tensor))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storages = (t.untyped_storage() for t in tensors if t.device.type == "cpu")
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def handed_out(recorded: profile) -> int:
    """The most that the allocator gave above what it had given before, bytes."""
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(name: str, base: str, device: str) -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    one = training(name, base, device)
    tokens = [Tokens(input_ids=[1] * one.max_length, labels=[1] * one.max_length)]
    rows = tokens * one.batch_size * one.accumulate * 3
    recorder = Recorder(last=3 * one.accumulate - 1)
    trainer = Trainer(
        accelerator={"cuda": "gpu"}.get(device, device),
        devices=1,
        precision=one.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=one.accumulate,
        gradient_clip_val=1.0,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            recorder,
            InitAdapters(one.initialiser),
            *([one.galore] if one.galore else []),
        ],
    )
    loader = DataLoader(rows, one.batch_size, collate_fn=lambda rows: collate(rows, 0))  # type: ignore[arg-type]
    trainer.fit(one.module, loader)
    return recorder.peak


# --- all of them ---------------------------------------------------------------------------------


def compare(name: str, device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config(CASES[name][0])).save_pretrained(folder)
        found = estimate(Rehearsal(training(name, folder, device)))
        command = [sys.executable, __file__, "--child", name, "--base", folder]
        done = subprocess.run(
            [*command, "--device", device], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    measured = json.loads(done.stdout.splitlines()[-1])
    return {
        "configuration": name,
        "estimate, MB": round(found.peak / 1e6, 2),
        "measured, MB": round(measured / 1e6, 2),
        "ratio": round(found.peak / measured, 3),
        "peak in": found.stage,
    }


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(measure(options.child, options.base, options.device))
        return
    machine = named(options.device, "lightning", "transformers", "bitsandbytes")
    print(f"{machine}. Peak of a step of a random Llama, MB.\n")
    rows: list[dict[str, Any]] = []
    for name in options.only:
        rows.append(compare(name, options.device))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |")
            print("|" + " --- |" * len(rows[0]))
        print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    wrong = [row["configuration"] for row in rows if not LOWEST <= row["ratio"] <= HIGHEST]
    if wrong:
        sys.exit(f"outside {LOWEST} to {HIGHEST}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
