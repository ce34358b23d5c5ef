"""``estimate``: will it fit, before anything is downloaded or trained."""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from math import ceil, floor
from typing import Any, Literal

import torch
from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from lit_adapters.adapters import FullFineTuning, LoRA
from lit_adapters.callbacks import GaLore
from lit_adapters.cli import AdapterCLI
from lit_adapters.estimate.estimation import largest_batch, peaks_of, summary
from lit_adapters.estimate.rehearsal import Rehearsal
from lit_adapters.estimate.shapes import Training
from lit_adapters.estimate.table import Column, as_json, show

WIDTH = 120  # of a table that goes to a file
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class EstimateCLI(AdapterCLI):
    """Reads what `fit` reads, and prints what it would take."""

    prog = "lit_adapters estimate"

    def __init__(self, args: list[str]) -> None:
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # the rest of argv
        super().__init__(args, run=False)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Name the command in messages."""
        return super().init_parser(**{**kwargs, "prog": self.prog})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flags of this command to those of a fit."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--memory", type=str | None, default=None, help="what there is: 24GB, 16GiB, 80e9"
        )
        parser.add_argument(
            "--device",
            type=Literal["auto", "cpu", "cuda"],
            default="auto",
            help="where training is to run; auto is what trainer.accelerator finds here",
        )
        parser.add_argument("--json", type=bool, default=False, help="print for scripts, in bytes")

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """Estimate instead of building a trainer."""
        self.demand_base()
        memory = None if self.config.memory is None else parse_size(self.config.memory)
        self.config.trainer.logger = False  # nothing is to be opened
        settings = self.parser.instantiate_classes(self.config)
        training = training_of(settings, device_of(settings))
        columns = compare(training, memory)
        if settings.json:
            print(json.dumps(as_json(columns, training, memory), indent=2))
        else:
            console = Console()
            if not console.is_terminal:
                console.width = WIDTH
            show(columns, training, memory, console)

    def demand_base(self) -> None:
        """Refuse to look at the default model where none is named."""
        given = self.parser.parse_args(self._arguments, defaults=False)
        if not given.get("model.base"):
            raise ValueError(
                "nothing says which model is meant: no config has model: {base: ...}. Pass the "
                "config of the fit, --config configs/alpaca_lora.yaml, or --model.base"
            )


# --- what is asked -------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Return the bytes of a size as people write it: 24GB, 16GiB, 80e9.

    Raises:
        ValueError: if it is none.
    """
    found = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    unit = None if found is None else {**UNITS, **BINARY_UNITS}.get(found[2])
    try:
        size = floor(float(found[1]) * unit) if found and unit else 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(
            f"memory {text!r} is no size; expected bytes or a number with a unit, such as 24GB "
            "(10^9 bytes), 16GiB (2^30) or 80e9"
        )
    return size


def device_of(settings: Any) -> str:
    """Return cpu or cuda: what is asked for, or what the trainer would take."""
    wanted = str(settings.device)
    if wanted == "auto":
        wanted = {"gpu": "cuda", "cuda": "cuda", "cpu": "cpu"}.get(
            str(settings.trainer.accelerator), "cuda" if torch.cuda.is_available() else "cpu"
        )
    return wanted


def training_of(settings: Any, device: str) -> Training:
    """Return what the instantiated settings of a fit say about its memory."""
    trainer = settings.trainer
    callbacks = trainer.callbacks or []
    galore = [c for c in (callbacks if isinstance(callbacks, list) else [callbacks])
              if isinstance(c, GaLore)]  # fmt: skip
    return Training(
        module=settings.model,
        batch_size=sequences_of(settings.data),
        max_length=settings.data.max_length,
        precision=_convert_precision_to_unified_args(trainer.precision) or "32-true",
        accumulate=trainer.accumulate_grad_batches,
        clip=bool(trainer.gradient_clip_val),
        galore=galore[0] if galore else None,
        initialiser=settings.init.initialiser,
        device=device,
    )


def sequences_of(data: Any) -> int:
    """Sequences of full length in a micro-batch; in one filled by tokens, rounded up."""
    if data.batch_tokens is None:
        return int(data.batch_size)
    return ceil(data.batch_tokens / data.max_length)


# --- the alternatives ----------------------------------------------------------------------------


def method_of(training: Training) -> str:
    """Return what the columns call a method."""
    module = training.module
    if training.galore is not None:
        return f"GaLore, rank {training.galore.settings.rank}"
    if isinstance(module.adapter, FullFineTuning):
        return "full"
    start = training.initialiser
    kind = getattr(module.quantization, "kind", None)
    named = (type(module.adapter).__name__, kind, start and type(start).__name__)
    return ", ".join(part for part in named if part)


def alternatives(training: Training) -> dict[str, Training]:
    """Return other ways to train the same model, by name."""
    spec = training.module.adapter
    rank = getattr(spec, "rank", 16)
    targets = spec.targets if isinstance(spec, LoRA) else "all-linear"
    lora = {
        "adapter": LoRA(rank=rank, targets=targets),
        "lora_plus_ratio": 1.0,
        "embedding_lr": None,
    }
    whole = {"adapter": FullFineTuning(), "lora_plus_ratio": 1.0, "embedding_lr": None}
    plain = replace(training, initialiser=None, galore=None)
    recomputes = training.module.hparams["gradient_checkpointing"] not in (False, "none")
    switched = "off" if recomputes else "on"
    galore = GaLore(rank=rank)
    ways = [
        plain.with_module(**whole, quantization=None),
        plain.with_module(**lora, quantization=None),
        plain.with_module(**lora, quantization="nf4"),
        replace(plain.with_module(**whole, quantization=None), galore=galore),
    ]
    found = {method_of(way): way for way in ways}
    found.pop(method_of(training), None)
    found[f"checkpointing {switched}"] = training.with_module(gradient_checkpointing=not recomputes)
    return found


def compare(training: Training, memory: int | None) -> list[Column]:
    """Estimate the configured way, which must succeed, and the alternatives, which may not."""
    columns = list(_columns(method_of(training), training, memory))
    for name, way in alternatives(training).items():
        try:
            columns.append(next(_columns(name, way, memory)))
        except (ValueError, TypeError, RuntimeError) as error:
            line = str(error).partition("\n")[0]
            columns.append(Column(name, way.batch_size, None, problem=line))
    return columns


def _columns(name: str, training: Training, memory: int | None) -> Iterator[Column]:
    """Yield the column of one way to train, and then that of half its batch."""
    rehearsal = Rehearsal(training)
    found = cache(partial(peaks_of, rehearsal))
    size, most = training.batch_size, None
    if memory is not None:
        most = largest_batch(found, memory, size, rehearsal.farthest)
    yield Column(name, size, summary(found(size)), most)
    if size > 1:
        yield Column("half the batch", size // 2, summary(found(size // 2)), most)
