"""What it takes to start: imports, --help, and a fit up to its first step, beside a peer's script.

    python benchmarks/startup.py [--rounds 3 --json]

Each is a new Python process, in shuffled turns; seconds are what it spent on the processor, user
and system, and the ratios are of minima. The fit takes one step on the embedded base and data,
without validation, answers or progress bars, and writes its checkpoints; the peer's script
(benchmarks/peers.py) takes one step with transformers' Trainer and PEFT, or with TRL, on the same
base and on the first 64 of the same records, which it gets tokenised and neither splits nor checks,
and it writes nothing.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from measuring import Times, against, seconds_of
from reporting import Row, parser, publish

from lit_adapters import InstructionDataModule
from lit_adapters.base_model import load_base, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TORCH, AGAIN = "import torch", "import torch again (A/A)"
PEER = "peer script (Trainer + PEFT) to its first step"


def peers_files(folder: Path, count: int) -> list[str]:
    """Write the embedded base in fp32 and tokenised records; return their paths."""
    load_base("tiny").save_pretrained(folder / "base")
    tokenizer = load_tokenizer("tiny")
    tokenizer.save_pretrained(folder / "base")
    data = InstructionDataModule("tiny", tokenizer=tokenizer, max_length=256)
    data.setup("fit")
    examples = data.train_dataloader().examples[:count]
    plain = [{key: list(one[key]) for key in ("input_ids", "labels")} for one in examples]
    (folder / "examples.json").write_text(json.dumps(plain))
    return [str(folder / "base"), str(folder / "examples.json")]


def commands(folder: Path, count: int) -> dict[str, tuple[list[str], str]]:
    """What follows ``python``, and what it is compared with."""
    fit = [
        *("-m", "lit_adapters", "fit", "--config", "configs/alpaca_lora.yaml"),
        *("--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--samples.limit=0"),
        *("--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder / 'fit'}"),
    ]
    files = peers_files(folder, count)
    script = ["benchmarks/peers.py", *files, "--steps=1"]
    found = {
        TORCH: (["-c", "import torch"], TORCH),
        AGAIN: (["-c", "import torch"], TORCH),
        "import lit_adapters": (["-c", "import lit_adapters"], TORCH),
        "lit_adapters --help": (["-m", "lit_adapters", "--help"], TORCH),
        "lit_adapters fit --help": (["-m", "lit_adapters", "fit", "--help"], TORCH),
        "lit_adapters fit to its first step": (fit, PEER),
        PEER: (script, TORCH),
    }
    if find_spec("trl") is not None:
        found["peer script (TRL + PEFT) to its first step"] = ([*script, "--trl"], TORCH)
    return found


def run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds of processor and of the wall clock of one process.

    Raises:
        SystemExit: if it fails, with what it said.
    """
    before, wall = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    after, wall = os.times(), time.perf_counter() - wall
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    spent = after.children_user - before.children_user
    return spent + after.children_system - before.children_system, wall


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Times]]:
    with tempfile.TemporaryDirectory() as folder:
        found = commands(Path(folder), options.records)
        if options.only:
            wanted = {name for name in found if any(word in name for word in options.only)}
            wanted |= {found[name][1] for name in wanted} | {TORCH}
            found = {name: one for name, one in found.items() if name in wanted}
        times = {name: Times() for name in found}
        for _ in range(options.rounds):
            for name in random.sample(list(found), len(found)):
                times[name].add(*run(found[name][0]))
    rows = [
        {
            "process": name,
            "seconds": times[name].least,
            f"/ {TORCH}": against(times[name], times[TORCH])["minima"],
            "/ peer script": against(times[name], times[PEER])["minima"] if peer == PEER else None,
            "spread": times[name].spread,
        }
        for name, (_, peer) in found.items()
    ]
    return rows, times


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "startup")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--records", type=int, default=64, help="of the peers' script")
    made.add_argument("--only", nargs="*", default=[], help="processes, by a part of their name")
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    rows, times = measure(options)
    packages = [name for name in ("lightning", "transformers", "peft", "trl") if find_spec(name)]
    notes = "Processor seconds, user and system, of one process; minima."
    publish(options, packages, {"Starting": rows}, notes, seconds=seconds_of(times))


if __name__ == "__main__":
    main()
