"""Whole trainings on real records: our `fit`, transformers' Trainer + PEFT, TRL + PEFT, packed.

    python benchmarks/end_to_end.py [--data ../shared/data/alpaca_en_demo.json --records 20
                                     --rounds 2 --vocabulary 32000 --json]

Every side trains LoRA (rank 8, all linear layers, fused AdamW, no clipping) on the same records for
one epoch, from the same random Llama, with its tokenizer's limit of --max-length. Ours is the
Lightning Trainer with the module and data module of this library at their defaults; Trainer pads to
the longest of a batch; TRL packs rows of --max-length, as many a batch as come nearest to the
tokens of our batches, and "filled by tokens" gives our batches the same number of tokens. With
--base tiny it is the embedded base that is trained, which can learn in so few steps.

Timed is what lies between the trainers' own "training begins" and "training ends", in process time
of one thread, per real token; turns are shuffled. The peak is the allocator's, above the model, in
a whole training. The loss is that of the held-out records afterwards, per token, computed by one
function for all. Orders of records differ, so losses agree to about two digits only.
"""

import argparse
import io
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from measuring import Times, against, most_held, seconds_of
from peers import Example, Settings, clocked, with_trainer, with_trl
from reporting import Row, parser, publish
from rivals import llama
from torch import nn
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from lit_adapters import AdapterFineTuneModule, InstructionDataModule, LoRA
from lit_adapters.base_model import load_tokenizer, resolve_base

OURS, AGAIN, PADDED, PACKED = "ours", "ours again (A/A)", "Trainer + PEFT", "TRL + PEFT, packed"
FILLED = "ours, filled by tokens"


@dataclass
class Clock:
    """Measures between `start` and `stop`: seconds, or the peak."""

    peaks: bool = False
    spent: float = 0.0
    wall: float = 0.0
    peak: int = 0
    recorded: Any = field(default=None, repr=False)

    def start(self) -> None:
        """Called when training begins."""
        if self.peaks:
            self.recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.recorded.start()
        self.spent, self.wall = -time.process_time(), -time.perf_counter()

    def stop(self) -> None:
        """Called when it ends."""
        self.spent += time.process_time()
        self.wall += time.perf_counter()
        if self.peaks:
            self.recorded.stop()
            self.peak, self.recorded = most_held(self.recorded), None


class Clocked(Callback):
    """Tells a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start."""
        self.clock.start()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Stop."""
        self.clock.stop()


Train = Callable[[nn.Module, Clock], nn.Module]


def ours(
    data: dict[str, Any], tokenizer: Any, settings: Settings, model: nn.Module, clock: Clock
) -> nn.Module:
    """Train as `fit` does; return the model."""
    module = AdapterFineTuneModule(
        model,
        LoRA(settings.rank, 2 * settings.rank),
        tokenizer=tokenizer,
        optimizer=lambda groups: AdamW(groups, lr=settings.lr, weight_decay=0.0),
        lr_scheduler="constant",
        warmup=0,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=settings.epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clocked(clock)],
    )
    trainer.fit(module, InstructionDataModule(tokenizer=tokenizer, cache_dir=None, **data))
    return module.model


def peers(
    train: Callable[..., nn.Module],
    examples: Sequence[Example],
    tokenizer: Any,
    settings: Settings,
    model: nn.Module,
    clock: Clock,
) -> nn.Module:
    return train(model, tokenizer, examples, settings, clocked(clock.start, clock.stop))


@torch.no_grad()
def held_out_loss(model: Any, examples: Sequence[Example]) -> float:
    """Mean over all trained tokens of the examples, one at a time."""
    model.eval()
    total, count = 0.0, 0
    for example in examples:
        ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
        tokens = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * tokens
        count += tokens
    return total / count


def records(options: argparse.Namespace, folder: Path) -> None:
    """Write the files of training and held-out records."""
    found = json.loads(Path(options.data).read_text())
    random.Random(0).shuffle(found)
    if len(found) < options.records + options.held_out:
        raise SystemExit(f"{options.data} has {len(found)} records; lower --records or --held-out")
    parts = found[: options.records], found[options.records :][: options.held_out]
    for name, part in zip(("train", "validation"), parts, strict=True):
        (folder / f"{name}.json").write_text(json.dumps(part))


def encoded(data: dict[str, Any], tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples as all sides see them."""
    module = InstructionDataModule(tokenizer=tokenizer, cache_dir=None, **data)
    module.setup("fit")
    loaders = module.train_dataloader(), module.val_dataloader()
    train, held_out = (
        [{key: list(one[key]) for key in ("input_ids", "labels")} for one in loader.examples]
        for loader in loaders
    )
    return train, held_out


def sides(
    data: dict[str, Any], tokenizer: Any, examples: list[Example], options: argparse.Namespace
) -> dict[str, tuple[Train, str | None]]:
    settings = Settings(batch_size=options.batch_size, lr=options.lr)
    tokens = sum(len(e["input_ids"]) for e in examples) / len(examples) * options.batch_size
    rows = max(1, round(tokens / options.max_length))
    filled = {**data, "batch_tokens": rows * options.max_length}
    fit = partial(ours, data, tokenizer, settings)
    found: dict[str, tuple[Train, str | None]] = {
        OURS: (fit, PADDED),
        AGAIN: (fit, OURS),
        PADDED: (partial(peers, with_trainer, examples, tokenizer, settings), None),
        FILLED: (partial(ours, filled, tokenizer, settings), PADDED),
    }
    if find_spec("trl") is not None:
        packed = Settings(batch_size=rows, lr=options.lr)
        train = partial(with_trl, row=options.max_length)
        found[FILLED] = (found[FILLED][0], PACKED)
        found[PACKED] = (partial(peers, train, examples, tokenizer, packed), None)
    return found


def measure(
    all_sides: dict[str, tuple[Train, str | None]],
    new: Callable[[], nn.Module],
    held_out: list[Example],
    rounds: int,
    tokens: int,
) -> tuple[list[Row], dict[str, Times]]:
    times = {name: Times() for name in all_sides}
    peaks, losses = {}, {}
    for name, (train, _) in all_sides.items():
        clock = Clock(peaks=True)
        losses[name] = held_out_loss(train(new(), clock), held_out)
        peaks[name] = clock.peak
    for _ in range(rounds):
        for name in random.sample(list(all_sides), len(all_sides)):
            clock = Clock()
            all_sides[name][0](new(), clock)
            times[name].add(clock.spent, clock.wall)
    rows = []
    for name, (_, peer) in all_sides.items():
        ratio = against(times[name], times[peer]) if peer else {}
        rows.append(
            {
                "training": name,
                "real tokens/s": tokens / times[name].median,
                "compared with": peer or "",
                "time, minima": ratio.get("minima"),
                "medians": ratio.get("medians"),
                "wall": ratio.get("wall"),
                "spread": times[name].spread,
                "peak, MB": peaks[name] / 1e6,
                "peak / peer": peaks[name] / peaks[peer] if peer else None,
                "held-out loss": losses[name],
            }
        )
    return rows, times


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what trainers say of themselves."""
    known = [logging.getLogger(n) for n in ("lightning.pytorch", "lit_adapters", "transformers")]
    levels = [logger.level for logger in known]
    for logger in known:
        logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(known, levels, strict=True):
            logger.setLevel(level)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "end_to_end")
    made.add_argument("--data", default="../shared/data/alpaca_en_demo.json")
    sizes = {"records": 20, "held_out": 8, "max_length": 1024, "batch_size": 8}
    sizes |= {"hidden": 256, "layers": 2, "vocabulary": 32000, "rounds": 2}
    for name, value in sizes.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--base", default="random", help="random, tiny or a folder")
    return made.parse_args(arguments)


def run(
    options: argparse.Namespace, folder: Path
) -> tuple[list[Row], dict[str, Times], int, float]:
    """The table, every turn, the number of tokens, and the loss before."""
    (folder / "records").mkdir()
    records(options, folder / "records")
    tokenizer = load_tokenizer("tiny" if options.base == "random" else options.base)
    base = str(folder) if options.base == "random" else resolve_base(options.base)
    if options.base == "random":
        more = {"max_position_embeddings": options.max_length, "pad_token_id": 0}
        llama(options.hidden, options.layers, options.vocabulary, **more).save_pretrained(base)

    def new() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return model

    data = {"path": str(folder / "records"), "batch_size": options.batch_size}
    data["max_length"] = options.max_length
    examples, held_out = encoded(data, tokenizer)
    tokens = sum(len(example["input_ids"]) for example in examples)
    all_sides = sides(data, tokenizer, examples, options)
    before = held_out_loss(new(), held_out)
    rows, times = measure(all_sides, new, held_out, options.rounds, tokens)
    return rows, times, tokens, before


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as name, quiet():
        rows, times, tokens, before = run(options, Path(name))
    packages = ["lightning", "transformers", "peft"]
    notes = (
        f"{options.records} records, {tokens:,} tokens. Process time of one thread. The loss was "
        f"{before:.3f} before."
    )
    if PACKED in times:
        packages.append("trl")
    else:
        notes += " TRL is not installed, so its row is missing: pip install 'lit_adapters[bench]'."
    size = f"a random Llama of {options.layers} x {options.hidden}"
    options.data = Path(options.data).name
    publish(
        options,
        packages,
        {f"One epoch of LoRA on {size if options.base == 'random' else options.base}": rows},
        notes,
        tokens=tokens,
        loss_before=before,
        seconds=seconds_of(times),
    )


if __name__ == "__main__":
    main()
