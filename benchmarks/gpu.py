"""Steps of real shapes on one GPU in bf16, beside PEFT, PEFT with liger-kernel and the bound.

    python benchmarks/gpu.py --shape 1b [--tokens 2048 --batch 4 --recompute off --rounds 20 --json]
    python benchmarks/gpu.py --shape 8b --batch 1 --recompute on
    python benchmarks/gpu.py --shape tiny --device cpu --rounds 2       (tries the code, not a GPU)

Random weights in the shapes of Llama 3, made on the device; LoRA, DoRA and QLoRA on all linear
layers, GaLore on the whole. Sides of one base share its memory and take whole steps (forward,
backward, fused AdamW) in shuffled turns. Times are medians of the wall clock around a synchronised
step; "frozen base" makes activation gradients only, and "of bound" is its share of a side's time.
The peak is weights and optimizer state of the side and the most that a step holds above them.

MFU counts 4N floating-point operations a token where the base is frozen, 6N where it is trained,
and those of causal attention, with N the weights of linear layers and head; what is recomputed does
not count. It is told for devices whose peak is known, or with --tflops.

Packages that are missing leave out their rows, in words. galore-torch decomposes every weight
exactly, which takes minutes at 8b: it runs where --galore-peer says so, and by default up to 1b.
"""

import argparse
import gc
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from machine import processor
from measuring import Step, Times, on_cuda, peak_of, race, seconds_of
from reporting import Row, parser, publish
from torch import Tensor, nn

if TYPE_CHECKING:
    from rivals import Loss

NEEDED = ("transformers", "lightning")
BESIDE = {
    "peft": "the rows of PEFT, and the comparison of gradients",
    "bitsandbytes": "the rows of QLoRA",
    "accelerate": "PEFT's QLoRA",
    "galore_torch": "the row of galore-torch",
    "liger_kernel": "the rows with liger-kernel",
}


class Shape(NamedTuple):
    """Of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "tiny": Shape(64, 192, 2, 4, 2, 512, False),
    "1b": Shape(2048, 8192, 16, 32, 8, 128_256, True),
    "8b": Shape(4096, 14336, 32, 32, 8, 128_256, False),
}
# Dense bf16, as the makers state it, TFLOP/s.
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}
BOUND, AGAIN = "frozen base", "LoRA again (A/A)"


class Side(NamedTuple):
    """A model in training."""

    model: nn.Module
    step: Step
    held: int  # bytes of weights and optimizer state
    trains_base: bool = False
    peer: str | None = None


# ---------------------------------------------------------------- what is there


def missing_packages() -> dict[str, str]:
    """What cannot be measured for want of a package.

    Raises:
        SystemExit: if nothing can.
    """
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if not lacking:
        try:
            import step  # noqa: F401
        except ModuleNotFoundError as error:  # what those need, or we
            lacking = [str(error.name)]
    if lacking:
        raise SystemExit(
            f"this benchmark needs {' and '.join(lacking)}, not installed here: pip install -e ."
        )
    return {name: what for name, what in BESIDE.items() if find_spec(name) is None}


def check_device(device: str) -> None:
    if on_cuda(device) and not torch.cuda.is_available():
        raise SystemExit(
            f"--device {device}, but torch {torch.__version__} sees no CUDA device. Run this on a "
            "machine with a GPU and its build of torch, or try the code with --device cpu "
            "--shape tiny"
        )


def peak_tflops(device: str, said: float | None) -> float | None:
    if said is not None or not on_cuda(device):
        return said
    return next((t for name, t in PEAKS.items() if name in processor(device)), None)


# ---------------------------------------------------------------- models


def build(shape: Shape, device: str, tokens: int) -> nn.Module:
    """A random Llama in bf16, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=tokens,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.train().requires_grad_(False)


def quantise(model: Any, device: str) -> nn.Module:
    """Put NF4 in the place of every linear layer but the head, one after the other."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    from lit_adapters.weights import hush, settle

    hush()
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not head:
            with torch.device("meta"):
                packed = Linear4bit(
                    layer.in_features, layer.out_features, False, torch.bfloat16, True, "nf4"
                )
            weight = layer.weight.data.cpu() if not on_cuda(device) else layer.weight.data
            packed.weight = Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
            ).to(device)
            model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # PEFT asks for it
    for module in model.modules():
        settle(module)
    return model


def bytes_of(model: nn.Module, optimizer: Any) -> int:
    from lit_adapters.footprint import footprint, optimizer_bytes

    sizes = footprint(model)
    state = optimizer_bytes(optimizer) if optimizer is not None else 0
    return sizes.base_bytes + sizes.adapter_bytes + state


def side(model: nn.Module, loss: "Loss", ids: Tensor, peer: str | None = None) -> Side:
    """A side that trains by fused AdamW whatever is to be trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def step() -> None:
        loss(model, ids).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    step()
    return Side(model, step, bytes_of(model, optimizer), peer=peer)


# ---------------------------------------------------------------- groups of sides on one base


class Sides(dict[str, Side]):
    """Those that fit, the others by name, and how far gradients are off PEFT's."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.too_large: list[str] = []
        self.off: dict[str, float] = {}

    def add(self, name: str, make: Callable[[], Side]) -> None:
        """Build a side, if memory allows."""
        try:
            self[name] = make()
        except torch.OutOfMemoryError:
            self.too_large.append(name)
            tidy(self.device)


def adapter_sides(
    bare: nn.Module, ids: Tensor, options: argparse.Namespace, quantised: bool
) -> Sides:
    """Of LoRA and DoRA, or of QLoRA."""
    from rivals import gradients_off, sharing
    from step import adapted, bound_loss, counterpart, our_loss, recompute, stock_loss

    from lit_adapters import DoRA, LoRA
    from lit_adapters.adapters import AdapterSpec

    def ready(model: nn.Module) -> nn.Module:
        if options.recompute == "on":
            recompute(model)
        return model

    has_peft = find_spec("peft") is not None
    if quantised:
        has_peft = has_peft and find_spec("accelerate") is not None
    lora = LoRA(options.rank, 2 * options.rank)
    specs: dict[str, AdapterSpec] = {"QLoRA" if quantised else "LoRA": lora}
    if not quantised:
        specs["DoRA"] = DoRA(options.rank, 2 * options.rank)
    found = Sides(options.device)
    found.add(BOUND, lambda: side(ready(sharing(bare)), bound_loss, ids))

    def pair(name: str, spec: AdapterSpec) -> None:
        mine = ready(adapted(bare, spec))
        peer = f"PEFT {name}" if has_peft else None
        if peer is not None:
            theirs = ready(counterpart(bare, mine, spec))

            def compared() -> Side:
                off = gradients_off(mine, theirs, stock_loss, stock_loss, ids)
                found.off[name] = off[1]
                return side(theirs, stock_loss, ids)

            found.add(peer, compared)
        found.add(f"{name}, transformers' loss", lambda: side(mine, stock_loss, ids, peer))
        found.add(name, lambda: side(ready(adapted(bare, spec)), our_loss(), ids, peer))

    for name, spec in specs.items():
        pair(name, spec)
    first = next(iter(specs))
    found.add(AGAIN, lambda: side(ready(adapted(bare, lora)), our_loss(), ids, first))
    if not quantised and find_spec("liger_kernel") is not None and on_cuda(options.device):
        add_liger_sides(found, bare, ids, lora, has_peft, ready)
    return found


def add_liger_sides(
    found: Sides,
    bare: nn.Module,
    ids: Tensor,
    spec: Any,
    has_peft: bool,
    ready: Callable[[nn.Module], nn.Module],
) -> None:
    """PEFT and ours on layers that liger-kernel has patched, and ours as it is against them."""
    from rivals import sharing
    from step import adapted, counterpart, our_loss, stock_loss

    mine = ready(adapted(bare, spec))
    peer = "PEFT LoRA, liger" if has_peft else None

    def theirs() -> Side:
        patched = sharing(bare)
        with liger_rotation():
            patch(patched)
            one = side(ready(counterpart(patched, mine, spec)), stock_loss, ids)
        return one._replace(step=rotated(one.step))

    def ours() -> Side:
        patched = sharing(bare)
        with liger_rotation():
            patch(patched)
            one = side(ready(adapted(patched, spec)), our_loss("liger"), ids, peer)
        return one._replace(step=rotated(one.step))

    if peer is not None:
        found.add(peer, theirs)
        found.add("LoRA, against liger", lambda: side(mine, our_loss(), ids, peer))
    found.add("LoRA, liger", ours)


def patch(model: nn.Module) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)


@contextmanager
def liger_rotation() -> Iterator[None]:
    """Let transformers rotate by liger-kernel, which patches that for all models, inside only."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from transformers.models.llama import modeling_llama

    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    before = {name: getattr(modeling_llama, name) for name in names}
    modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(modeling_llama, name, value)


def rotated(step: Step) -> Step:
    def inside() -> None:
        with liger_rotation():
            step()

    return inside


def galore_sides(options: argparse.Namespace, ids: Tensor) -> Iterator[Sides]:
    """One model at a time: each trains all weights."""
    import galore
    from step import recompute

    shape = SHAPES[options.shape]
    rank = shape.hidden // 4
    makers: dict[str, tuple[Callable[..., Any], str | None]] = {}
    peer = "galore-torch" if find_spec("galore_torch") and options.galore_peer else None
    if peer is not None:
        makers[peer] = (galore.theirs(rank, galore.NEVER), None)
    makers["GaLore"] = (galore.ours(rank, galore.NEVER, "randomised"), peer)
    if options.shape != "8b":  # gradients and two moments of it are 48 GB
        makers["AdamW, everything"] = (galore.whole, None)

    def trained(make: Callable[..., Any], other: str | None) -> Side:
        model = build(shape, options.device, options.tokens).requires_grad_(True)
        if options.recompute == "on":
            recompute(model)
        optimizer = make(model)
        step = galore.stepper(model, lambda model: optimizer, ids)
        step()
        return Side(model, step, bytes_of(model, optimizer), True, other)

    for name, (make, other) in makers.items():
        one = Sides(options.device)
        one.add(name, partial(trained, make, other))
        yield one


# ---------------------------------------------------------------- numbers


def flops_of_token(shape: Shape, tokens: int, trains_base: bool) -> float:
    """Floating-point operations of training on one token of a sequence of ``tokens``."""
    width = shape.hidden // shape.heads * shape.key_value_heads
    attention = 2 * shape.hidden * (shape.hidden + width)
    layer = attention + 3 * shape.hidden * shape.intermediate
    weights = shape.layers * layer + shape.vocabulary * shape.hidden
    # Products of queries, keys and values: 4 S d forward and 8 S d backward, half of it masked.
    return (6 if trains_base else 4) * weights + 6 * shape.layers * shape.hidden * tokens


def rows_of(
    sides: Sides, times: dict[str, Times], peaks: dict[str, int], options: argparse.Namespace
) -> list[Row]:
    shape, tflops = SHAPES[options.shape], peak_tflops(options.device, options.tflops)
    tokens = options.batch * options.tokens
    bound = times[BOUND].median if BOUND in times else None
    rows = []
    for name, one in sides.items():
        seconds = times[name].median
        work = flops_of_token(shape, options.tokens, one.trains_base) * tokens
        known = one.peer is not None and one.peer in times
        total = one.held + peaks[name]
        rows.append(
            {
                "step": name,
                "ms": seconds * 1e3,
                "tokens/s": tokens / seconds,
                "MFU": work / seconds / (tflops * 1e12) if tflops else None,
                "of bound": bound / seconds if bound else None,
                "compared with": one.peer if known else "",
                "time": seconds / times[one.peer].median if known and one.peer else None,
                "spread": times[name].spread,
                "peak, MB": total / 1e6,
                "above weights and state, MB": peaks[name] / 1e6,
                "peak / peer": total / (sides[one.peer].held + peaks[one.peer])
                if known and one.peer
                else None,
                "gradients off by": sides.off.get(name),
            }
        )
    return [*rows, *({"step": f"{name}: out of memory"} for name in sides.too_large)]


def measure(options: argparse.Namespace) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    shape = SHAPES[options.shape]
    ids = torch.randint(shape.vocabulary, (options.batch, options.tokens), generator=generator)
    ids = ids.to(options.device)
    tables: dict[str, list[Row]] = {}
    turns: dict[str, Any] = {}
    for title, quantised in (("bf16 base", False), ("NF4 base", True)):
        if quantised and find_spec("bitsandbytes") is None:
            continue
        if not any(word in title for word in options.only or [""]):
            continue
        bare = build(shape, options.device, options.tokens)
        bare = quantise(bare, options.device) if quantised else bare
        sides = adapter_sides(bare, ids, options, quantised)
        peaks = {name: peak_of(one.step, options.device) for name, one in sides.items()}
        steps = {name: one.step for name, one in sides.items()}
        times = race(steps, options.rounds, options.device, warm_ups=options.warm_ups)
        tables[title] = rows_of(sides, times, peaks, options)
        turns[title] = seconds_of(times)
        del bare, sides, steps
        tidy(options.device)
    if not options.only or "GaLore" in options.only:
        tables["All weights"], turns["All weights"] = whole(options, ids)
    return tables, turns


def whole(options: argparse.Namespace, ids: Tensor) -> tuple[list[Row], dict[str, Any]]:
    """GaLore and full fine-tuning, which do not fit beside each other: one after the other."""
    every = Sides(options.device)
    times: dict[str, Times] = {}
    peaks: dict[str, int] = {}

    def alone(name: str, one: Side) -> Side:
        peaks[name] = peak_of(one.step, options.device)
        steps = {name: one.step}
        times.update(race(steps, options.rounds, options.device, warm_ups=options.warm_ups))
        return one._replace(model=nn.Identity(), step=lambda: None)  # only the numbers are kept

    for sides in galore_sides(options, ids):
        every.too_large += sides.too_large
        for name in list(sides):
            every[name] = alone(name, sides.pop(name))
        tidy(options.device)
    return rows_of(every, times, peaks, options), seconds_of(times)


def tidy(device: str) -> None:
    gc.collect()
    if on_cuda(device):
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- command


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "gpu_DEVICE")
    made.add_argument("--shape", choices=list(SHAPES), default="1b")
    made.add_argument("--device", default="cuda")
    for name, value in {"tokens": 2048, "batch": 1, "rank": 16}.items():
        made.add_argument(f"--{name}", type=int, default=value)
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--warm-ups", type=int, default=5)
    made.add_argument("--recompute", choices=["off", "on"], default="off")
    made.add_argument("--tflops", type=float, help="dense bf16 peak of the device, for MFU")
    made.add_argument("--galore-peer", action=argparse.BooleanOptionalAction, default=None)
    made.add_argument(
        "--only", nargs="*", default=[], choices=["bf16", "NF4", "GaLore"], help="groups of rows"
    )
    options = made.parse_args(arguments)
    if options.galore_peer is None:
        options.galore_peer = options.shape != "8b"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    missing = missing_packages()
    check_device(options.device)
    if not on_cuda(options.device):
        torch.set_num_threads(1)
    random.seed(0)
    if options.json and "DEVICE" in options.json.name:
        slug = re.sub(r"\W+", "_", processor(options.device)).strip("_").lower()
        slug = slug if on_cuda(options.device) else "cpu"
        name = options.json.name.replace("DEVICE", f"{slug}_{options.shape}")
        options.json = options.json.with_name(name)
    tables, turns = measure(options)
    left_out = [f"{name} is not installed: without {what}." for name, what in missing.items()]
    if "liger_kernel" not in missing and not on_cuda(options.device):
        left_out.append("liger-kernel needs CUDA: without its rows.")
    notes = (
        "Medians of the wall clock around a synchronised step. "
        if on_cuda(options.device)
        else "Process time of one thread: this is no measurement of a GPU. "
    )
    notes += "GaLore's rows are raced one after the other, not in turns. " + " ".join(left_out)
    names = {"galore_torch": "galore-torch", "liger_kernel": "liger-kernel"}
    there = [names.get(n, n) for n in ("transformers", *BESIDE) if n not in missing]
    publish(options, there, tables, notes.strip(), device=options.device, seconds=turns)


if __name__ == "__main__":
    main()
