"""The stand-in of a projected weight in its optimizer, and the way back into the weight."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.optim.galore_settings import Projection
from lit_adapters.optim.projected_linear import SHADOW, restore
from lit_adapters.optim.projection import Projector, add_back, project, projected_shape, sides
from lit_adapters.optim.rounding import round_stochastically
from lit_adapters.optim.rows import as_rows_of, is_cut, own_rows, place_of_rows


@dataclass
class Shadowed:
    """A projected weight.

    The shadow is a parameter of the layer, so that it has a name, but no part of any state dict:
    between steps it is zero. Where ranks hold rows of the weight, the shadow is cut like it, and
    gradients here are of these rows.
    """

    name: str
    layer: nn.Module
    settings: Projection
    weight: nn.Parameter = field(init=False)  # (m, ...), seen as (m, n)
    shadow: nn.Parameter = field(init=False)  # (m, r), (r, n) or (r, r)
    is_cut: bool = field(init=False)
    projector: Projector | None = None
    steps: int = 0  # optimizer steps made
    age: int = 0  # of them, since the subspace was chosen
    kept: Tensor | None = None  # gradient of a window that is to choose the subspace
    # Subspace, age and optimizer state (if that was changed) before this window chose a subspace.
    replaced: tuple[Projector | None, int, dict[str, Any] | None] | None = None
    _hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Register the shadow."""
        self.weight = self.layer.get_parameter("weight")
        rows, columns = projected_shape(
            matrix_shape(self.weight), self.settings.rank, self.settings.side
        )
        self.is_cut = is_cut(self.weight)
        here = (own_rows(self.weight).shape[0] if self.is_cut else rows, columns)
        dtype = torch.float32 if self.weight.dtype == torch.bfloat16 else self.weight.dtype
        zeros = torch.zeros(here, dtype=dtype, device=self.weight.device)
        self.shadow = nn.Parameter(as_rows_of(zeros, self.weight))
        self.layer.register_parameter(SHADOW, self.shadow)
        self._hooks = [
            self.layer.register_state_dict_post_hook(_leave_out),
            self.layer.register_load_state_dict_post_hook(_do_not_miss),
        ]

    def remove(self) -> None:
        """Leave the layer as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.kept = [], None
        restore(self.layer)
        self.layer._parameters.pop(SHADOW, None)

    @property
    def due(self) -> bool:
        """Whether the subspace is to be chosen anew."""
        return self.projector is None or self.age >= self.settings.update_gap

    def seed(self, base: int) -> int:
        """Return the seed of this weight's random numbers in the present step of a run."""
        digest = hashlib.sha256(f"{base}:{self.name}:{self.steps}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def projected(self, full: Tensor) -> Tensor:
        """Return a tensor like this rank's weight, projected; autocast has no part in it."""
        assert self.projector is not None
        with torch.autocast(full.device.type, enabled=False):
            return project(full.flatten(1), self.projector).to(self.shadow.dtype)

    def add_gradient(self, R: Tensor) -> None:
        """Accumulate a projected gradient."""
        if self.shadow.grad is None:
            self.shadow.grad = as_rows_of(R, self.shadow)
        else:
            own_rows(self.shadow.grad).add_(R)

    def move_weight(self, factor: float, seed: int) -> None:
        """``W = factor * (W + scale * back(shadow))``; the shadow is zero again.

        A weight in bf16 is computed in fp32 and rounded stochastically, once.
        """
        weight, shadow = own_rows(self.weight.detach()), own_rows(self.shadow.detach())
        if self.projector is None:  # stepped on a gradient that was not finite: let it show
            weight.fill_(torch.nan)
            return
        rounds = weight.dtype != shadow.dtype
        matrix = (weight.float() if rounds else weight).flatten(1)
        add_back(matrix, shadow, self.projector, self.settings.scale)
        if factor != 1:
            matrix.mul_(factor)
        if rounds:
            seed += place_of_rows(self.weight)  # other bits for other rows
            generator = torch.Generator(weight.device).manual_seed(seed)
            matrix = round_stochastically(matrix, generator)
        if rounds or weight.ndim > 2:  # flattening may have copied
            weight.copy_(matrix.view(weight.shape))
        shadow.zero_()

    def state(self) -> dict[str, Any]:
        """Return tensors and ints."""
        bases = {} if self.projector is None else self.projector._asdict()
        present = {side: basis for side, basis in bases.items() if basis is not None}
        return {"steps": self.steps, "age": self.age, **present}

    def bases(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of the subspace's bases, of those sides that are projected."""
        (rows, columns), rank = matrix_shape(self.weight), self.settings.rank
        shapes = {"left": (rows, rank), "right": (rank, columns)}
        wanted = sides((rows, columns), self.settings.side)
        return {side: shapes[side] for side, is_in in zip(shapes, wanted, strict=True) if is_in}

    def checked(self, state: dict[str, Any]) -> Projector | None:
        """Return the subspace in a `state`, on the weight's device.

        Raises:
            ValueError: if it has another rank or side.
        """
        found = {side: state[side] for side in Projector._fields if side in state}
        if not found:
            return None
        expected = self.bases()
        got = {side: tuple(basis.shape) for side, basis in found.items()}
        if got != expected:
            raise ValueError(
                f"GaLore's subspace of {self.name!r} is {got} in the saved state and {expected} "
                "here; give the same rank and side"
            )
        moved = {
            side: basis.to(self.weight.device, self.weight.dtype) for side, basis in found.items()
        }
        return Projector(moved.get("left"), moved.get("right"))


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Return (m, n) of a weight seen as a matrix: a convolution is (out, everything else)."""
    return weight.shape[0], weight.shape[1:].numel()


def _leave_out(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}{SHADOW}", None)


def _do_not_miss(layer: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if k.rpartition(".")[2] != SHADOW]
