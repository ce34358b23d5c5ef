"""Peak memory and time of one training step, by method, beside LoRA on the same model and batch.

    python benchmarks/memory.py [--hidden 512 --layers 8 --rounds 5 --json FILE --device auto]

A random Llama in fp32 is trained on random tokens, in one process. The peak is what weights and
optimizer state hold, counted from their tensors, plus the most that one step holds above that: from
the profiler's allocator events on a CPU, so that it does not vary, from the allocator's own maximum
on CUDA. Times are of whole steps (forward, backward, optimizer) in shuffled turns of all methods,
process time of one thread on a CPU: medians, and the spread (max / min - 1) of the turns. LoRA runs
twice: the A/A row says what a ratio of times is worth. The loss is computed in chunks of tokens
except where the row says otherwise; rank 8 on all linear layers, GaLore's is hidden / 4.

GaLore's windows that choose a new subspace are measured apart: there the gradient of a weight is
freed when its subspace is known, which with accumulation is only in the last backward pass.

The default size takes four minutes of a processor and 4 GB. benchmarks/results holds what it said.
"""

import argparse
import gc
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from machine import named
from measuring import peak_of, timed
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from lit_adapters import DoRA, FullFineTuning, LoRA, PiSSA, QPiSSA, attach, initialise
from lit_adapters.adapters import AdapterSpec
from lit_adapters.base_model import load_base
from lit_adapters.blocks import make_lean
from lit_adapters.footprint import footprint, optimizer_bytes
from lit_adapters.initialisers import Initialiser
from lit_adapters.losses import LossKind
from lit_adapters.model_loss import ModelLoss
from lit_adapters.optim import GaLoreEngine, Projection, fuse, parameter_groups
from lit_adapters.optim.projection import SVD
from lit_adapters.quantization import Kind
from lit_adapters.recompute import recompute_activations
from lit_adapters.targets import match_targets
from lit_adapters.weights import hush

Tick = Callable[[str], None]  # says what was done

PACKAGES = ("transformers", "bitsandbytes")  # whose versions are told
REFERENCE = "LoRA"
LORA = LoRA(rank=8)


@dataclass(frozen=True)
class Method:
    """What differs between two rows."""

    adapter: AdapterSpec = LORA
    start: Initialiser | None = None
    quantization: Kind | None = None
    eight_bit: bool = False
    recompute_every: int = 0
    loss: LossKind = "auto"
    galore: bool = False
    svd: SVD = "randomised"
    update_gap: int = 1_000_000  # the first step chooses, and no other
    accumulate: int = 1


WHOLE = FullFineTuning()
METHODS = {
    REFERENCE: Method(),
    "LoRA again (A/A)": Method(),
    "LoRA, loss from full logits": Method(loss="full"),
    "LoRA, every 2nd layer recomputed": Method(recompute_every=2),
    "LoRA, all layers recomputed": Method(recompute_every=1),
    "DoRA": Method(DoRA(rank=8)),
    "PiSSA (origin pinned)": Method(start=PiSSA(niter=4)),
    "QLoRA (nf4)": Method(quantization="nf4"),
    "QPiSSA (nf4)": Method(start=QPiSSA(iterations=1), quantization="nf4"),
    "full, AdamW": Method(WHOLE),
    "full, AdamW8bit": Method(WHOLE, eight_bit=True),
    "GaLore, AdamW": Method(WHOLE, galore=True),
    "GaLore, AdamW8bit": Method(WHOLE, galore=True, eight_bit=True),
}
WINDOWS = {
    "same subspace, accumulation 1": Method(WHOLE, galore=True),
    "same subspace, accumulation 4": Method(WHOLE, galore=True, accumulate=4),
    **{
        f"new subspace ({svd}), accumulation {parts}": Method(
            WHOLE, galore=True, svd=svd, update_gap=1, accumulate=parts
        )
        for svd in ("randomised", "exact")
        for parts in (1, 4)
    },
}


@dataclass
class Row:
    """What was measured of a method."""

    method: str
    trained_parameters: int
    weight_bytes: int
    galore_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """How far the turns lie apart."""
        return max(self.seconds) / min(self.seconds) - 1


@dataclass
class Job:
    """A model in training."""

    model: nn.Module
    optimizer: Optimizer
    engine: GaLoreEngine | None
    loss: ModelLoss
    micro_batches: list[Tensor]

    def step(self) -> None:
        """One optimizer step over all micro-batches."""
        last = len(self.micro_batches) - 1
        for number, ids in enumerate(self.micro_batches):
            if self.engine is not None:
                self.engine.accumulating = number < last
            sums = self.loss(self.model, {"input_ids": ids, "use_cache": False}, ids, False)
            (sums.nll / sums.tokens / (last + 1)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bytes_of_weights(self) -> int:
        """Of base and adapter."""
        sizes = footprint(self.model)
        return sizes.base_bytes + sizes.adapter_bytes

    def bytes_of_galore(self) -> int:
        """Of its subspaces, and of the shadows that stand for the weights in the optimizer."""
        projected = self.engine.projected.values() if self.engine else []
        bases = (basis for one in projected for basis in one.projector or () if basis is not None)
        return sum(t.nbytes for t in (*bases, *(one.shadow for one in projected)))


def random_base(options: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        num_key_value_heads=max(1, options.hidden // 64),
        max_position_embeddings=max(512, options.tokens),
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def build(method: Method, folder: Path, options: argparse.Namespace) -> Job:
    device = torch.device(options.device)
    model: nn.Module = load_base(str(folder), quantization=method.quantization, device=device)
    model = model.to(device)
    attach(model, method.adapter, seed=0)
    if method.start is not None:
        initialise(model, method.start, seed=0)
    make_lean(model)
    if method.recompute_every:
        recompute_activations(model, method.recompute_every)
    optimizer = optimizer_for(model.train(), method)
    generator = torch.Generator().manual_seed(1)
    shape = (method.accumulate, options.batch, options.tokens)
    ids = torch.randint(options.vocabulary, shape, generator=generator).to(device)
    engine = galore(model, optimizer, method, options) if method.galore else None
    return Job(model, optimizer, engine, ModelLoss(method.loss), list(ids))


def optimizer_for(model: nn.Module, method: Method) -> Optimizer:
    groups = parameter_groups(model)
    if method.eight_bit:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=1e-4, weight_decay=0.0)
    optimizer = AdamW(groups, lr=1e-4, weight_decay=0.0)
    fuse(optimizer)  # as AdapterFineTuneModule does
    return optimizer


def galore(
    model: nn.Module, optimizer: Optimizer, method: Method, options: argparse.Namespace
) -> GaLoreEngine:
    names = match_targets(model, FullFineTuning(targets="all-linear"))
    layers = {name: model.get_submodule(name) for name in names}
    settings = Projection(options.hidden // 4, method.update_gap, svd=method.svd)
    return GaLoreEngine(layers, optimizer, settings, seed=0)


def measured(name: str, job: Job, device: str) -> Row:
    job.step()  # makes the optimizer's state, and GaLore's first subspaces
    held = job.bytes_of_weights(), job.bytes_of_galore(), optimizer_bytes(job.optimizer)
    peak = sum(held) + peak_of(job.step, device)
    return Row(name, footprint(job.model).trainable, *held, peak)


def race(jobs: dict[str, Job], rows: list[Row], rounds: int, device: str, tick: Tick) -> None:
    for _ in range(rounds):
        for row in random.sample(rows, len(rows)):
            row.seconds.append(timed(jobs[row.method].step, device)[0])
            tick(f"time: {row.method}")


def methods(folder: Path, options: argparse.Namespace, tick: Tick) -> list[Row]:
    jobs, rows = {}, []
    for name, method in METHODS.items():
        jobs[name] = build(method, folder, options)
        rows.append(measured(name, jobs[name], options.device))
        tick(f"peak: {name}")
    race(jobs, rows, options.rounds, options.device, tick)
    return rows


def windows(folder: Path, options: argparse.Namespace, tick: Tick) -> list[Row]:
    """One model at a time: an exact choice of subspaces takes long enough to be measured alone."""
    rows = []
    for name, method in WINDOWS.items():
        job = build(method, folder, options)
        rows.append(measured(name, job, options.device))
        rows[-1].seconds.append(timed(job.step, options.device)[0])
        del job
        gc.collect()
        tick(f"GaLore: {name}")
    return rows


# ---------------------------------------------------------------- what is printed


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}"


def table(rows: list[Row], against: Row, timed: bool) -> str:
    """``timed``: whether seconds are medians of turns, with a spread."""
    head = [
        "",
        "trained",
        "weights",
        "GaLore",
        "optimizer",
        "peak",
        f"peak / {against.method}",
        "seconds",
    ]
    head += [f"time / {against.method}", "spread"] if timed else []
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [
            row.method,
            f"{row.trained_parameters:,}",
            megabytes(row.weight_bytes),
            megabytes(row.galore_bytes) if row.galore_bytes else "",
            *map(megabytes, (row.optimizer_bytes, row.peak_bytes)),
            f"{row.peak_bytes / against.peak_bytes:.2f}",
            f"{row.median:.2f}",
        ]
        if timed:
            cells += [f"{row.median / against.median:.2f}", f"{row.spread:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: list[Row], galore_rows: list[Row], options: argparse.Namespace) -> str:
    size = (
        f"Llama of {options.hidden} x {options.layers} layers, vocabulary {options.vocabulary:,}, "
        f"fp32; micro-batches of {options.batch} x {options.tokens} tokens; AdamW"
    )
    return "\n\n".join(
        [
            f"{named(options.device, *PACKAGES)}. {size}. Weights, GaLore's subspaces and shadows, "
            "optimizer state and peak in MB; seconds (of one thread on a CPU) are medians of "
            f"{options.rounds} turns.",
            table(rows, rows[0], timed=True),
            f"GaLore (rank {options.hidden // 4}), one step of 1 or 4 micro-batches. Times of one "
            "run, new subspaces for all weights; the default is one such step in 200.",
            table(galore_rows, galore_rows[0], timed=False),
        ]
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"hidden": 512, "layers": 8, "vocabulary": 8192, "batch": 2, "tokens": 256, "rounds": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main() -> None:
    options = parsed()
    hush()
    disable_progress_bar()  # of loading; there is one for the whole
    torch.set_num_threads(1)
    random.seed(0)
    turns = len(METHODS) * (1 + options.rounds) + len(WINDOWS)
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("base", total=turns)

        def tick(done: str) -> None:
            progress.update(task, advance=1, description=done)

        random_base(options, Path(name))
        rows = methods(Path(name), options, tick)
        gc.collect()
        galore_rows = windows(Path(name), options, tick)
    print(report(rows, galore_rows, options))
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        content = {
            "machine": named(options.device, *PACKAGES),
            "settings": settings,
            "methods": list(map(asdict, rows)),
            "galore_windows": list(map(asdict, galore_rows)),
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
