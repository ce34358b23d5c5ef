"""What QPiSSA and LoftQ took from a base before it was quantised, and that base made again."""

from abc import abstractmethod
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lit_adapters.adapters.base import Adapter
from lit_adapters.initialisers import Factors, RewritesBase, remainder
from lit_adapters.weights import (
    is_plain,
    read_weight,
    requantise,
    rounded,
    rounding,
    write_weight,
)

# What ``lit_adapters.json`` says where the second half of the rank was taken from the base.
TAKEN_NOTE = "second half of the rank, taken from the base before it was quantised"


class KeepsTaken(Adapter):
    """An adapter that may hold frozen ``taken_A`` and ``taken_B``, whose product its base lacks.

    They take no part in what is computed.
    """

    scale: float
    taken_A: nn.Parameter | None
    taken_B: nn.Parameter | None
    taken_from: str | None = None  # digest of the matrices before that
    rounding: Mapping[str, Any] | None = None  # of the base that was written

    def __init__(self) -> None:
        super().__init__()
        self._parameters.update(taken_A=None, taken_B=None)

    @property
    @abstractmethod
    def trained_factors(self) -> Factors:
        """The factors that are trained, of the shapes of those that may be taken."""

    @property
    def has_taken(self) -> bool:
        """Whether the base lacks a part that is kept here."""
        return self.taken_A is not None

    @torch.no_grad()
    def take_from(
        self, layer: nn.Module, initialiser: RewritesBase, generator: Generator, dense: Tensor
    ) -> Factors:
        """Take a part of ``dense`` (out, in) out of ``layer``; return where training starts."""

        def store(matrix: Tensor) -> Tensor:
            requantise(layer, matrix)
            return read_weight(layer)

        rank = self.trained_factors.B.shape[1]
        split = initialiser.split(dense, rank, self.scale, generator=generator, store=store)
        self.take(split.taken)
        self.rounding = rounding(layer)
        return split.start

    def take(self, taken: Factors | None = None) -> None:
        """Keep what was taken from the base, or make room for it."""
        like = self.trained_factors
        A, B = like if taken is None else taken
        self.taken_A = nn.Parameter(A.detach().clone().to(like.A), requires_grad=False)
        self.taken_B = nn.Parameter(B.detach().clone().to(like.B), requires_grad=False)

    @torch.no_grad()
    def rewrite(self, layer: nn.Module, dense: Tensor) -> None:
        """Make the base of training again from ``dense`` (out, in), fp32, the original.

        A quantised layer gets the same bytes; a dense one the numbers that those stand for.

        Raises:
            ValueError: if the layer rounds otherwise.
        """
        assert self.taken_A is not None
        assert self.taken_B is not None
        left = remainder(dense, Factors(self.taken_A, self.taken_B), self.scale)
        if is_plain(layer):
            write_weight(layer, rounded(left, self.rounding or {}))
            return
        self.check_rounding(layer)
        requantise(layer, left)
        self.rounding = rounding(layer)

    def check_rounding(self, layer: nn.Module) -> None:
        """Refuse a quantised layer that rounds otherwise than the one in training."""
        if not is_plain(layer) and self.rounding not in (None, rounding(layer)):
            raise ValueError(
                f"the adapter was trained on a base quantised as {self.rounding}, and this layer "
                f"is quantised as {rounding(layer)}; load the base like that, or not quantised"
            )

    def adopt(self, names: Set[str]) -> None:
        """Take a part or give it back, as the checkpoint had it."""
        if "taken_A" in names and not self.has_taken:
            self.take()
        elif self.has_taken and "lora_A" in names and "taken_A" not in names:
            self.taken_A = self.taken_B = self.rounding = self.taken_from = None

    def notes(self) -> dict[str, Any]:
        """Return what a folder says of what was taken; nothing if nothing was."""
        if not self.has_taken:
            return {}
        return {
            "origin": TAKEN_NOTE,
            "taken_from": self.taken_from,
            "quantised_as": self.rounding,
        }
