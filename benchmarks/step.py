"""One training step of every method, beside PEFT's and beside the frozen base, which is the bound.

    python benchmarks/step.py [--hidden 512 --layers 8 --rounds 5 --dtypes float32 bfloat16
                               --recompute off on --compile off on --only LoRA DoRA --json]

A random Llama on random tokens, one thread, all sides in shuffled turns: forward, backward, fused
AdamW. "frozen base" makes activation gradients and no others: no adapter can take less. Every side
computes transformers' own loss, except "LoRA, our loss". Before any turn both sides of a pair are
given the same values, and loss and gradients are compared. PEFT's PiSSA is a LoRA on the base from
which our start was subtracted; in bf16 that base is rounded, which ours never is. "saved" is what
autograd keeps of the forward pass.

The peak is of a whole step above weights and optimizer state. Larger: --hidden 2048 --layers 4.
Compiled, the decoder layers of every side are, in the very same way, PEFT's as ours; "first pass"
is what that takes, from empty caches, and a side whose graphs another one has made finds them.
PEFT's DoRA breaks graphs so that torch no longer compiles layers of any side as a whole: refused.
"""

import argparse
import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from measuring import Times, against, peak_of, race, saved_bytes, seconds_of, timed
from reporting import Row, parser, publish
from rivals import (
    TARGETS,
    Loss,
    equalise,
    gradients_off,
    llama,
    shake,
    sharing,
    token_ids,
    trained,
    with_peft,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.optim import AdamW

from lit_adapters import DoRA, FullFineTuning, LLaMAAdapter, LoRA, PiSSA, attach, initialise
from lit_adapters.adapters import AdapterSpec, LoRAAdapter
from lit_adapters.attachment import adapted_layers
from lit_adapters.blocks import make_lean
from lit_adapters.compilation import compile_layers
from lit_adapters.input_sharing import finding_shared_inputs
from lit_adapters.losses import LossKind
from lit_adapters.model_loss import ModelLoss
from lit_adapters.recompute import recompute_activations
from lit_adapters.weights import read_weight, write_weight

BOUND, REFERENCE, AGAIN = "frozen base", "LoRA", "LoRA again (A/A)"
STOCK = "LoRA, blocks not lean"


@dataclass
class Side:
    """A model in training, and whose it is to be compared with."""

    model: nn.Module
    loss: Loss
    peer: str | None = None

    def stepper(self, ids: Tensor) -> Callable[[], None]:
        """Return a whole training step."""
        parameters = trained(self.model)
        optimizer = AdamW(parameters, lr=1e-4, fused=True) if parameters else None

        def step() -> None:
            self.loss(self.model, ids).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step


def stock_loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def bound_loss(model: Any, ids: Tensor) -> Tensor:
    """The loss as seen by the first layer: its gradient runs through everything."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss: Tensor = model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
    return loss


def our_loss(kind: LossKind = "auto") -> Loss:
    compute = ModelLoss(kind)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        sums = compute(model, {"input_ids": ids, "use_cache": False}, ids, False)
        return sums.nll / sums.tokens

    return loss


def adapted(
    bare: nn.Module, spec: AdapterSpec, start: PiSSA | None = None, lean: bool = True
) -> nn.Module:
    """Our side, as a fit makes it; trained as if it had been, a little."""
    model = llama_copy(bare) if isinstance(spec, FullFineTuning) else sharing(bare)
    attach(model, spec, seed=0)
    if start is not None:
        initialise(model, start, seed=0)
    if lean:
        make_lean(model)
    with torch.no_grad(), finding_shared_inputs(model):  # as before the first step of a fit
        model(torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    return shake(model)


def llama_copy(bare: Any) -> nn.Module:
    copied = type(bare)(bare.config).to(bare.dtype).train()
    copied.load_state_dict(bare.state_dict())
    return copied


def counterpart(bare: nn.Module, ours: nn.Module, spec: AdapterSpec) -> nn.Module:
    """PEFT's side, holding the values of ours."""
    import peft

    base = sharing(bare)
    if isinstance(spec, LLaMAAdapter):
        config: Any = peft.AdaptionPromptConfig(
            adapter_len=spec.prompt_length, adapter_layers=spec.top_layers, task_type="CAUSAL_LM"
        )
    else:
        assert isinstance(spec, LoRA | DoRA)
        if pinned := [one for one in adapted_layers(ours) if is_pinned(one.adapter)]:
            base = llama_copy(bare)
            for name, _, adapter in pinned:
                layer = base.get_submodule(name)
                start = adapter.scale * adapter.lora_B0 @ adapter.lora_A0
                write_weight(layer, read_weight(layer) - start.detach())
        config = peft.LoraConfig(
            r=spec.rank,
            lora_alpha=int(spec.alpha),
            lora_dropout=spec.dropout,
            target_modules=TARGETS,
            use_dora=isinstance(spec, DoRA),
        )
    theirs = with_peft(base, config)
    equalise(ours, theirs)
    return theirs


def is_pinned(adapter: object) -> bool:
    return isinstance(adapter, LoRAAdapter) and adapter.pinned


def recompute(model: Any) -> None:
    """Gradient checkpointing of all layers, not reentrant, on either side."""
    if hasattr(model, "peft_config"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    else:
        recompute_activations(model)


def sides(
    bare: nn.Module, rank: int, layers: int, only: Sequence[str], lean: bool
) -> dict[str, Side]:
    pinned = PiSSA(niter=4)
    specs: dict[str, tuple[AdapterSpec, PiSSA | None]] = {
        REFERENCE: (LoRA(rank, 2 * rank), None),
        "LoRA, dropout 0.05": (LoRA(rank, 2 * rank, dropout=0.05), None),
        "DoRA": (DoRA(rank, 2 * rank), None),
        "PiSSA (pinned)": (LoRA(rank, 2 * rank), pinned),
        "LLaMA-Adapter": (LLaMAAdapter(10, layers, gate="scalar"), None),
    }
    found = {BOUND: Side(sharing(bare).requires_grad_(False), bound_loss)}
    for name, (spec, start) in specs.items():
        if only and name != REFERENCE and not any(word in name for word in only):
            continue
        mine = adapted(bare, spec, start, lean)
        found[name] = Side(mine, stock_loss, f"PEFT {name}")
        found[f"PEFT {name}"] = Side(counterpart(bare, mine, spec), stock_loss)
        if name == REFERENCE:
            found[AGAIN] = Side(adapted(bare, spec, lean=lean), stock_loss, REFERENCE)
            if lean:
                found[STOCK] = Side(adapted(bare, spec, lean=False), stock_loss, f"PEFT {name}")
            mine = adapted(bare, spec, lean=lean)
            found["LoRA, our loss"] = Side(mine, our_loss(), f"PEFT {name}")
    if not only or "full" in only:
        found["full fine-tuning"] = Side(adapted(bare, FullFineTuning(), lean=lean), stock_loss)
    return found


def compiled(all_sides: dict[str, Side], backend: str, ids: Tensor) -> dict[str, Row]:
    """Compile the layers of all sides; return what the first pass of each takes and makes."""
    found = {}
    for name, side in all_sides.items():
        compile_layers(side.model, backend)
        before = graphs()
        spent, _ = timed(lambda side=side: side.loss(side.model, ids).backward())
        side.model.zero_grad()
        found[name] = {"first pass, s": spent, "graphs": graphs() - before}
    return found


def graphs() -> int:
    """How many were compiled so far."""
    return counters["stats"]["unique_graphs"]


def compared(all_sides: dict[str, Side], ids: Tensor) -> dict[str, tuple[float, float]]:
    """Loss and gradients of each side against its peer's; dropout draws its own numbers."""
    found = {}
    for name, side in all_sides.items():
        if side.peer is not None and "dropout" not in name:
            other = all_sides[side.peer]
            found[name] = gradients_off(side.model, other.model, side.loss, other.loss, ids)
    return found


def measure(
    bare: nn.Module, again: bool, backend: str | None, ids: Tensor, options: argparse.Namespace
) -> tuple[list[Row], dict[str, Times]]:
    """The table of one dtype, with or without recomputed and compiled layers."""
    all_sides = sides(bare, options.rank, options.layers, options.only, lean=backend is None)
    if again:
        for side in all_sides.values():
            recompute(side.model)
    first = compiled(all_sides, backend, ids) if backend else {}
    made = graphs()
    off = compared(all_sides, ids)
    steps = {name: side.stepper(ids) for name, side in all_sides.items()}
    for step in steps.values():
        step()  # makes the optimizer's state
    peaks = {name: peak_of(step) for name, step in steps.items()}
    saved = {
        name: saved_bytes(side.model, lambda s=side: s.loss(s.model, ids))
        for name, side in all_sides.items()
    }
    times = race(steps, options.rounds, warm_ups=1)
    if graphs() > made:
        raise RuntimeError(
            f"{graphs() - made} graphs were compiled after the first pass of their side: one side "
            "has kept torch from compiling another as a whole. Choose others with --only"
        )
    rows = []
    for name, side in all_sides.items():
        ratio = against(times[name], times[side.peer]) if side.peer else {}
        rows.append(
            {
                "step": name,
                "ms": times[name].median * 1e3,
                "/ bound": against(times[name], times[BOUND])["minima"],
                "/ peer, minima": ratio.get("minima"),
                "medians": ratio.get("medians"),
                "wall": ratio.get("wall"),
                "spread": times[name].spread,
                "peak, MB": peaks[name] / 1e6,
                "peak / peer": peaks[name] / peaks[side.peer] if side.peer else None,
                "saved, MB": saved[name] / 1e6,
                "saved / peer": saved[name] / saved[side.peer] if side.peer else None,
                "loss off by": off[name][0] if name in off else None,
                "gradients off by": off[name][1] if name in off else None,
                **first.get(name, {}),
            }
        )
    return rows, times


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "step")
    sizes = {"hidden": 512, "layers": 8, "vocabulary": 8192, "batch": 2, "tokens": 256}
    for name, value in {**sizes, "rank": 8, "rounds": 5}.items():
        made.add_argument(f"--{name}", type=int, default=value)
    names = ["float32", "bfloat16"]
    made.add_argument("--dtypes", nargs="+", default=names, choices=names)
    made.add_argument("--recompute", nargs="+", default=["off", "on"], choices=["off", "on"])
    made.add_argument("--compile", nargs="+", default=["off"], choices=["off", "on"])
    made.add_argument("--backend", default="inductor", help="of torch.compile")
    made.add_argument("--only", nargs="*", default=[], help="methods, by a part of their name")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    ids = token_ids(options.vocabulary, options.batch, options.tokens)
    tables, turns = {}, {}
    for dtype in options.dtypes:
        bare = llama(options.hidden, options.layers, options.vocabulary)
        bare = bare.to(getattr(torch, dtype))
        for recomputed, how in product(options.recompute, options.compile):
            title = f"{dtype}, gradient checkpointing {recomputed}"
            title += ", compiled" if how == "on" else ""
            backend = options.backend if how == "on" else None
            with fresh_cache():
                tables[title], times = measure(bare, recomputed == "on", backend, ids, options)
            turns[title] = seconds_of(times)
            torch.compiler.reset()
            gc.collect()  # models are held by cycles of hooks
    notes = (
        "Process time of one thread; the middle half of the turns gives the spread. The peer is "
        f"PEFT's side of the same method, and of {AGAIN!r} the first one. Adapters are fp32 on "
        "both sides. Ratios below 1 are in our favour."
    )
    publish(options, ("transformers", "peft"), tables, notes, seconds=turns)


if __name__ == "__main__":
    main()
