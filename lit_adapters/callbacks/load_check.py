"""Whether a checkpoint fits: looked at before the first of its tensors is copied."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_adapters.adapters import NewRows
from lit_adapters.attachment import adapted_layers
from lit_adapters.fingerprint import fingerprint, same_base
from lit_adapters.trained_state import check_trained, frozen_names, keep_trained

WHOLE = "whole_base_fingerprint"  # attribute of a module whose model is sharded


class LoadCheck:
    """Refuses a checkpoint of another adapter, of other new tokens or of another base.

    ``base`` is the fingerprint of the frozen weights; None if it is unknown.
    """

    def __init__(self) -> None:
        self.base: str | None = None
        self._handle: RemovableHandle | None = None

    def begin(self, trainer: Trainer, module: LightningModule, check_base: bool) -> None:
        """Wait for ``module`` to load a checkpoint of ``trainer``."""
        self.end()
        self.base = None

        def check(*_: Any) -> None:
            checkpoint = trainer._checkpoint_connector._loaded_checkpoint
            if checkpoint:  # else the module loads something of its own
                self._check(trainer, module, checkpoint, check_base)
                self.end()

        self._handle = module.register_load_state_dict_pre_hook(check)

    def end(self) -> None:
        """Wait no longer, and leave no hook behind."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def recognise(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the fingerprint of the base, unless a checkpoint was the occasion to."""
        self.end()
        if self.base is None:
            self.base = _fingerprint(trainer, module)

    def catch_up(
        self,
        trainer: Trainer,
        module: LightningModule,
        checkpoint: Mapping[str, Any],
        check_base: bool,
    ) -> None:
        """Check now, if the strategy did not load through the module."""
        if self._handle is not None:
            self._check(trainer, module, checkpoint, check_base)
        self.end()

    def _check(
        self,
        trainer: Trainer,
        module: LightningModule,
        checkpoint: Mapping[str, Any],
        check_base: bool,
    ) -> None:
        check_trained(module, keep_trained(module, checkpoint["state_dict"]))
        tokens = new_tokens_of(module)
        if checkpoint.get("new_tokens", tokens) != tokens:
            raise ValueError(
                f"the checkpoint {trainer.ckpt_path} holds rows of the new tokens "
                f"{checkpoint['new_tokens']}, and those here are {tokens}: name the same, in the "
                "same order"
            )
        recorded, self.base = checkpoint.get("base_fingerprint"), _fingerprint(trainer, module)
        if not check_base or recorded is None or self.base is None:
            return
        if not same_base(str(recorded), self.base):
            raise ValueError(
                f"the checkpoint {trainer.ckpt_path} was trained on another base (fingerprint "
                f"{recorded}); the frozen weights here have fingerprint {self.base}. Load that "
                "base, or pass check_base=False (--checkpoint.check_base=false) if you mean it"
            )


def new_tokens_of(module: nn.Module) -> list[list[str | int]]:
    """What the rows in a checkpoint mean, which their names do not say."""
    adapters = [adapter for *_, adapter in adapted_layers(module)]
    return [[*a.spec.tokens, *a.spec.ids] for a in adapters if isinstance(a, NewRows)]


def _fingerprint(trainer: Trainer, module: LightningModule) -> str | None:
    if trainer.strategy.restore_checkpoint_after_setup:  # weights may be sharded: FSDP and the like
        return getattr(module, WHOLE, None)
    return _of_frozen(module)


def remember_base(module: nn.Module) -> None:
    """Take the fingerprint of the base of ``module``, which is about to be sharded."""
    setattr(module, WHOLE, _of_frozen(module))


def _of_frozen(module: nn.Module) -> str:
    base, frozen = nn.Module(), frozen_names(module)
    for name, parameter in module.named_parameters():
        if name in frozen:
            base.register_parameter(name.replace(".", "/"), parameter)
    return fingerprint(base, list(adapted_layers(module)))
