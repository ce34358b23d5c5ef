"""The loss without logits beside the loss from logits: time, peak memory, same numbers.

    python benchmarks/chunked_loss.py [--hidden 512 --layers 8 --rounds 7 --json]

Forward and backward of a random Llama with LoRA (or trained whole) on the CPU, one thread, process
time, all sides in shuffled turns. "transformers" is the loss that the model itself computes from
labels, "full" ours from logits of the trained tokens, "chunked" ours from the states before the
head. Ratios are of medians, with the spread (max / min - 1) of each side; the A/A row runs one side
against itself. The peak is what the allocator held above the model during one step, from the
profiler's allocator events, so it does not vary. Loss and gradients are compared first.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from measuring import peak_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_adapters import FullFineTuning, LoRA, attach
from lit_adapters.model_loss import ModelLoss

Step = Callable[[], Tensor]


def adapted(hidden: int, layers: int, vocabulary: int, whole: bool) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
        )
    ).train()
    attach(model, FullFineTuning() if whole else LoRA(rank=8))
    return model


def sides(model: nn.Module, ids: Tensor, labels: Tensor) -> dict[str, Step]:
    """One step each; all return the mean loss over the trained tokens."""

    def stock() -> Tensor:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def of(kind: str) -> Step:
        compute = ModelLoss(kind)  # type: ignore[arg-type]

        def run() -> Tensor:
            sums = compute(model, {"input_ids": ids, "use_cache": False}, labels, False)
            loss = sums.nll / sums.tokens
            loss.backward()
            return loss.detach()

        return run

    return {"transformers": stock, "full": of("full"), "chunked": of("auto")}


def gradients(model: nn.Module, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = step()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss, found


def peak(model: nn.Module, step: Step) -> float:
    """MB held at most above what was held before."""
    model.zero_grad()
    most = peak_of(step)
    model.zero_grad()
    return most / 1e6


def race(model: nn.Module, steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for turn in range(rounds + 1):  # the first warms up
        random.shuffle(order)
        for name in order:
            model.zero_grad()
            start = time.process_time()
            steps[name]()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def measure(name: str, model: nn.Module, steps: dict[str, Step], rounds: int) -> dict[str, object]:
    *others, ours = steps
    loss, mine = gradients(model, steps[ours])
    other, theirs = gradients(model, steps[others[0]])
    off = max(((mine[n] - g).norm() / g.norm().clamp(min=1e-12)).item() for n, g in theirs.items())
    seconds = race(model, steps, rounds)
    peaks = {side: peak(model, step) for side, step in steps.items()}
    middle = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "step": name,
        **{f"time / {side}": f"{middle[ours] / middle[side]:.2f}" for side in others},
        **{f"peak / {side}": f"{peaks[ours] / peaks[side]:.2f}" for side in others},
        "seconds": " / ".join(f"{v:.2f}" for v in middle.values()),
        "spread": " / ".join(f"{max(v) / min(v) - 1:.2f}" for v in seconds.values()),
        "peak, MB": " / ".join(f"{v:.0f}" for v in peaks.values()),
        "loss off by": f"{((loss - other).abs() / other).item():.0e}",
        "gradients off by": f"{off:.0e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for vocabulary, masked, whole in (
        (32_000, 0.0, False),
        (128_256, 0.0, False),
        (128_256, 0.5, False),
        (32_000, 0.0, True),
    ):
        model = adapted(options.hidden, options.layers, vocabulary, whole)
        ids = torch.randint(vocabulary, (2, 256))
        labels = ids.clone()
        labels[:, : int(256 * masked)] = -100
        steps = sides(model, ids, labels)
        trained = "all weights" if whole else "LoRA"
        name = f"{vocabulary // 1000}k, {1 - masked:.0%} of tokens, {trained}"
        rows.append(measure(name, model, steps, options.rounds))
        if len(rows) == 1:
            same = {side: steps["chunked"] for side in ("transformers", "full", "chunked")}
            rows.append(measure("A/A: chunked against itself", model, same, options.rounds))
    report(rows, options.json)


def report(rows: list[dict[str, object]], as_json: bool) -> None:
    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if as_json:
        print(json.dumps({"machine": machine, "rows": rows}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("Seconds, spread and peak: transformers / full / chunked.\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
