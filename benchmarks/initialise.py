"""Starts that are computed from weights or gradients: time, error and peak, beside PEFT's.

    python benchmarks/initialise.py [--hidden 512 1024 --layers 2 --rank 16 --rounds 3 --json]

Each side adapts a fresh copy of one Llama, all linear layers, and starts its adapters; one thread,
shuffled turns. Random matrices have no leading components to find, so the weights get the spectrum
``s_k = k^-decay``. The error is against float64 on the first decoder layer, mean of its matrices:
of PiSSA, OLoRA and MiLoRA ``||s B A - E|| / ||E||`` with the exact part ``E``; of LoRA-GA the share
of the energy of the gradient's r leading components that the rows of ``A`` miss, for on a flat
spectrum single vectors mean nothing. PEFT knows no MiLoRA. The peak is above model and gradients
that were there before.
"""

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import peft
import torch
from measuring import against, peak_of, race, seconds_of
from peft.tuners.lora.loraga import preprocess_loraga
from reporting import Row, parser, publish
from rivals import TARGETS, llama, token_ids
from torch import Tensor, nn

from lit_adapters import LoRA, LoRAGA, MiLoRA, OLoRA, PiSSA, attach, initialise
from lit_adapters.initialisers import Initialiser

Start = Callable[[nn.Module], nn.Module]
Batches = list[dict[str, Tensor]]
Factors = tuple[Tensor, Tensor]  # A (r, in), B (out, r)


@torch.no_grad()
def with_spectrum(model: nn.Module, decay: float) -> nn.Module:
    """Give every targeted weight singular values ``k^-decay``, in random directions."""
    generator = torch.Generator().manual_seed(3)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(tuple(TARGETS)):
            m, n = layer.weight.shape
            k = min(m, n)
            U, V = (torch.linalg.qr(torch.randn(d, k, generator=generator)).Q for d in (m, n))
            spectrum = torch.arange(1, k + 1).float() ** -decay
            layer.weight.copy_(U * spectrum @ V.T)
    return model


def ours(start: Initialiser, rank: int, batches: Batches, model: nn.Module) -> nn.Module:
    attach(model, LoRA(rank, rank), seed=0)
    initialise(model, start, batches if start.reads_gradient else None, seed=0)
    return model


def theirs(start: str, rank: int, batches: Batches, model: nn.Module) -> nn.Module:
    more: dict[str, Any] = {}
    if start == "lora_ga":
        more["lora_ga_config"] = peft.LoraGAConfig()
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=start, **more
    )
    if start == "lora_ga":

        def train_step() -> None:
            for batch in batches:
                model(**batch).loss.backward()

        preprocess_loraga(model, config, train_step)
    return peft.get_peft_model(model, config)


def sides(rank: int, batches: Batches) -> dict[str, tuple[Start, str | None]]:
    """How to start, and the side it is compared with."""
    mine: dict[str, tuple[Initialiser, str | None]] = {
        "PiSSA": (PiSSA(), "PEFT pissa"),
        "PiSSA again (A/A)": (PiSSA(), "PiSSA"),
        "PiSSA, niter 4": (PiSSA(niter=4), "PEFT pissa_niter_4"),
        "PiSSA, exact": (PiSSA(niter=None), "PEFT pissa"),
        "OLoRA": (OLoRA(), "PEFT olora"),
        "MiLoRA": (MiLoRA(), None),
        "LoRA-GA": (LoRAGA(), "PEFT lora_ga"),
    }
    peers = ["pissa", "pissa_niter_4", "pissa_niter_16", "olora", "lora_ga"]
    found: dict[str, tuple[Start, str | None]] = {
        name: (partial(ours, start, rank, batches), peer) for name, (start, peer) in mine.items()
    }
    found |= {f"PEFT {s}": (partial(theirs, s, rank, batches), None) for s in peers}
    return found


def factors(model: nn.Module) -> dict[str, Factors]:
    """``A`` and ``B`` of the first decoder layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if ".layers.0." in name and parameter.requires_grad:
            layer = name.rpartition(".layers.0.")[2].split(".")[1]
            which = "A" if "lora_A" in name else "B"
            found.setdefault(layer, {})[which] = parameter.detach().double()
    return {layer: (two["A"], two["B"]) for layer, two in found.items()}


def exact_parts(model: nn.Module, rank: int, batches: Batches) -> dict[str, dict[str, Tensor]]:
    """By kind of start and layer, what it is measured against, float64."""
    weights, gradients = weights_and_gradients(model, batches)
    found: dict[str, dict[str, Tensor]] = {"pissa": {}, "milora": {}, "olora": {}, "ga": gradients}
    for layer, W in weights.items():
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        Q, R = torch.linalg.qr(W)
        found["pissa"][layer] = U[:, :rank] * S[:rank] @ Vh[:rank]
        found["milora"][layer] = U[:, -rank:] * S[-rank:] @ Vh[-rank:]
        found["olora"][layer] = Q[:, :rank] @ R[:rank]
    return found


def weights_and_gradients(
    model: nn.Module, batches: Batches
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the first decoder layer, by plain autograd over all its weights."""
    layers = {
        name.rpartition(".")[2]: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and ".layers.0." in name
    }
    for batch in batches:
        model(**batch).loss.backward()
    gradients = {name: layer.weight.grad.double() for name, layer in layers.items()}  # type: ignore[union-attr]
    model.zero_grad()
    return {name: layer.weight.detach().double() for name, layer in layers.items()}, gradients


def error(name: str, model: nn.Module, exact: dict[str, dict[str, Tensor]], rank: int) -> float:
    kind = next(k for k in ("pissa", "milora", "olora", "ga") if k in name.lower())
    off = []
    for layer, (A, B) in factors(model).items():
        expected = exact[kind][layer]
        if kind == "ga":
            rows = torch.linalg.qr(A.T).Q  # (in, r)
            most = torch.linalg.svdvals(expected)[:rank].square().sum()
            off.append(1 - float((expected @ rows).square().sum() / most))
        else:  # alpha is the rank, so that the scale is 1
            off.append(float((B @ A - expected).norm() / expected.norm()))
    return sum(off) / len(off)


def measure(options: argparse.Namespace, hidden: int) -> tuple[list[Row], dict[str, Any]]:
    bare = with_spectrum(
        llama(hidden, options.layers, options.vocabulary), options.decay
    ).eval()  # no dropout, on either side
    ids = token_ids(options.vocabulary, options.batches, options.tokens)
    batches = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    all_sides = sides(options.rank, batches)
    exact = exact_parts(bare, options.rank, batches)
    off, peaks = {}, {}
    fresh: dict[str, nn.Module] = {}

    def copied(name: str) -> None:
        fresh[name] = copy.deepcopy(bare)

    def run(name: str) -> None:
        fresh[name] = all_sides[name][0](fresh[name])

    for name in all_sides:
        copied(name)
        peaks[name] = peak_of(partial(run, name))
        off[name] = error(name, fresh.pop(name), exact, options.rank)
    times = race(
        {name: partial(run, name) for name in all_sides},
        options.rounds,
        prepare={name: partial(copied, name) for name in all_sides},
        warm_ups=0,  # the peaks have run each once
    )
    rows = []
    for name, (_, peer) in all_sides.items():
        ratio = against(times[name], times[peer]) if peer else {}
        rows.append(
            {
                "start": name,
                "seconds": times[name].median,
                "compared with": peer or "",
                "time, minima": ratio.get("minima"),
                "medians": ratio.get("medians"),
                "spread": times[name].spread,
                "error": off[name],
                "peak, MB": peaks[name] / 1e6,
                "peak / peer": peaks[name] / peaks[peer] if peer else None,
            }
        )
    return rows, seconds_of(times)


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "initialise")
    made.add_argument("--hidden", type=int, nargs="+", default=[512, 1024])
    sizes = {"layers": 2, "vocabulary": 2048, "tokens": 128, "rank": 16}
    for name, value in {**sizes, "rounds": 3, "batches": 1}.items():
        made.add_argument(f"--{name}", type=int, default=value)
    made.add_argument("--decay", type=float, default=0.5)
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    tables, seconds = {}, {}
    for hidden in options.hidden:
        title = f"All linear layers of {options.layers} x {hidden}, rank {options.rank}"
        tables[title], seconds[title] = measure(options, hidden)
    notes = (
        "Process time of one thread: attaching and starting a whole model. Every side reads the "
        "same weights and batches."
    )
    publish(options, ("transformers", "peft"), tables, notes, seconds=seconds)


if __name__ == "__main__":
    main()
