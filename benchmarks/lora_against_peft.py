"""LoRA beside PEFT on one model: training step, its peak, attach, save, load; ratios of one run.

    python benchmarks/lora_against_peft.py [--hidden 512 --layers 8 --rounds 15 --json]

A random Llama on the CPU, one thread, process time, both sides in shuffled turns. Loss and
gradients are compared first, on the same weights. The ratio is of the minima; the A/A row runs our
own step against itself and shows how far the ratio strays by chance.
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from lit_adapters import LoRA, attach, load_adapter, save_adapter

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(hidden: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
        )
    ).train()


def with_peft(model: nn.Module, dropout: float) -> nn.Module:
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS)
    return peft.get_peft_model(model, config)


def with_ours(model: nn.Module, dropout: float) -> nn.Module:
    attach(model, LoRA(rank=8, alpha=16, dropout=dropout, targets=TARGETS))
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, ids: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4, fused=True)

    def run() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def race(
    sides: dict[str, Callable[[], object]], rounds: int, prepare: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of process time of each side, in shuffled turns after two warm-ups."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(rounds + 2):
        random.shuffle(order)
        for name in order:
            prepare()
            start = time.process_time()
            sides[name]()
            if turn >= 2:
                seconds[name].append(time.process_time() - start)
    return seconds


def row(name: str, seconds: dict[str, list[float]]) -> dict[str, float | str]:
    ours, peer = seconds.values()
    return {
        "work": name,
        "ratio of minima": round(min(ours) / min(peer), 3),
        "ratio of medians": round(statistics.median(ours) / statistics.median(peer), 3),
        "ours, s": round(min(ours), 4),
        "peer, s": round(min(peer), 4),
        "spread of ours": round(max(ours) / min(ours) - 1, 2),
    }


def peak(model: nn.Module, ids: Tensor) -> float:
    """Bytes above the model at the peak of a step, by the allocator's events."""

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())])
    return held.cumsum(0).max().item()


def peaks(
    bare: nn.Module, ids: Tensor, dtype: torch.dtype, dropout: float
) -> dict[str, float | str]:
    both = []
    for make in (with_ours, with_peft):
        model = make(copy.deepcopy(bare).to(dtype), dropout)
        for parameter in trained(model):
            parameter.data = parameter.data.float()
        both.append(peak(model, ids) / 1e6)
    name = f"peak of a step above the model, {str(dtype)[6:]}, dropout {dropout}"
    return {"work": name, "ratio": round(both[0] / both[1], 3), "ours, MB": round(both[0], 1)}


def same_numbers(ours: nn.Module, theirs: nn.Module, ids: Tensor) -> dict[str, float]:
    """Copy our factors across, then compare loss and gradients."""
    mine = {n.replace("adapter.", ""): p for n, p in ours.named_parameters() if p.requires_grad}
    pairs = []
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").replace(".default.weight", "")
            parameter.data.copy_(mine[key])
            pairs.append((mine[key], parameter))
    for factor, other in pairs:  # a start away from zero, so that both factors get gradients
        if not factor.any():
            other.data.copy_(factor.data.normal_(std=0.02))
    losses = [m(input_ids=ids, labels=ids, use_cache=False).loss for m in (ours, theirs)]
    for loss in losses:
        loss.backward()
    return {
        "loss difference": (losses[0] - losses[1]).abs().item(),
        "largest gradient difference": max((a.grad - b.grad).abs().max().item() for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bare = base(options.hidden, options.layers, options.vocabulary)
    ids = torch.randint(options.vocabulary, (2, 256))
    ours, theirs = with_ours(copy.deepcopy(bare), 0.0), with_peft(copy.deepcopy(bare), 0.0)
    parity = same_numbers(ours, theirs, ids)
    rows = []
    for dropout in (0.0, 0.05):
        sides = {
            "ours": step(with_ours(copy.deepcopy(bare), dropout), ids),
            "peft": step(with_peft(copy.deepcopy(bare), dropout), ids),
        }
        rows.append(row(f"training step, dropout {dropout}", race(sides, options.rounds)))
    twice = [step(with_ours(copy.deepcopy(bare), 0.0), ids) for _ in range(2)]
    rows.append(
        row("A/A: ours against ours", race(dict(zip("AB", twice, strict=True)), options.rounds))
    )
    held = [
        peaks(bare, ids, dtype, dropout)
        for dtype in (torch.float32, torch.bfloat16)
        for dropout in (0.0, 0.05)
    ]
    with tempfile.TemporaryDirectory() as folder:
        mine, other = Path(folder) / "ours", Path(folder) / "peft"
        save = {
            "ours": lambda: save_adapter(ours, mine),
            "peft": lambda: theirs.save_pretrained(other),
        }
        rows.append(row("save", race(save, options.rounds)))
        fresh: list[nn.Module] = []
        attach_ = {
            "ours": lambda: with_ours(fresh.pop(), 0.0),
            "peft": lambda: with_peft(fresh.pop(), 0.0),
        }
        rows.append(
            row("attach", race(attach_, options.rounds, lambda: fresh.append(copy.deepcopy(bare))))
        )
        load = {
            "ours": lambda: load_adapter(fresh.pop(), mine),
            "peft": lambda: peft.PeftModel.from_pretrained(fresh.pop(), other),
        }
        rows.append(
            row("load", race(load, options.rounds, lambda: fresh.append(copy.deepcopy(bare))))
        )
    report(parity, rows, held, options.json)


Rows = list[dict[str, float | str]]


def report(parity: dict[str, float], rows: Rows, held: Rows, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"parity": parity, "rows": rows, "memory": held}, indent=2))
        return
    console = Console()
    console.print({name: f"{value:.1e}" for name, value in parity.items()})
    for entries in (rows, held):
        table = Table(
            title=f"lit_adapters / PEFT {peft.__version__}, torch {torch.__version__}, CPU"
        )
        for column in entries[0]:
            table.add_column(column, justify="left" if column == "work" else "right")
        for entry in entries:
            table.add_row(*map(str, entry.values()))
        console.print(table)


if __name__ == "__main__":
    main()
