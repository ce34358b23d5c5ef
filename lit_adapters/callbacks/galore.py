"""GaLore in a Lightning fit: project gradients around whatever optimizer the module configures."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_adapters.adapters import FullFineTuning
from lit_adapters.callbacks.adapted_children import adapted_children
from lit_adapters.callbacks.files import is_of_a_search
from lit_adapters.optim import GaLoreEngine, Projection, choose_layers
from lit_adapters.optim.projected_linear import ProjectedLinear
from lit_adapters.replicas import average_all, average_all_but
from lit_adapters.targets import match_targets
from lit_adapters.weights import matrix_shape

matrix_shape.register(ProjectedLinear, matrix_shape.dispatch(nn.Linear))  # it computes the same


class GaLore(Callback):
    """Train full weights with the optimizer state of low-rank ones (arXiv 2403.03507).

    Works with any LightningModule, optimizer and schedule: the targeted weights that it trains are
    stepped through projected gradients, everything else as ever. In an `AdapterFineTuneModule`,
    combine it with ``adapter=FullFineTuning()``.

    Gradients are projected during the backward pass and freed, also while they accumulate; a linear
    layer forms that of its weight only to choose a subspace (a compiled one at every step, beside
    those of its whole decoder layer). The optimizer steps once per accumulation window.
    ``gradient_clip_val`` clips what is stepped: the projected gradients and those of ordinary
    parameters, whose norm is a little below that of the full ones. Checkpoints hold the subspaces
    and counts beside weights and optimizer, as tensors and ints; a run resumed inside a period goes
    on to the bit.

    Several devices: under DDP only projected gradients are averaged, and DDP is left with those of
    ordinary parameters; a window that chooses subspaces keeps whole gradients until its end and
    averages these. Under FSDP2 (`ModelParallelStrategy`) each rank projects the rows it holds, and
    side must be right, which the default, the shorter side, is only for weights with no more
    columns than rows: such a run equals that of one device with side right. Subspaces are those of
    the mean gradient of all ranks, which share the decompositions. A checkpoint is resumed under
    another strategy if the sides agree.

    In manual optimization a new subspace is chosen in the first backward pass of a window.
    ``backward()`` is what projects: ``torch.autograd.grad`` says of a projected weight that it is
    not used, and gives the projected gradient for the ``galore`` of its layer.

    Args:
        rank: Directions kept of each gradient.
        update_gap: Optimizer steps between two choices of the subspaces.
        scale: Factor of every update (the paper's alpha): the rate of projected weights is
            ``lr * scale``, their decay ``lr * weight_decay``.
        targets: As in `LoRA`, names being those inside the adapted model if there is one. What
            among them is not trained, no matrix or too small is left to the optimizer as it is.
        exclude: Names to leave ordinary, as in `LoRA`.
        svd: randomised, which holds .999 of what exact does and takes a tenth of the time for ranks
            far below the weight's; or exact, as in the paper: half a minute for a weight of 4096 x
            4096 on one processor core.
        side: std projects the shorter dimension, reverse_std the longer; left and right say which
            (right: rows keep their number); full both.
        moments: What becomes of the optimizer's state at a change of subspace: keep it, as in the
            paper; reset it; rotate the first moment into the new subspace.
        min_size: Weights whose shorter side is below this, or below rank, stay ordinary.
        decay: Whether the optimizer's weight decay is AdamW's (decoupled) or SGD's (coupled); auto
            knows the usual optimizers.
    """

    def __init__(
        self,
        rank: int,
        update_gap: int = 200,
        scale: float = 0.25,
        targets: str | list[str] = "all-linear",
        exclude: str | list[str] | None = None,
        svd: Literal["exact", "randomised"] = "randomised",
        side: Literal["std", "reverse_std", "left", "right", "full"] = "std",
        moments: Literal["keep", "reset", "rotate"] = "keep",
        min_size: int = 0,
        decay: Literal["auto", "decoupled", "coupled"] = "auto",
    ) -> None:
        self.settings = Projection(rank, update_gap, scale, side, svd, moments, min_size, decay)
        self.selection = FullFineTuning(targets=targets, exclude=exclude)
        self.engine: GaLoreEngine | None = None
        # A checkpoint's state, which is read before there is an engine to take it.
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what it cannot work with: another, averages of weights, gradients in parts."""
        if stage != "fit":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(other, GaLore) for other in callbacks) > 1:
            raise ValueError(
                "there are several GaLore callbacks, and one projects all it is to; give one, with "
                "`targets` that name every weight meant"
            )
        for other in callbacks:
            # They pair their copy's parameters with the module's, which has shadows among them.
            if isinstance(other, StochasticWeightAveraging | WeightAveraging):
                raise ValueError(
                    f"GaLore cannot be combined with {type(other).__name__}, which would average "
                    "the stand-ins of projected weights in the optimizer with the weights; train "
                    "with one of the two"
                )
        self._spread(trainer, pl_module)

    def _spread(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep whole gradients from being averaged, before the strategy prepares for it."""
        strategy = trainer.strategy
        name = type(strategy).__name__
        if isinstance(strategy, FSDPStrategy):
            raise ValueError(
                f"GaLore cannot work under {name}: FSDP flattens weights into shards, so that no "
                "matrix has a gradient of its own to project. Take FSDP2 "
                "(strategy=ModelParallelStrategy(), GaLore(side='right')) or DDP"
            )
        if isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):
            average_all_but(strategy, partial(self._weights, pl_module))
        elif not isinstance(strategy, SingleDeviceStrategy | ModelParallelStrategy):
            raise ValueError(
                f"GaLore works on one device, under DDP and under FSDP2 (ModelParallelStrategy), "
                f"and does not know who averages gradients under {name}; take one of these"
            )

    def _layers(self, pl_module: LightningModule) -> tuple[nn.Module, dict[str, nn.Module]]:
        """Return the model, whose names count, and the layers meant."""
        roots = list(adapted_children(pl_module).values())
        model = roots[0] if len(roots) == 1 else pl_module
        return model, {n: model.get_submodule(n) for n in match_targets(model, self.selection)}

    def _weights(self, pl_module: LightningModule) -> list[nn.Parameter]:
        """Return what will be projected if the optimizer steps all that is trained."""
        _, layers = self._layers(pl_module)
        trained = {id(p) for p in pl_module.parameters() if p.requires_grad}
        chosen, _ = choose_layers(layers, trained, self.settings)
        return [layer.get_parameter("weight") for layer in chosen.values()]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the weights in the optimizer; its state and ours are restored later or were read."""
        if self.engine:
            self.engine.remove()
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"GaLore works around one optimizer, and {type(pl_module).__name__} configures "
                f"{len(trainer.optimizers)}; give one of them all parameters, in groups"
            )
        model, layers = self._layers(pl_module)
        seed = trainer.strategy.broadcast(torch.initial_seed())  # rounds replicas alike
        self.engine = GaLoreEngine(
            layers, trainer.optimizers[0], self.settings, seed, trainer.world_size
        )
        self.engine.active = False
        if self._restored is not None:
            self.engine.load_state_dict(self._restored)
            self._restored = None
        self._report(trainer, model)

    def _report(self, trainer: Trainer, model: nn.Module) -> None:
        assert self.engine is not None
        projected = self.engine.projected.values()
        whole = sum(one.weight.numel() for one in projected)
        kept = sum(one.shadow.numel() for one in projected)
        rank_zero_info(
            f"GaLore: {len(projected)} weights of {whole:,} elements are stepped as {kept:,}"
            + "".join(f"; {name} {reason}" for name, reason in self.engine.ordinary.items())
        )

    # --- while training --------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on gradients and steps are training's."""
        if self.engine:
            self.engine.active = True

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Tell whether this is the last backward pass before the step."""
        if self.engine:
            automatic = pl_module.automatic_optimization
            self.engine.accumulating = automatic and trainer.fit_loop._should_accumulate()
            self.engine.pending = True  # other ranks may get gradients where this one does not

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange gradients, and complete those that only earlier batches of the window had.

        Before a GradScaler looks at them.
        """
        if self.engine and not self.engine.accumulating:
            self.engine.finish_window()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """The same if the window's last batch was skipped, before gradients are clipped."""
        if self.engine:
            self.engine.finish_window()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave gradients and steps alone again."""
        if self.engine:
            self.engine.active = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was, trained; the state can still be saved."""
        self._remove(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no shadow for the next fit to train."""
        self._remove(trainer)

    def _remove(self, trainer: Trainer) -> None:
        average_all(trainer.strategy)
        if self.engine:
            self.engine.remove()

    # --- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add subspaces and counts: tensors and ints.

        Where `state_dict` would put them: for that, the trainer would refuse a second one of us
        before `setup` can say why.
        """
        if self.engine:
            checkpoint["callbacks"][self.state_key] = self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the engine is there."""
        if self.engine and self.engine.attached:
            self.engine.load_state_dict(state_dict)
        else:
            self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        """Refuse the checkpoint of a run without GaLore: its optimizer steps other shapes."""
        resumes = trainer.state.fn == "fit" and not is_of_a_search(trainer.ckpt_path)
        if resumes and not checkpoint.get("callbacks", {}).get(self.state_key):
            raise ValueError(
                "the checkpoint was written without GaLore, so its optimizer state does not fit "
                "the projected gradients; resume it without GaLore, or start a new fit from its "
                "weights"
            )
