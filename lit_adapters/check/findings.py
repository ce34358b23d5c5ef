"""Everything that can be known of a fit on many devices before it has them."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn

from lit_adapters.callbacks import GaLore, SpikeGuard
from lit_adapters.check.absent import absent_trainer
from lit_adapters.check.shares import rank_bytes, share_of
from lit_adapters.compilation import check_compile
from lit_adapters.estimate.estimation import peaks_of
from lit_adapters.estimate.rehearsal import Rehearsal
from lit_adapters.estimate.shapes import Training
from lit_adapters.footprint import footprint
from lit_adapters.optim import build_optimizer, check_suited, choose_layers
from lit_adapters.sharding import Unit, check_optimizer, check_sharding, units
from lit_adapters.targets import match_targets

REFUSING = (GaLore, SpikeGuard)  # callbacks that do not work under every strategy
REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, OSError, MisconfigurationException)


@dataclass
class Findings:
    """What was found; where something is wrong, what depends on it is not there.

    Attributes:
        problems: Why the fit would fail.
        unknown: What could not be looked at here.
        counts: Of ranks, records, batches and steps.
        units: What is gathered together: names, parameters and dtypes of equal units in a row.
        parameters: How many there are, and are trained.
        bytes: Of a rank, kind by kind, and at the peak.
    """

    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    strategy: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    units: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Keep what is raised in the block as a problem; what the network lacks is unknown."""
        try:
            yield
        except REFUSALS as error:
            absent = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            (self.unknown if absent else self.problems).append(f"{what}: {error}")


def examine(
    settings: Mapping[str, Any],
    callbacks: Sequence[Callback],
    training: Training,
    data: Any,
    memory: int | None = None,
) -> Findings:
    """Return what would become of a fit.

    Args:
        settings: Of its trainer.
        callbacks: Beside those of the settings.
        training: Its module and micro-batch.
        data: Its data module.
        memory: Bytes of a device, if they are to suffice.
    """
    found = Findings()
    trainer = rehearsal = None
    with _undisturbed():
        with found.noting("trainer"):
            trainer = absent_trainer(settings, callbacks, training.device)
        with found.noting("model"):
            rehearsal = Rehearsal(training)
        if trainer is not None:
            found.strategy = type(trainer.strategy).__name__
            found.counts = {"ranks": trainer.world_size, "nodes": trainer.num_nodes}
        if trainer is not None and rehearsal is not None:
            trainer.strategy._lightning_module = rehearsal.module
            if training.module.compile_backend:
                with found.noting("compile"):
                    check_compile(trainer.strategy)
            projected = _examine_model(found, trainer, rehearsal)
            with found.noting("memory"):
                _examine_memory(found, trainer, rehearsal, projected, memory)
            with found.noting("data"):
                if data.tokenizer is None:  # the rehearsed module no longer knows whose it is
                    rehearsal.module._tokenizer = training.module.tokenizer
                _count(found.counts, trainer, data)
    return found


def _examine_model(found: Findings, trainer: Trainer, rehearsal: Rehearsal) -> list[Tensor]:
    """Ask everything that can refuse a strategy during a fit; return what GaLore projects."""
    model, strategy = rehearsal.model, trainer.strategy
    projected: list[Tensor] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, REFUSING):
            with found.noting(type(callback).__name__):
                callback.setup(trainer, rehearsal.module, "fit")
                if isinstance(callback, GaLore):
                    projected += _projected(callback, model, strategy)
    with found.noting("sharding"):
        check_sharding(model, strategy)
        found.units = described(units(model, strategy))
    with found.noting("optimizer"):
        module = rehearsal.module
        optimizer = build_optimizer(
            module.optimizer_factory, model, module.lora_plus_ratio, module.embedding_lr
        )
        check_optimizer(optimizer, strategy)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GaLore):
                check_suited(optimizer, callback.settings.moments)
    sizes = footprint(model)
    found.parameters = {"all": sizes.total, "trained": sizes.trainable}
    return projected


def _projected(callback: GaLore, model: nn.Module, strategy: Strategy) -> list[Tensor]:
    layers = {n: model.get_submodule(n) for n in match_targets(model, callback.selection)}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    cut = isinstance(strategy, ModelParallelStrategy)
    chosen, _ = choose_layers(layers, trained, callback.settings, cut)
    return [layer.get_parameter("weight") for layer in chosen.values()]


def _examine_memory(
    found: Findings,
    trainer: Trainer,
    rehearsal: Rehearsal,
    projected: Sequence[Tensor],
    memory: int | None,
) -> None:
    share = share_of(rehearsal.model, trainer.strategy, trainer.world_size, projected)
    found.bytes = rank_bytes(peaks_of(rehearsal, rehearsal.training.batch_size), share)
    if memory is not None and found.bytes["peak"] > memory:
        raise ValueError(
            f"a rank needs {found.bytes['peak']:,} bytes and has {memory:,}; take a smaller "
            "data.batch_size with more trainer.accumulate_grad_batches, "
            "model.gradient_checkpointing, or more devices under fsdp2"
        )


def described(found: Sequence[Unit]) -> list[dict[str, Any]]:
    """Return units as rows, those that follow each other and are equal in one."""
    rows: list[dict[str, Any]] = []
    for unit in found:
        row = {
            "name": unit.name or "the rest",
            "count": 1,
            "parameters": sum(p.numel() for p in unit.parameters),
            "bytes": sum(p.nbytes for p in unit.parameters),
            "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in unit.parameters}),
        }
        same = ("parameters", "bytes", "dtypes")
        if rows and unit.name and all(rows[-1][key] == row[key] for key in same):
            rows[-1]["count"] += 1
        else:
            rows.append(row)
    return rows


def _count(counts: dict[str, int], trainer: Trainer, data: Any) -> None:
    """Build the loaders of the first rank, as a fit does."""
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    data.val_dataloader()
    window = counts["ranks"] * trainer.accumulate_grad_batches
    if data.batch_tokens is None:
        counts["examples a step"] = data.batch_size * window
    else:
        counts["tokens a step, at most"] = data.batch_tokens * window
    if data.streaming:
        return
    limit: Any = trainer.limit_train_batches
    batches = len(loader)
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = ceil(batches / trainer.accumulate_grad_batches)
    counts["records"] = len(data.tokens("train"))
    counts["batches of a rank"] = batches
    counts["steps an epoch"] = steps
    if trainer.max_steps != -1 or trainer.max_epochs not in (None, -1):
        most = [trainer.max_steps] if trainer.max_steps != -1 else []
        most += [steps * trainer.max_epochs] if trainer.max_epochs not in (None, -1) else []
        counts["steps"] = min(most)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Silence what a fit would say on its way."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
