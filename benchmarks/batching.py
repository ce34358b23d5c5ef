"""Ways to make batches of real records: padding, time per real token, peak memory, same numbers.

    python benchmarks/batching.py [--data ../shared/data/alpaca_en_demo.json --rounds 5 --json]

Batches of 8 records with the Alpaca prompt, tokenised by the embedded base's tokenizer: "random"
pads 8 records that come together by chance to the longest of them, "grouped" pads 8 of similar
length, "block mask" concatenates the random 8 into one row for the attention of transformers, which
makes a mask of all pairs of tokens, and "packed, random" is the same row with our attention.
"packed", the default, is 8 records chosen so that rows hold nearly the same number of tokens, and
"packed, budget" fills rows up to as many tokens as 8 records have on average.

Padding is counted over an epoch of all records. Time is forward and backward of a random Llama with
LoRA on the CPU, one thread, process time, all sides in shuffled turns, per real token and relative
to "random": of medians and of minima; the last row runs "random" against itself. The peak is what
the allocator held at most above the model in the worst batch, from the profiler's allocator events,
so it does not vary. Loss and gradients of the worst batch are compared first.
"""

import argparse
import json
import platform
import random
import statistics
import time
from typing import Any

import torch
import transformers
from chunked_loss import adapted, peak
from torch import nn

from lit_adapters.base_model import load_tokenizer
from lit_adapters.data import TrainOrder, collate
from lit_adapters.datamodule import InstructionDataModule
from lit_adapters.model_loss import ModelLoss
from lit_adapters.packed_rows import keep_rows_apart

SIZE = 8
Batch = dict[str, Any]
Examples = list[list[Any]]
WAYS = {  # the order of examples, whether rows are packed, the attention
    "random": ("random", False, "sdpa"),
    "grouped": ("grouped", False, "sdpa"),
    "block mask": ("random", True, "sdpa"),
    "packed, random": ("random", True, "blockwise_sdpa"),
    "packed": ("even", True, "blockwise_sdpa"),
    "packed, budget": ("budget", True, "blockwise_sdpa"),
    "random, again": ("random", False, "sdpa"),
}


def orders(examples: list[Any]) -> dict[str, Examples]:
    """The examples of every batch of an epoch."""
    lengths = [len(example["input_ids"]) for example in examples]
    budget = max(SIZE * sum(lengths) // len(lengths), max(lengths))
    plain = TrainOrder(lengths, SIZE, group_by_length=False)
    chosen = {
        "random": plain,
        "grouped": TrainOrder(lengths, SIZE),
        "even": TrainOrder(lengths, SIZE, packed=True),
        "budget": TrainOrder(lengths, SIZE, batch_tokens=budget, packed=True),
    }
    return {
        name: [[examples[i] for i in batch] for batch in order.batches(0)]
        for name, order in chosen.items()
    }


def real_tokens(batch: list[Any]) -> int:
    return sum(len(example["input_ids"]) for example in batch)


class Side:
    """One way to make batches, and a training step on them."""

    def __init__(self, model: Any, way: str, by_order: dict[str, Examples]) -> None:
        order, self.packed, self.attention = WAYS[way]
        self.model = model
        self.epoch = by_order[order]
        self.loss = ModelLoss()

    def batch(self, examples: list[Any]) -> Batch:
        """Make a batch of these examples."""
        return collate(examples, 0, self.packed)

    def step(self, batch: Batch) -> torch.Tensor:
        """Forward and backward; return the summed loss."""
        self.model.set_attn_implementation(self.attention)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        sums = self.loss(self.model, {**inputs, "use_cache": False}, batch["labels"], False)
        sums.nll.backward()
        return sums.nll.detach()

    def padding(self) -> float:
        """Positions per real token over an epoch."""
        positions = sum(self.batch(examples)["input_ids"].numel() for examples in self.epoch)
        return positions / sum(map(real_tokens, self.epoch))

    def peak(self) -> float:
        """MB above the model in the epoch's worst batch."""
        worst = max(self.epoch, key=lambda e: self.batch(e)["input_ids"].numel())
        batch = self.batch(worst)
        return peak(self.model, lambda: self.step(batch))


def race(sides: dict[str, Side], rounds: int, count: int) -> dict[str, list[float]]:
    """Process seconds per real token of each side and round; every round takes other batches."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds + 1):  # the first warms up
        random.shuffle(names)
        for name in names:
            side = sides[name]
            chosen = [side.epoch[(turn * count + i) % len(side.epoch)] for i in range(count)]
            batches = [side.batch(examples) for examples in chosen]
            start = time.process_time()
            for batch in batches:
                side.step(batch)
                side.model.zero_grad()
            spent = time.process_time() - start
            if turn:
                seconds[name].append(spent / sum(map(real_tokens, chosen)))
    return seconds


def differences(sides: dict[str, Side]) -> dict[str, float]:
    """The largest relative deviation of loss and gradients from "random", on one batch."""
    examples = sides["random"].epoch[0]
    found = {}
    for name, side in sides.items():
        side.model.zero_grad()
        loss = side.step(side.batch(examples))
        grads = [p.grad.clone() for p in side.model.parameters() if p.grad is not None]
        found[name] = [loss, *grads]
    expected = found["random"]
    return {
        name: max(((a - b).norm() / b.norm()).item() for a, b in zip(mine, expected, strict=True))
        for name, mine in found.items()
    }


def measure(model: nn.Module, examples: list[Any], rounds: int, count: int) -> list[dict[str, str]]:
    by_order = orders(examples)
    sides = {way: Side(model, way, by_order) for way in WAYS}
    off = differences(sides)
    seconds = race(sides, rounds, count)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    least = {name: min(values) for name, values in seconds.items()}
    peaks = {name: side.peak() for name, side in sides.items()}
    return [
        {
            "batches": name,
            "positions per real token": f"{side.padding():.2f}",
            "time, medians": f"{middle[name] / middle['random']:.2f}",
            "time, minima": f"{least[name] / least['random']:.2f}",
            "spread": f"{max(seconds[name]) / least[name] - 1:.2f}",
            "ms per 1000 tokens": f"{middle[name] * 1e6:.0f}",
            "peak": f"{peaks[name] / peaks['random']:.2f}",
            "peak, MB": f"{peaks[name]:.0f}",
            "off by": f"{off[name]:.0e}",
        }
        for name, side in sides.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/alpaca_en_demo.json")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2, help="of each side in each round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = InstructionDataModule(
        options.data, tokenizer=load_tokenizer("tiny"), max_length=options.max_length, val_size=0
    )
    data.setup("fit")
    model = adapted(options.hidden, options.layers, options.vocabulary, whole=False)
    assert keep_rows_apart(model) is None
    rows = measure(model, data.train_dataloader().examples, options.rounds, options.batches)
    report(rows, options)


def report(rows: list[dict[str, str]], options: argparse.Namespace) -> None:
    setting = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "hidden": options.hidden,
        "layers": options.layers,
        "vocabulary": options.vocabulary,
        "max length": options.max_length,
    }
    if options.json:
        print(json.dumps({"setting": setting, "rows": rows}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in setting.items()) + "\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
