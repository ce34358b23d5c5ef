"""DoRA: LoRA turns each output row, a trained magnitude sets its length (arXiv 2402.09353)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_adapters.adapters.base import Adapted, AdapterSpec, bias_of
from lit_adapters.adapters.lora import LoRA
from lit_adapters.adapters.low_rank import LoRAAdapter
from lit_adapters.initialisers import Factored, Factors, Initialiser
from lit_adapters.weights import add_low_rank, per_output, weight_blocks
from lit_adapters.weights.dropout import dropout

MAGNITUDE = "lora_magnitude_vector"  # PEFT's key
# A row is never taken for shorter than this share of the frozen one: where V nearly cancels W, the
# expanded square is noise, and dividing by it would be a silent catastrophe.
SMALLEST = 1e-3
TINY = torch.finfo(torch.float32).tiny  # the square of a row of zeros: its ratio starts at 1 too


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed LoRA: ``W' = m * V / ||V||`` with ``V = W + scale * B A``.

    ``||V||`` is the length of each output row (the authors' code; the paper says column-wise), of
    each output channel of a convolution, of each embedding dimension over the vocabulary. As in
    section 4.3 it is a constant to the gradient. The bias is not scaled.

    Args:
        rank: As in `LoRA`; half of LoRA's rank often does.
        alpha: As in `LoRA`.
        dropout: As in `LoRA`; in training it also acts on the input of ``(m / ||V|| - 1) W x``, as
            in the authors' code, which costs a second product with the frozen weight.
        targets: As in `LoRA`.
        rslora: As in `LoRA`.
        exclude: As in `LoRA`.
        layers: As in `LoRA`.
        rank_pattern: As in `LoRA`.
        alpha_pattern: As in `LoRA`.
    """

    @property
    def adapter_class(self) -> type[LoRAAdapter]:
        """The module that these settings build."""
        return DoRAAdapter

    def to_peft(self, targets: str | list[str], adapted: Sequence[Adapted]) -> dict[str, Any]:
        """Return the fields of LoRA, and ``use_dora``."""
        return {**super().to_peft(targets, adapted), "use_dora": True}

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether the config states LoRA with magnitudes."""
        return config.get("peft_type") in cls.peft_types and config.get("use_dora") is True


class DoRAAdapter(LoRAAdapter):
    """LoRA's factors, and ``magnitude`` (out,), fp32."""

    weight_norms: Tensor | None

    def __init__(
        self, spec: AdapterSpec, rank: int, scale: float, dropout: float, layer: nn.Module
    ) -> None:
        super().__init__(spec, rank, scale, dropout, layer)
        self.magnitude = nn.Parameter(torch.empty_like(self.lora_B[:, 0]))
        # ||W||^2 by row: the base is frozen, so once is enough; not saved.
        self.register_buffer("weight_norms", None, persistent=False)

    def start(
        self,
        layer: nn.Module,
        initialiser: Initialiser,
        generator: torch.Generator,
        gradient: Tensor | Factored | None = None,
        dense: Tensor | None = None,
    ) -> None:
        """Take the start of an initialiser; the magnitude starts at the length of the rows."""
        super().start(layer, initialiser, generator, gradient, dense)
        if self.has_taken:
            self.weight_norms = None  # the base has been written
        with torch.no_grad():
            if not self.lora_B.is_meta and self.unmoved():  # the product need not be measured
                squares = self.squares(layer)
                self.magnitude.copy_(_length(squares, squares))
            else:
                self.magnitude.copy_(self.norms(layer, self.factors()))

    def rewrite(self, layer: nn.Module, dense: Tensor) -> None:
        """Make the base of training again, and measure it."""
        super().rewrite(layer, dense)
        self.weight_norms = None
        self.squares(layer)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.weight_norms = None  # the base may be loaded with it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoRAAdapter":
        if self.magnitude.is_meta:
            self.weight_norms = None  # values are about to come
        super()._apply(fn, recurse)
        return self

    def squares(self, layer: nn.Module) -> Tensor:
        """Return ``||W||^2`` of every row (out,), fp32; measured once."""
        if self.weight_norms is None:
            lengths = [torch.linalg.vector_norm(block, dim=1) for block in weight_blocks(layer)]
            self.weight_norms = torch.cat(lengths).square()
        return self.weight_norms

    def norms(self, layer: nn.Module, factors: Factors) -> Tensor:
        """Return ``||W + scale * B A||`` of every row (out,), fp32, without that matrix.

        ``||W||^2 + 2 scale <W, B A> + scale^2 ||B A||^2``, where ``<W, B A>`` needs only ``W A^T``
        (out, r) and ``||B A||^2`` only ``A A^T`` (r, r).
        """
        A, B = (factor.detach() for factor in factors)
        squares = self.squares(layer)
        device = "cpu" if B.is_meta else B.device.type  # autocast knows no meta device
        with torch.autocast(device, enabled=False):
            A, B = A.unflatten(0, (self.groups, -1)), B.unflatten(0, (self.groups, -1))
            cross = (B * self._weight_times(layer, A)).sum(-1).flatten()
            square = (B * (B @ (A @ A.mT))).sum(-1).flatten()
            return _length(squares + 2 * self.scale * cross + self.scale**2 * square, squares)

    def _weight_times(self, layer: nn.Module, A: Tensor) -> Tensor:
        """Return ``W A^T`` (groups, out / groups, r); ``A`` is (groups, r, in)."""
        if self.groups == 1:
            products = [
                F.linear(A[0], block) for block in weight_blocks(layer)
            ]  # (r, rows): faster
            return torch.cat(products, 1).T[None]
        weight = torch.cat(list(weight_blocks(layer)))
        return weight.unflatten(0, (self.groups, -1)) @ A.mT

    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Return ``m / ||V|| * (W x + scale * B A x) + bias`` in the dtype of ``output``.

        At the start ``m / ||V||`` is exactly 1, and the terms are arranged so that the output is
        then the base's to the bit.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        factors = self.factors()
        ratio = per_output(layer, self.magnitude / self.norms(layer, factors))
        if self.drops(x):
            return self._with_dropout(layer, x, output, ratio)
        adapted = self.add_branch(layer, output.to(ratio.dtype), x, factors) * ratio
        bias = bias_of(layer)
        if bias is not None:
            adapted = adapted + (1 - ratio) * per_output(layer, bias)
        return adapted.to(output.dtype)

    def _with_dropout(self, layer: nn.Module, x: Tensor, output: Tensor, ratio: Tensor) -> Tensor:
        dropped = dropout(x, self.dropout)
        base = layer.forward(dropped).to(ratio.dtype)  # not the call: no hooks
        bias = bias_of(layer)
        if bias is not None:
            base = base - per_output(layer, bias)
        if self.lora_A0 is not None and self.lora_B0 is not None:  # the base less its start
            origin = (self.lora_A0, self.lora_B0, -self.scale)
            output = add_low_rank(layer, output, x, *origin)
            base = add_low_rank(layer, base, dropped, *origin)
        moved = torch.zeros_like(base)
        moved = add_low_rank(layer, moved, dropped, self.lora_A, self.lora_B, self.scale)
        return output + ((ratio - 1) * base + ratio * moved).to(output.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """Return ``m V / ||V||`` (out, in), fp32."""
        V = super().merged(weight)
        norms, base = (torch.linalg.vector_norm(M, dim=1) for M in (V, weight))
        norms = norms.maximum(base * SMALLEST).clamp(min=TINY**0.5)
        return V * (self.magnitude.detach() / norms)[:, None]

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return LoRA's tensors and the magnitude in PEFT's shape."""
        magnitude = per_output(layer, self.magnitude)
        if magnitude.ndim > 1:
            magnitude = magnitude[None]
        return {**super().tensors(layer), MAGNITUDE: magnitude}

    def load(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over factors and magnitude."""
        super().load(layer, tensors)
        self.take_over(layer, magnitude=tensors[MAGNITUDE].flatten())
        self.squares(layer)  # now, and not within a compiled graph


def _length(square: Tensor, frozen: Tensor) -> Tensor:
    """The root of ``square``, at least `SMALLEST` times that of the ``frozen`` one."""
    return square.maximum(frozen * SMALLEST**2).clamp(min=TINY).sqrt()
