"""Run an initialiser when a fit starts."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from tqdm import tqdm

from lit_adapters.adapters import METHOD, Adapter
from lit_adapters.adapters.low_rank import LoRAAdapter
from lit_adapters.attachment import adapted_layers
from lit_adapters.callbacks.adapted_children import adapted_children
from lit_adapters.callbacks.first_batches import first_batches
from lit_adapters.callbacks.step_loss import step_loss
from lit_adapters.gradients import at_rest
from lit_adapters.initialisation import initialise
from lit_adapters.initialisers import Initialiser
from lit_adapters.remainders import rewrite_for


class InitAdapters(Callback):
    """Give adapters another start than their default.

    `AdapterFineTuneModule` asks for it while it builds its model, before anything is sharded. In
    any other LightningModule it acts in `setup` on adapters attached in ``__init__``. Skipped when
    the run resumes from a checkpoint that is known by then; where it is not, the checkpoint
    overwrites the start. Adapters that hold what was trained or loaded are refused. Several devices
    take gradients on the batches of all, and start from what the first one computes of them.

    An initialiser that reads gradients gets the first training batches of the trainer's own data.
    Their loss is the module's ``nll(batch)`` (summed loss, trained tokens) if it has that method,
    else its `training_step` with logging muted. Data order and random state of the training that
    follows are those of a run without this callback.

    Args:
        initialiser: Such as ``PiSSA()``; null leaves the default start.
        batches: Training batches for an initialiser that reads gradients.
        gradient_bytes: Host memory for sums of gradients; more takes several passes over the
            batches. Null is no limit.
    """

    def __init__(
        self,
        initialiser: Initialiser | None = None,
        batches: int = 8,
        gradient_bytes: int | None = None,
    ) -> None:
        if batches < 1:
            raise ValueError(f"batches must be at least 1, got {batches}")
        if gradient_bytes is not None and gradient_bytes < 1:
            raise ValueError(
                f"gradient_bytes must be at least 1, or null for no limit, got {gradient_bytes}"
            )
        self.initialiser = initialiser
        self.batches = batches
        self.gradient_bytes = gradient_bytes
        self.initialised: list[str] = []
        self._start: str | None = None  # what they were initialised by
        self._done: nn.Module | None = None  # an adapter of the model that was initialised

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Act on adapters that are there already."""
        roots = list(adapted_children(pl_module).values())
        if roots:  # names as `attach` saw them, if it saw one model
            self.initialise(pl_module, roots[0] if len(roots) == 1 else pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that no adapter was attached when it was too late to start it.

        Raises:
            ValueError: if so.
        """
        held = [adapter for *_, adapter in adapted_layers(pl_module, METHOD)]
        if self.initialiser is not None and not any(one is self._done for one in held):
            raise ValueError(
                f"InitAdapters({type(self.initialiser).__name__}) starts adapters in `setup`, and "
                f"{type(pl_module).__name__} has none until later: attach in __init__, or call the "
                "callback's initialise(self, model) after `attach` in configure_model"
            )

    def initialise(self, pl_module: LightningModule, model: nn.Module, agree: bool = True) -> None:
        """Initialise the adapters of ``model``, a part of ``pl_module``, once, unless it resumes.

        On a resume, frozen origins are only made room for: they must exist before anything is
        sharded, and the checkpoint fills them.

        Args:
            pl_module: Has a trainer.
            model: Has adapters.
            agree: Let all ranks, each of which calls this, have the values of the first. If not,
                they get them later.
        """
        trainer = pl_module.trainer
        adapters = [adapter for *_, adapter in adapted_layers(model, METHOD)]
        fits = trainer.state.fn == TrainerFn.FITTING
        if self.initialiser is None or not fits or adapters[0] is self._done:
            return
        self._done = adapters[0]
        if trainer.ckpt_path is not None:
            if self.initialiser.pins_origin:
                for adapter in adapters:
                    adapter.make_room()
            return
        self._check_bare(model)
        begun = time.perf_counter()
        with _ordinary_tensors():
            self.initialised = self._run(self.initialiser, pl_module, model)
        self._start = adapters[0].start_name
        if agree and trainer.world_size > 1:
            for adapter in adapters:
                values = {key: value.cpu() for key, value in adapter.state_dict().items()}
                adapter.load_state_dict(trainer.strategy.broadcast(values))
        self._report(trainer, adapters, time.perf_counter() - begun)

    def _check_bare(self, model: nn.Module) -> None:
        for name, _, adapter in adapted_layers(model, METHOD):
            if isinstance(adapter, LoRAAdapter) and not adapter.is_bare():
                raise ValueError(
                    f"the adapter of {name!r} holds what was trained or loaded before this fit, "
                    f"and InitAdapters({type(self.initialiser).__name__}) would throw that away; "
                    "leave the callback out to go on from there, or start from a model without "
                    "adapters"
                )

    def adopt(self, pl_module: LightningModule, model: nn.Module) -> None:
        """Take the adapters of ``model``, which another rank may have initialised, for done."""
        if self.initialiser is not None and pl_module.trainer.state.fn == TrainerFn.FITTING:
            *_, adapter = next(iter(adapted_layers(model, METHOD)))
            self._done = adapter
            if pl_module.trainer.ckpt_path is None:
                self._start = adapter.start_name

    def _run(
        self, initialiser: Initialiser, pl_module: LightningModule, model: nn.Module
    ) -> list[str]:
        trainer = pl_module.trainer
        quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None
        bar = tqdm(
            total=sum(1 for _ in adapted_layers(model, METHOD)),
            desc=type(initialiser).__name__,
            unit="layer",
            delay=1.0,  # seconds; a quick start shows nothing
            leave=False,
            disable=quiet,
        )

        def done(name: str) -> None:
            bar.update()

        with bar:
            if not initialiser.reads_gradient:
                return initialise(model, initialiser, progress=done)
            batches = first_batches(trainer, self.batches)
            pl_module.to(trainer.strategy.root_device)
            with at_rest(pl_module), step_loss(pl_module) as mean_of_step:

                def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
                    bar.set_postfix_str("taking gradients", refresh=False)
                    bar.update(0)  # shows that it is alive
                    return mean_of_step(model, batch)

                return initialise(
                    model,
                    initialiser,
                    batches,
                    loss=loss,
                    gradient_bytes=self.gradient_bytes,
                    progress=done,
                    reduce=partial(trainer.strategy.reduce, reduce_op="sum")
                    if trainer.world_size > 1
                    else None,
                )

    def _report(self, trainer: Trainer, adapters: Sequence[Adapter], seconds: float) -> None:
        frozen = [p for adapter in adapters for p in adapter.parameters() if not p.requires_grad]
        origins = sum(p.nbytes for p in frozen)
        rank_zero_info(
            f"{type(self.initialiser).__name__}: {len(adapters)} layers started in "
            f"{seconds:.1f} s, origins {origins / 1e6:.1f} MB"
        )
        values = {"init/seconds": seconds, "init/layers": len(adapters), "init/bytes": origins}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the names initialised and by what, for the record."""
        return {"initialised": self.initialised, "start": self._start}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        """Let adapter folders of a resumed run say where its adapters started.

        A base that was written before it was quantised is made again.
        """
        for name, model in adapted_children(pl_module).items():
            rewrite_for(model, checkpoint["state_dict"], f"{name}." if name else "")
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state and state["initialised"]:
            self.initialised, self._start = state["initialised"], state["start"]
            for *_, adapter in adapted_layers(pl_module, METHOD):
                adapter.start_name = self._start


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Undo, for tensors without a stated type or place, what a trainer sets to build models."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
