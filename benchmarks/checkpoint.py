"""Attach, save, load and merge beside PEFT, and the bytes of what is written.

    python benchmarks/checkpoint.py [--hidden 512 --layers 8 --rounds 7 --methods LoRA DoRA --json]

A random Llama, all linear layers, one thread, shuffled turns; copies of the base are made and
freed outside the clock. Our folders carry a fingerprint of the base and a digest of the weights,
and loading checks both; ours are written beside their place, put on the disk (fsync) and moved;
PEFT's have none of that. A weight moves between saves, as in training. The folder that ours writes
is loaded by PEFT, and PEFT's by us, and the logits are compared. "process" is the CPU's time,
"wall" has the disk in it.
"""

import argparse
import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from measuring import Times, against, race, seconds_of
from reporting import Row, parser, publish
from rivals import TARGETS, equalise, llama, pairs, shake, token_ids, trained, with_peft
from torch import Tensor, nn
from torch.optim import AdamW

from lit_adapters import DoRA, LoRA, attach, load_adapter, merge, save_adapter
from lit_adapters.adapters import AdapterSpec

Step = Callable[[], object]
METHODS: dict[str, Callable[[int], AdapterSpec]] = {
    "LoRA": lambda rank: LoRA(rank, 2 * rank, targets=TARGETS),
    "DoRA": lambda rank: DoRA(rank, 2 * rank, targets=TARGETS),
}


def attached(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    attach(model, spec, seed=0)
    return model


def peft_config(method: str, rank: int) -> Any:
    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=TARGETS, use_dora=method == "DoRA"
    )


def save_peft(model: Any, folder: Path) -> None:
    model.save_pretrained(str(folder))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model.eval()(input_ids=ids).logits
    return found


def loaded(model: nn.Module, folder: Path) -> nn.Module:
    load_adapter(model, folder)
    return model


def apart(bare: nn.Module, mine: Path, other: Path, ids: Tensor, expected: Tensor) -> float:
    """The largest deviation of logits when each side loads either folder, relative to the base's.

    ``expected`` is of the adapter that was saved.
    """
    moved = (expected - logits(copy.deepcopy(bare), ids)).abs().max()
    loads = (loaded, lambda model, folder: peft.PeftModel.from_pretrained(model, str(folder)))
    off = [
        (logits(load(copy.deepcopy(bare), folder), ids) - expected).abs().max()
        for load in loads
        for folder in (mine, other)
    ]
    return float(max(off) / moved)


def resume_bytes(model: nn.Module, folder: Path) -> tuple[int, int]:
    """Bytes of adapter and AdamW's state, as a checkpoint holds them, and of the whole model's."""
    sizes = []
    for parameters in (trained(model), list(model.parameters())):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = AdamW(parameters)
        optimizer.step()
        tensors = [p.detach() for p in parameters]
        torch.save({"weights": tensors, "optimizer": optimizer.state_dict()}, folder / "last.ckpt")
        sizes.append((folder / "last.ckpt").stat().st_size)
    return sizes[0], sizes[1]


def saving(save: Step, weight: Tensor) -> Step:
    """Save after a step of training has changed ``weight``; without a change less is written."""

    @torch.no_grad()
    def step() -> None:
        weight.view(-1)[0] += 1e-3
        save()

    return step


class Work(NamedTuple):
    """What each side does, and the model of which it needs a fresh copy for that."""

    ours: Step
    peft: Step
    mine: nn.Module | None = None
    other: nn.Module | None = None

    def raced(self, fresh: list[nn.Module], rounds: int) -> dict[str, Times]:
        """Run both sides, and ours once more, in shuffled turns."""
        models = {"ours": self.mine, "again": self.mine, "peft": self.other}

        def renew(model: nn.Module) -> None:
            fresh.clear()  # of the turn before
            fresh.append(copy.deepcopy(model))

        prepare = {
            name: partial(renew, model) for name, model in models.items() if model is not None
        }
        sides = {"ours": self.ours, "again": self.ours, "peft": self.peft}
        return race(sides, rounds, prepare=prepare, warm_ups=1)


class Measured(NamedTuple):
    """Of one method."""

    works: list[Row]
    held: list[Row]
    off: float  # logits of either folder in either library
    seconds: dict[str, dict[str, Times]]


def measure(method: str, options: argparse.Namespace, folder: Path) -> Measured:
    bare: nn.Module = llama(options.hidden, options.layers, options.vocabulary).eval()
    spec, config = METHODS[method](options.rank), peft_config(method, options.rank)
    ours = shake(attached(copy.deepcopy(bare), spec))
    theirs: Any = with_peft(copy.deepcopy(bare), config)
    equalise(ours, theirs)
    mine, other = folder / "ours", folder / "peft"
    one, another = pairs(ours, theirs)[0]
    save_ours, save_theirs = partial(save_adapter, ours, mine), partial(save_peft, theirs, other)
    fresh: list[Any] = []
    works = {
        "attach": Work(
            lambda: attached(fresh[0], spec), lambda: with_peft(fresh[0], config), bare, bare
        ),
        "save": Work(saving(save_ours, one), saving(save_theirs, another)),
        "load": Work(
            lambda: loaded(fresh[0], mine),
            lambda: peft.PeftModel.from_pretrained(fresh[0], str(other)),
            bare,
            bare,
        ),
        "merge": Work(lambda: merge(fresh[0]), lambda: fresh[0].merge_and_unload(), ours, theirs),
    }
    seconds = {name: work.raced(fresh, options.rounds) for name, work in works.items()}
    rows = [row_of(f"{method}: {name}", times) for name, times in seconds.items()]
    equalise(ours, theirs)
    save_ours()
    save_theirs()
    ids = token_ids(options.vocabulary, 2, 16)
    off = apart(bare, mine, other, ids, logits(ours, ids))
    small, whole = resume_bytes(ours, folder)
    held: list[Row] = [
        {
            "bytes": f"{method}: adapter folder, against PEFT's",
            "ours": f"{size(mine):,}",
            "against": f"{size(other):,}",
            "ratio": size(mine) / size(other),
        },
        {
            "bytes": f"{method}: weights and AdamW's state to resume, against those of everything",
            "ours": f"{small:,}",
            "against": f"{whole:,}",
            "ratio": small / whole,
        },
    ]
    return Measured(rows, held, off, seconds)


def row_of(name: str, times: dict[str, Times]) -> Row:
    ratio = against(times["ours"], times["peft"])
    return {
        "work": name,
        "ours": f"{times['ours'].median * 1e3:.1f} ms",
        "PEFT": f"{times['peft'].median * 1e3:.1f} ms",
        "minima": ratio["minima"],
        "medians": ratio["medians"],
        "wall": ratio["wall"],
        "spread": times["ours"].spread,
        "A/A": against(times["again"], times["ours"])["minima"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "checkpoint")
    sizes = {"hidden": 512, "layers": 8, "vocabulary": 8192, "rank": 8, "rounds": 7}
    for name, value in sizes.items():
        made.add_argument(f"--{name}", type=int, default=value)
    made.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    found = {}
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            found[method] = measure(method, options, Path(folder))
    off = max(one.off for one in found.values())
    publish(
        options,
        ("transformers", "peft"),
        {
            f"{options.layers} x {options.hidden}, rank {options.rank}": [
                row for one in found.values() for row in one.works
            ],
            "Bytes": [row for one in found.values() for row in one.held],
        },
        "Ratios are ours / PEFT; seconds are process time of one thread. Logits of either side's "
        f"folder in either library are off by {off:.0e} of what the adapter changes.",
        logits_off=off,
        seconds={
            method: {work: seconds_of(times) for work, times in one.seconds.items()}
            for method, one in found.items()
        },
    )


if __name__ == "__main__":
    main()
