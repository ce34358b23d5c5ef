"""A trainer for devices that are not there: Lightning checks its settings, and nothing is run."""

import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_adapters.sharding import spread_over_all


class AbsentCUDA(CUDAAccelerator):
    """As many CUDA devices as are asked for; nothing can be computed on them."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Take numbers of devices as a trainer does: 8, "8", "0,2" or [0, 2].

        Raises:
            ValueError: if only the machine of the fit knows them.
        """
        if isinstance(devices, str):
            numbers = [int(part) for part in devices.split(",") if part.strip()]
            devices = numbers if "," in devices else numbers[0]
        if devices == -1:
            raise ValueError("devices=-1 are all of the machine of the fit; say how many it has")
        return list(range(devices)) if isinstance(devices, int) else list(devices)

    @staticmethod
    def is_available() -> bool:
        """Whether it can be chosen."""
        return True


def absent_trainer(
    settings: Mapping[str, Any], callbacks: Sequence[Callback], device: str
) -> Trainer:
    """Return the trainer of a fit on ``device`` (cpu or cuda), its devices arranged.

    Raises what Lightning has against the settings.
    """
    if settings["devices"] == "auto" and device == "cuda":
        raise ValueError(
            "devices=auto are those of the machine of the fit; say how many each has: --devices 8"
        )
    changed = {
        "accelerator": AbsentCUDA() if device == "cuda" else "cpu",
        "callbacks": [*_listed(settings["callbacks"]), *callbacks],
        "logger": False,
        # Else the scheduler of the job that this command may run in would be asked.
        "plugins": [*_listed(settings["plugins"]), LightningEnvironment()],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about devices that are not used, or lack a scaler
        trainer = Trainer(**{**settings, **changed})
    strategy = trainer.strategy
    spread_over_all(strategy)
    if isinstance(strategy, ModelParallelStrategy):
        # Data asks it for their share; a real mesh has processes behind it.
        mesh: Any = SimpleNamespace(size=lambda: trainer.world_size, get_local_rank=lambda: 0)
        strategy._device_mesh = {"data_parallel": mesh}  # type: ignore[assignment]
    return trainer


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
