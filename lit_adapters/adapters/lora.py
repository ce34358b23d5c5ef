"""LoRA: a trained product of two thin matrices beside a frozen one (arXiv 2106.09685)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_adapters.adapters.base import Adapter, AdapterSpec
from lit_adapters.adapters.fields import read_field
from lit_adapters.initialisers import Factors, Kaiming
from lit_adapters.weights import add_low_rank, is_lookup, matrix_shape


@dataclass(frozen=True)
class LoRA(AdapterSpec):
    """Low-rank adaptation: ``y = W x + scale * B A dropout(x)``.

    Args:
        rank: r, the inner size of the product; more than the smaller side of a layer is an error.
        alpha: Numerator of the scale; 0 leaves the base unchanged to the bit.
        dropout: Probability of zeroing an input of the branch in training (not on embeddings).
        targets: ``"all-linear"`` (every linear layer but the output head), a regular expression
            that must match a module's whole dotted name, or a list of name endings.
        rslora: ``scale = alpha / sqrt(rank)`` (arXiv 2312.03732) instead of ``alpha / rank``.
        exclude: Names to leave out: a regular expression or a list of name endings.
        layers: Keep only modules inside the decoder layers of these numbers.
        rank_pattern: Ranks of single modules, by the ending of their name (regular expressions).
        alpha_pattern: The same for alpha.
    """

    peft_identity: ClassVar[dict[str, Any]] = {"peft_type": "LORA"}

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    exclude: str | list[str] | None = None
    layers: list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if type(rank) is not int or rank < 1:
                raise ValueError(f"rank must be a positive integer, got {name}={rank!r}")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not _is_number(alpha) or not 0 <= alpha < 1e30:
                raise ValueError(f"alpha must be a number of at least 0, got {name}={alpha!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got dropout={self.dropout!r}")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(_ending(pattern))
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is not regular: {error}") from error

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Return rank and scale of the module called ``name``, patterns applied.

        The first key of a pattern that matches the whole name or an ending of it after a dot wins.
        """
        rank = _first_match(self.rank_pattern, name, self.rank)
        alpha = _first_match(self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def build(self, layer: nn.Module, name: str) -> "LoRAAdapter":
        """Return an adapter with unset factors, on the device of ``layer``."""
        rank, scale = self.rank_and_scale(name)
        shape = matrix_shape(layer)
        if rank > min(shape):
            raise ValueError(
                f"rank {rank} exceeds min(out, in) = {min(shape)} of {name!r}; lower `rank`, give "
                f"this module its own in `rank_pattern`, or narrow `targets`"
            )
        return LoRAAdapter(self, rank, scale, shape, next(layer.parameters()).device)

    def to_peft(self) -> dict[str, Any]:
        """Return the LoRA fields of an ``adapter_config.json``."""
        return {
            **self.peft_identity,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "bias": "none",
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoRA":
        """Return the settings in a PEFT LoRA config; what PEFT leaves out takes PEFT's default."""
        return cls(
            rank=read_field(config, "r", int, 8),
            alpha=read_field(config, "lora_alpha", (int, float), 8),
            dropout=float(read_field(config, "lora_dropout", (int, float), 0.0)),
            targets=read_field(config, "target_modules", (str, list)),
            rslora=read_field(config, "use_rslora", bool, False),
            exclude=read_field(config, "exclude_modules", (str, list), None) or None,
            layers=_as_list(read_field(config, "layers_to_transform", (int, list), None)),
            rank_pattern=read_field(config, "rank_pattern", dict, {}),
            alpha_pattern=read_field(config, "alpha_pattern", dict, {}),
        )


class LoRAAdapter(Adapter):
    """The trained factors ``lora_A`` (rank, in) and ``lora_B`` (out, rank), fp32.

    The branch is computed in fp32 (or in autocast's dtype) and cast to the layer's output dtype.
    """

    def __init__(
        self,
        spec: LoRA,
        rank: int,
        scale: float,
        shape: tuple[int, int],
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.rank = rank
        self.scale = scale
        self.dropout = spec.dropout
        out_features, in_features = shape
        empty = partial(torch.empty, device=device, dtype=torch.float32)
        self.lora_A = nn.Parameter(empty(rank, in_features))
        self.lora_B = nn.Parameter(empty(out_features, rank))

    def reset(self, layer: nn.Module, generator: torch.Generator) -> None:
        """Draw a Kaiming start."""
        shape_only = torch.empty(matrix_shape(layer), device="meta")
        lookup = is_lookup(layer)
        self.set_factors(
            Kaiming()(shape_only, self.rank, self.scale, generator=generator, lookup=lookup)
        )

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Start training from these factors."""
        self.lora_A.copy_(factors.A)
        self.lora_B.copy_(factors.B)

    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Return ``output + scale * B A dropout(x)`` in the dtype of ``output``."""
        if self.scale == 0:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        if self.training and self.dropout > 0 and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        return add_low_rank(layer, output, x, self.lora_A, self.lora_B, self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        """Return ``weight + scale * B A`` (out, in), fp32."""
        if self.scale == 0:
            return weight
        return weight + self.scale * (self.lora_B.detach() @ self.lora_A.detach())

    def computes_like(self, other: Adapter) -> bool:
        """Return whether ``other`` has the same rank and scale."""
        same_kind = type(self) is type(other) and isinstance(other, LoRAAdapter)
        return same_kind and (self.rank, self.scale) == (other.rank, other.scale)

    def file_keys(self, layer: nn.Module) -> dict[str, str]:
        """Return PEFT's names for the factors."""
        if is_lookup(layer):
            return {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def extra_repr(self) -> str:
        """Return rank and scale for ``print(model)``."""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_list(value: int | list[int] | None) -> list[int] | None:
    return [value] if isinstance(value, int) else value or None  # PEFT: an empty list is no limit


def _first_match(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first key matching the end of ``name`` (PEFT's rule)."""
    for key, value in patterns.items():
        if re.match(_ending(key), name):
            return value
    return default


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
