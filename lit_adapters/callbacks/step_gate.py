"""Between a judged gradient and the weights: an optimizer's step as it is, slower, or not made."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer

from lit_adapters.optim import GaLoreEngine


class StepGate:
    """Hooks around the steps of an optimizer, whichever optimizer and whoever calls it.

    Rates are lowered for the step alone, so that no schedule sees it. A step is left out by taking
    the gradients away after they were made, judged and clipped, which Lightning does in the closure
    of the step.
    """

    def __init__(self) -> None:
        self.lr_factor = 1.0  # of all rates, in every step
        self._optimizer: Optimizer | None = None
        self._hooks: list[Any] = []
        self._scheduled: list[Any] = []  # rates while a step is made with lowered ones
        self._engines: Sequence[GaLoreEngine] | None = None  # of a step held back

    def reset(self) -> None:
        """Let steps through as they are."""
        self.lr_factor = 1.0
        self.let_through()

    def watch(self, optimizer: Optimizer) -> None:
        """Stand in front of ``optimizer``, as the last to set its rates before a step."""
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._as_scheduled),
        ]

    def close(self) -> None:
        """Leave the optimizer alone, with its rates as scheduled."""
        if self._optimizer is not None:
            self._as_scheduled(self._optimizer)
        for hook in self._hooks:
            hook.remove()
        self._optimizer, self._hooks = None, []

    def let_through(self) -> None:
        """Let the step come."""
        self._engines = None

    def hold_back(self, engines: Sequence[GaLoreEngine]) -> None:
        """Leave the step out: no weight, no optimizer state and none of ``engines`` changes."""
        self._engines = engines

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.lr_factor != 1:
            self._scheduled = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.lr_factor
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._take_gradients_away(optimizer)
            return None
        return args[:1], {**kwargs, "closure": partial(self._after_closure, optimizer, closure)}

    def _after_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        result = closure()
        self._take_gradients_away(optimizer)
        return result

    def _take_gradients_away(self, optimizer: Optimizer) -> None:
        if self._engines is None:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for engine in self._engines:
            engine.withdraw()
        self._engines = None

    def _as_scheduled(self, optimizer: Optimizer, *_: Any) -> None:
        if self._scheduled:
            for group, rate in zip(optimizer.param_groups, self._scheduled, strict=True):
                group["lr"] = rate
            self._scheduled = []
