"""The module of LoRA and its relatives: two thin factors, and where they started."""

import math
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.adapters.base import Adapter, AdapterSpec
from lit_adapters.adapters.shared_input import SharedInput
from lit_adapters.adapters.taken import KeepsTaken
from lit_adapters.initialisers import Factored, Factors, Initialiser, Kaiming, RewritesBase
from lit_adapters.weights import (
    add_low_rank,
    factor_shapes,
    group_count,
    is_lookup,
    matrix_shape,
    read_weight,
    write_weight,
)

# What ``lit_adapters.json`` says of a file whose rank holds factors and their start.
ORIGIN_NOTE = "second half of the rank"


class LoRAAdapter(KeepsTaken):
    """The trained factors ``lora_A`` (groups * rank, in) and ``lora_B`` (out, rank), fp32.

    Where training starts at ``B A != 0``, the start is pinned as frozen ``lora_A0`` and ``lora_B0``
    and the branch is ``scale * (B A - B0 A0) x``: the base is never written, the first output is
    the base's to the bit, and gradients are those of a base from which the start was subtracted.

    The one exception (QPiSSA): what was subtracted from the base itself before that was quantised
    is kept, so that the base can be made again (`KeepsTaken`).

    The branch is computed in fp32 (or in autocast's dtype) and cast to the layer's output dtype.
    """

    rank: int
    dropout: float
    groups: int
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: nn.Parameter | None
    lora_B0: nn.Parameter | None
    shared_input: SharedInput | None = None  # set by `finding_shared_inputs`

    def __init__(
        self, spec: AdapterSpec, rank: int, scale: float, dropout: float, layer: nn.Module
    ) -> None:
        super().__init__()
        groups, (out_features, in_features) = group_count(layer), matrix_shape(layer)
        # As attributes and by `register_parameter`, building takes twice as long.
        vars(self).update(spec=spec, rank=rank, scale=scale, dropout=dropout, groups=groups)
        empty = partial(torch.empty, device="meta", dtype=torch.float32)
        self._parameters.update(
            lora_A=nn.Parameter(empty(groups * rank, in_features)),
            lora_B=nn.Parameter(empty(out_features, rank)),
            lora_A0=None,
            lora_B0=None,
        )

    # --- where it starts -------------------------------------------------------------------------

    def reset(self, layer: nn.Module, generator: torch.Generator) -> None:
        """Draw a Kaiming start."""
        self.start(layer, Kaiming(), generator)
        self.start_name = None

    def start(
        self,
        layer: nn.Module,
        initialiser: Initialiser,
        generator: torch.Generator,
        gradient: Tensor | Factored | None = None,
        dense: Tensor | None = None,
    ) -> None:
        """Take the start of ``initialiser``, from the loss's gradient (out, in) if it reads it.

        Each block of a grouped convolution has a start of its own. ``dense`` (out, in), fp32, is
        what the layer held before it was quantised, for an initialiser that writes the base.
        """
        if isinstance(initialiser, RewritesBase):
            assert dense is not None
            self.set_factors(self.take_from(layer, initialiser, generator, dense))
            self.start_name = repr(initialiser)
            return
        if self.has_taken:
            raise ValueError(
                "a part of this layer was moved into the adapter before the layer was quantised, "
                "so no other start fits it; load the base anew"
            )
        shape = matrix_shape(layer)
        weight = (
            read_weight(layer) if initialiser.reads_weight else torch.empty(shape, device="meta")
        )
        if initialiser.reads_weight and weight.is_meta:
            raise ValueError(
                f"{type(initialiser).__name__} reads weights, and a {type(layer).__name__} is on "
                "the meta device, without values; load the base first"
            )
        gradients: Sequence[Tensor | Factored | None] = [gradient] * self.groups
        if isinstance(gradient, Tensor):  # layers whose gradient comes as factors are one block
            gradients = gradient.chunk(self.groups)
        factors = [
            initialiser(
                block,
                self.rank,
                self.scale,
                generator=generator,
                lookup=is_lookup(layer),
                gradient=part,
            )
            for block, part in zip(weight.chunk(self.groups), gradients, strict=True)
        ]
        whole = factors[0] if self.groups == 1 else map(torch.cat, zip(*factors, strict=True))
        self.set_factors(Factors(*whole), initialiser.pins_origin)
        self.start_name = repr(initialiser)

    @property
    def trained_factors(self) -> Factors:
        """``lora_A`` and ``lora_B``."""
        return Factors(self.lora_A, self.lora_B)

    @torch.no_grad()
    def set_factors(self, factors: Factors, pin: bool = False) -> None:
        """Start training from these factors; ``pin`` makes that point the base's output."""
        self.lora_A.copy_(factors.A)
        self.lora_B.copy_(factors.B)
        self.pin(pin)

    def pin(self, pin: bool = True) -> None:
        """Subtract the present product from now on, or (``pin=False``) nothing."""
        for name, origin in {"lora_A": "lora_A0", "lora_B": "lora_B0"}.items():
            value = self.get_parameter(name).detach().clone() if pin else None
            frozen = None if value is None else nn.Parameter(value, requires_grad=False)
            self.register_parameter(origin, frozen)

    def make_room(self) -> None:
        """Have an origin, of whatever value."""
        if not self.pinned:
            self.pin()

    def unmoved(self) -> bool:
        """Whether the product is zero, though the scale is not and nothing is pinned."""
        return self.scale != 0 and not self.pinned and self.is_bare()

    def is_bare(self) -> bool:
        """Whether the product, less the pinned origin, is zero: nothing was trained or loaded."""
        if self.lora_A0 is not None and self.lora_B0 is not None:
            return torch.equal(self.lora_A, self.lora_A0) and torch.equal(self.lora_B, self.lora_B0)
        return not self.lora_A.any() or not self.lora_B.any()

    @property
    def pinned(self) -> bool:
        """Whether an origin is subtracted."""
        return self.lora_A0 is not None

    def adopt(self, names: Set[str]) -> None:
        """Pin or unpin, as the checkpoint was."""
        if ("lora_A0" in names) != self.pinned and "lora_A" in names:
            self.pin("lora_A0" in names)
        super().adopt(names)

    # --- what it computes ------------------------------------------------------------------------

    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Return ``output + scale * (B A dropout(x) - B0 A0 x)`` in the dtype of ``output``."""
        if self.scale == 0:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        if self.drops(x):
            if self.lora_A0 is not None and self.lora_B0 is not None:
                output = add_low_rank(layer, output, x, self.lora_A0, self.lora_B0, -self.scale)
            factors = (self.lora_A, self.lora_B, self.scale)
            return add_low_rank(layer, output, x, *factors, dropout=self.dropout)
        return self.add_branch(layer, output, x, self.factors())

    def add_branch(self, layer: nn.Module, output: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """Return ``output + scale * B A x``, with ``A x`` from a product shared by some layers."""
        shared = None if self.shared_input is None else self.shared_input.product(self, x)
        if shared is None:
            return add_low_rank(layer, output, x, *factors, self.scale)
        return add_low_rank(layer, output, x, *factors, self.scale, hidden=shared)

    def drops(self, x: Tensor) -> bool:
        """Whether dropout acts on the input ``x``."""
        return self.training and self.dropout > 0 and x.is_floating_point()

    def factors(self) -> Factors:
        """Return thin matrices whose product is ``B A``, less the pinned origin.

        ``B A - B0 A0 = (B - B0) A + B0 (A - A0)``: of rank 2r, exactly zero at the start, and free
        of the cancellation between two large products.
        """
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        A0, B0 = self.lora_A0, self.lora_B0
        if A0 is None or B0 is None:
            return Factors(A, B)
        return Factors(self._stacked(A, A - A0), torch.cat([B - B0, B0], 1))

    def product(self) -> Tensor:
        """Return ``B A`` less the pinned origin, (out, in), fp32; block by block where grouped."""
        A, B = (factor.detach() for factor in self.factors())
        return block_product(A, B, self.groups)

    def merged(self, weight: Tensor) -> Tensor:
        """Return the fp32 matrix (out, in) that equals frozen ``weight`` plus adapter."""
        if self.scale == 0:
            return weight
        if self.groups > 1:
            return weight + self.scale * self.product()
        A, B = (factor.detach() for factor in self.factors())
        return torch.addmm(weight, B, A, alpha=self.scale)  # without two more of its size

    def merge_into(self, layer: nn.Module) -> None:
        """Add the product to the weight: one fp32 sum, rounded once."""
        write_weight(layer, self.merged(read_weight(layer)))

    def computes_like(self, other: Adapter) -> bool:
        """Return whether ``other`` has the same rank and scale, and an origin if this has."""
        return (
            type(self) is type(other)
            and isinstance(other, LoRAAdapter)
            and (self.rank, self.pinned) == (other.rank, other.pinned)
            and self.has_taken == other.has_taken
            and math.isclose(self.scale, other.scale)
        )

    # --- what a file holds -----------------------------------------------------------------------

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the factors in PEFT's shapes; a pinned origin is the second half of the rank.

        ``[B, -B0] [A; A0] = B A - B0 A0``: a plain LoRA of rank 2r on the original base.
        """
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        rank = self.rank
        second = self._second_half()
        if second is not None:
            A, B = self._stacked(A, second.A), torch.cat([B, -second.B], 1)
            rank *= 2
        shape_A, shape_B = factor_shapes(layer, rank)
        key_A, key_B = _file_keys(layer)
        return {key_A: _viewed(A, shape_A), key_B: _viewed(B, shape_B)}

    def load(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over the factors and, where pinned, the origin."""
        A, B = (tensors[key].flatten(1) for key in _file_keys(layer))
        second = self._second_half()
        if second is not None:
            halves = A.view(self.groups, 2, self.rank, -1)
            second.A.copy_(halves[:, 1].reshape(second.A.shape))
            A = halves[:, 0].reshape(self.lora_A.shape)
            second.B.copy_(-B[:, self.rank :])
            B = B[:, : self.rank]
        self.take_over(layer, lora_A=A, lora_B=B)

    @property
    def needs_memory(self) -> bool:
        """Whether a file holds more than the parameters, or these have memory already."""
        return not self.lora_A.is_meta or self._second_half() is not None

    def frozen_copies(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the weight that the factors act beside."""
        return {"base_layer.weight": layer.get_parameter("weight")}

    def notes(self) -> dict[str, Any]:
        """Return where it started, and that the file's second half of the rank is that start."""
        origin = ORIGIN_NOTE if self.pinned else None
        return {"initialiser": self.start_name, "origin": origin, **super().notes()}

    def _second_half(self) -> Factors | None:
        """What a file holds beside the factors: the pinned origin, or what the base lacks."""
        if self.taken_A is not None and self.taken_B is not None:
            return Factors(self.taken_A, self.taken_B)
        if self.lora_A0 is not None and self.lora_B0 is not None:
            return Factors(self.lora_A0, self.lora_B0)
        return None

    def extra_repr(self) -> str:
        """Return rank and scale for ``print(model)``."""
        pinned = ", pinned origin" if self.pinned else ""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}{pinned}"

    def _stacked(self, A: Tensor, more: Tensor) -> Tensor:
        """Put rows below rows, within each group."""
        return torch.cat(
            [A.unflatten(0, (self.groups, -1)), more.unflatten(0, (self.groups, -1))], 1
        ).flatten(0, 1)


def block_product(A: Tensor, B: Tensor, groups: int) -> Tensor:
    """Return ``B A`` (out, in), where block ``j`` of ``groups`` is ``B_j A_j``.

    ``A`` is (groups * r, in), ``B`` is (out, r).
    """
    blocks = B.unflatten(0, (groups, -1)) @ A.unflatten(0, (groups, -1))
    return blocks.flatten(0, 1)


def _viewed(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in another shape; itself where it has that one, as beside linear layers."""
    return tensor if tensor.shape == shape else tensor.view(shape)


def _file_keys(layer: nn.Module) -> tuple[str, str]:
    if is_lookup(layer):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"
