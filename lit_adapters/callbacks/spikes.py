"""Watch the training loss, and keep a step that would ruin the adapter from being made."""

import logging
import math
from collections import deque
from statistics import median
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_adapters.callbacks.deviation import MEMORY, deviation
from lit_adapters.callbacks.snapshot import Snapshot, engines, put_back, take
from lit_adapters.callbacks.step_gate import StepGate

log = logging.getLogger(__name__)

FEWEST = 25  # losses known before one is judged; NaN and infinity are at any time
ACTIONS = ("warn", "skip", "lower-lr", "restore")


class SpikeGuard(Callback):
    """Detect a loss that jumps or is no number before its step is made, and act on it.

    A loss is a spike if it lies more than ``threshold`` robust standard deviations above what the
    last steps let expect (`deviation`), or if it or the norm of the gradients is not finite. Then

    - **warn** says so and steps. A loss that is no number still stops an `AdapterFineTuneModule`.
    - **skip** leaves the step out: weights, optimizer state and GaLore's subspaces stay as they
      are; step count, schedule and data go on. After ``limit`` steps in a row the loss is taken
      for the new level, or, if it is no number, the run is stopped.
    - **lower-lr** skips, multiplies the learning rate of all groups by ``factor`` for the rest of
      the run, whatever its schedule, and takes the loss for the new level.
    - **restore** does the same and puts the last good weights and optimizer state back. They are
      copied to main memory every ``every`` steps, once the loss of the next step shows that they
      are good. ``factor=1`` keeps the rate.

    Works with any LightningModule of one optimizer. In one of this library the loss is the mean
    over the tokens of an optimizer step, in others that over its batches. All ranks decide alike,
    on the mean of theirs. Under fp16's loss scaling, gradients that overflow are the scaler's to
    handle. Every event is a line on the console and ``spike/loss``, ``spike/deviation``,
    ``spike/count`` and ``spike/lr_factor`` in the loggers; LearningRateMonitor shows the rates of
    the schedule, which ``spike/lr_factor`` multiplies. Checkpoints hold the state, copies included.

    Args:
        action: What to do.
        window: Steps that the expectation is taken from.
        threshold: Robust standard deviations above which a loss is a spike.
        factor: Of the learning rate.
        patience: Spikes in a row that are only skipped before lower-lr and restore act; with 1, a
            single bad batch is skipped, and a loss that stays high is acted on.
        limit: Times that lower-lr or restore act, with less than ``window`` good steps in between,
            before the run is stopped; rates are never lowered below ``factor ** limit``. For skip
            and warn, spikes in a row.
        every: Optimizer steps between two copies for restore.
    """

    def __init__(
        self,
        action: Literal["warn", "skip", "lower-lr", "restore"] = "warn",
        window: int = 100,
        threshold: float = 4.5,
        factor: float = 0.3,
        patience: int = 0,
        limit: int = 3,
        every: int = 20,
    ) -> None:
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, got {action!r}")
        if window < FEWEST:
            raise ValueError(f"window={window} tells too little; give at least {FEWEST} steps")
        if not threshold > 0:
            raise ValueError(f"threshold must be above 0 standard deviations, got {threshold}")
        if not 0 < factor <= 1:
            raise ValueError(
                f"factor={factor} must be above 0 and at most 1: it multiplies the learning rate"
            )
        if patience < 0 or limit < 1 or every < 1:
            raise ValueError(
                f"patience must be 0 or more, limit and every 1 or more; got {patience=}, "
                f"{limit=}, {every=}"
            )
        self.action = action
        self.window = window
        self.threshold = threshold
        self.factor = factor
        self.patience = patience
        self.limit = limit
        self.every = every
        self._gate = StepGate()
        self._begin()

    def _begin(self) -> None:
        self.recent: deque[tuple[float, float]] = deque(maxlen=self.window)  # loss and weight
        self.count = 0  # spikes in this run
        self.in_a_row = 0
        self.acted = 0  # times that lower-lr or restore acted in a row
        self.quiet = 0  # good steps since the last spike
        self.good: Snapshot | None = None
        self._unproven: Snapshot | None = None  # taken, but no loss was seen since
        self._resumed_unproven = False
        self._sound = False  # whether the step that ends now was judged and made
        self._gate.reset()
        self._loss: Tensor | None = None  # of the batches since the last step
        self._batches = 0

    @property
    def lr_factor(self) -> float:
        """What multiplies the rates of the schedule."""
        return self._gate.lr_factor

    # --- the fit ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; refuse copies of what is spread over devices."""
        if stage != "fit":
            return
        self._gate.close()
        self._begin()
        if self.action == "restore" and trainer.strategy.restore_checkpoint_after_setup:
            raise ValueError(
                "SpikeGuard(action='restore') copies whole weights, which under "
                f"{type(trainer.strategy).__name__} no rank has; take action='lower-lr' or 'skip'"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Be the last to set the rates before a step, and know a state to go back to."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"SpikeGuard follows one loss and one optimizer, and {type(pl_module).__name__} "
                f"has {len(trainer.optimizers)}; give one of them all parameters, in groups"
            )
        optimizer = trainer.optimizers[0]
        if self.factor < 1 and any(group.get("lr") is None for group in optimizer.param_groups):
            raise ValueError(
                f"{type(optimizer).__name__} computes its learning rate by itself, so SpikeGuard "
                "cannot lower it; set its lr, or factor=1"
            )
        self._gate.watch(optimizer)
        if self.action == "restore" and self.good is None:
            self.good = take(trainer, pl_module)
        if self.action == "restore" and self._resumed_unproven:
            self._unproven = take(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizer alone."""
        self._gate.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the optimizer as it was scheduled."""
        self._gate.close()

    # --- the loss --------------------------------------------------------------------------------

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Add up the loss of a foreign module's accumulation window; Lightning has divided it."""
        if _asks(pl_module):
            return
        loss = loss.detach().float()
        scaler = _scaler(trainer)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones((), device=loss.device))
        self._loss = loss if self._loss is None else self._loss + loss
        self._batches += 1

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the step of a foreign module; ours asks when it knows the mean over tokens."""
        if self._loss is None:
            return
        loss = self._loss * (trainer.accumulate_grad_batches / self._batches)
        weight, self._loss, self._batches = float(self._batches), None, 0
        norm = nn.utils.get_total_norm(_gradients(optimizer)).to(loss)
        self._judge(trainer, torch.stack([loss, _whole(norm)]), weight)

    def leaves_out(self, trainer: Trainer, loss: Tensor, norm: Tensor, tokens: float) -> bool:
        """Judge a step that is about to be made; whether it was prevented.

        For a module that has ``asks_spike_guard`` and calls this in `on_before_optimizer_step`.

        Args:
            trainer: Whose step it is.
            loss: Mean loss of the step, on all ranks.
            norm: Of its gradients.
            tokens: That the loss is the mean of.
        """
        return self._judge(trainer, torch.stack([loss, _whole(norm).to(loss)]), tokens)

    def _judge(self, trainer: Trainer, both: Tensor, weight: float) -> bool:
        loss, norm = trainer.strategy.reduce(both, reduce_op="mean").tolist()  # the only wait
        if _scaler(trainer) is not None:
            norm = 0.0
        finite = math.isfinite(loss) and math.isfinite(norm)
        known = len(self.recent) >= FEWEST
        high = (deviation(self.recent, loss, weight) if known else 0.0) if finite else math.inf
        self._sound = high <= self.threshold
        self._gate.let_through()
        if self._sound:
            self.recent.append((loss, weight))
            self.in_a_row, self.quiet = 0, self.quiet + 1
            if self._unproven is not None:
                self.good, self._unproven = self._unproven, None
            return False
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        if self.quiet >= self.window:
            self.acted = 0
        self.quiet, self._unproven = 0, None
        return self._act(trainer, loss, norm, high)

    # --- actions ---------------------------------------------------------------------------------

    def _act(self, trainer: Trainer, loss: float, norm: float, high: float) -> bool:
        finite = math.isfinite(high)
        changes = self.action in ("lower-lr", "restore") and self.in_a_row > self.patience
        exhausted = self.in_a_row > self.limit and self.action in ("warn", "skip")
        what = self._describe(trainer, loss, norm, high)
        if changes and self.acted == self.limit:
            raise RuntimeError(
                f"{what}, and SpikeGuard(action={self.action!r}) has acted {self.limit} times "
                f"(limit) with less than {self.window} good steps in between. Start again from the "
                "last checkpoint with a lower learning rate, a longer warm-up or gradient_clip_val"
            )
        if exhausted and not finite and self.action != "warn":
            raise RuntimeError(
                f"{what}, in {self.in_a_row} steps in a row, so skipping them does not help: the "
                "adapter itself is damaged. Lower the learning rate, set gradient_clip_val, or "
                "take SpikeGuard(action='restore')"
            )
        makes = self.action == "warn" or (finite and exhausted)
        done = "" if makes else ", step skipped"
        if finite and (exhausted or (changes and self.action == "lower-lr")):
            self.recent.clear()
            self.in_a_row = 0
            done += ", taken for the new level"
        if changes:
            done += self._change(trainer)
        if not makes:
            self._gate.hold_back(engines(trainer))
        self._report(trainer, what + done, loss, high)
        return not makes

    def _change(self, trainer: Trainer) -> str:
        """Lower the rate and, if asked for, go back; return what was done."""
        self.acted += 1
        self.in_a_row = 0
        done = ""
        if self.action == "restore":
            assert self.good is not None
            put_back(self.good, trainer, trainer.lightning_module)
            done += ", last good state put back"
        if self.factor < 1:
            self._gate.lr_factor = max(self._gate.lr_factor * self.factor, self.factor**self.limit)
            done += f", learning rate now x {self._gate.lr_factor:.3g}"
        return done

    def _describe(self, trainer: Trainer, loss: float, norm: float, high: float) -> str:
        step = f"optimizer step {trainer.global_step + 1}"
        if not math.isfinite(loss):
            return f"{step}: the training loss is {loss}"
        if not math.isfinite(norm):
            return f"{step}: the norm of the gradients is {norm}"
        usual = median(value for value, _ in list(self.recent)[-MEMORY:])
        return (
            f"{step}: the training loss jumps from about {usual:.4g} to {loss:.4g} "
            f"({high:.1f} standard deviations)"
        )

    def _report(self, trainer: Trainer, line: str, loss: float, high: float) -> None:
        if not trainer.is_global_zero:
            return
        log.warning("SpikeGuard: %s", line)
        values = {"loss": loss, "deviation": high, "count": self.count, "lr_factor": self.lr_factor}
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"spike/{k}": v for k, v in values.items()}, step=trainer.global_step
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Copy the state after a good step, to be proven by the next."""
        due = self._sound and trainer.global_step % self.every == 0
        if due and self.action == "restore":
            self._unproven = take(trainer, pl_module)
        self._sound = False

    # --- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives; an unproven copy is the state of the checkpoint itself."""
        return {
            "recent": [list(step) for step in self.recent],
            "count": self.count,
            "in_a_row": self.in_a_row,
            "acted": self.acted,
            "quiet": self.quiet,
            "lr_factor": self.lr_factor,
            "good": self.good,
            "unproven": self._unproven is not None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the run that is resumed would have."""
        self.recent = deque(((a, b) for a, b in state_dict["recent"]), maxlen=self.window)
        self._gate.lr_factor = state_dict["lr_factor"]
        for name in ("count", "in_a_row", "acted", "quiet", "good"):
            setattr(self, name, state_dict[name])
        self._resumed_unproven = state_dict["unproven"]


def _asks(module: LightningModule) -> bool:
    return bool(getattr(module, "asks_spike_guard", False))


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]


def _whole(norm: Tensor) -> Tensor:
    """The norm of sharded gradients on every rank."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
